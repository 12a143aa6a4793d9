"""The two pools of a `Database`, of readers and of the writer, and how they pass to another file at the same path.

Where the file was replaced or deleted (see `database_file.py`) the writer goes first: whoever has the right to write
closes the old connection, sets the old file's journal aside, opens what is there now or makes it, and sees to its WAL
mode. No reader opens a connection before that: it would find the old journal beside the new file, or keep the writer
from changing the mode. Readers of the old file go on to the end of their blocks. They have all its files open, and
touch nothing by its name.

SQLite opens the database, its log and the index of that one after the other, each by its name. If they were not of the
same file, it would spoil the index under everybody's hands. So every other connection looks, when it has the database
open and nothing else, whether that is still the file of the writer; and while any of them is being opened, the writer
does not enter another file.
"""

from __future__ import annotations

import sqlite3
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any

from sqlitepool.connection_pool import ConnectionPool
from sqlitepool.database_file import DatabaseFile
from sqlitepool.errors import FileReplaced
from sqlitepool.lease import Lease, Slot
from sqlitepool.tracking import Connection
from sqlitepool.turn import Turn
from sqlitepool.watched_pool import is_changing
from sqlitepool.writer import Writer, is_busy, time_left

# What cannot be opened for a lock, say, is tried again after these seconds; then twice as many, up to the most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02


class _DatabasePool(ConnectionPool[Connection]):
    def close_apart(self, conn: Connection) -> None:
        """Close a connection that is none of the pool."""
        self._retire_connection(conn)

    def _prepare(self, deadline: float | None) -> None:
        """Do what has to be done before a connection is opened."""

    def _create(self, slot: Slot[Connection], deadline: float | None) -> Connection:
        """Open a connection; again, until the deadline, if the database is locked or its file changes meanwhile."""
        pause = _FIRST_PAUSE
        while True:
            self._prepare(deadline)
            try:
                return self._create_once(slot, deadline)
            except (FileReplaced, sqlite3.OperationalError) as error:
                is_to_stay = self._raises or error.__cause__ is not None  # an old journal that cannot be moved, say
                left = time_left(deadline)
                if left == 0 or (is_to_stay if isinstance(error, FileReplaced) else not is_busy(error)):
                    raise
            time.sleep(pause if left is None else min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _create_once(self, slot: Slot[Connection], deadline: float | None) -> Connection:
        file = self._file
        before = None if file is None else file.identify()
        try:
            return super()._create(slot, deadline)
        except sqlite3.Error:
            if file is not None and before is not None and file.identify() != before:
                raise is_changing(file) from None
            raise


class _Opening:
    """A connection that is being opened beside that of the writer."""

    __slots__ = ("__weakref__",)


class WriterPool(_DatabasePool):
    """Lends the one connection that writes. Only for who has the right to write, but for the questions."""

    openings: weakref.WeakSet[_Opening]
    """While there is one, the writer enters no other file."""

    def __init__(self, **options: Any) -> None:
        self.openings = weakref.WeakSet()
        super().__init__(**options)

    def _enter_file(self, file: DatabaseFile) -> None:
        if len(self.openings) and file.look() is not None:
            raise is_changing(file)
        super()._enter_file(file)

    def _start_anew(self) -> None:
        self.openings = weakref.WeakSet()
        super()._start_anew()

    def has_current_file(self) -> bool:
        """Tell whether the file that is there now is the one that was opened last."""
        file = self._file
        return file is None or (not file.left and file.look() is None)

    def enter_current_file(self, deadline: float | None) -> None:
        """Open the file that is there now."""
        file = self._file
        if file is not None and not file.left:
            self._look_at_file(file, monotonic())
        with Lease(self, time_left(deadline)):
            pass

    def open_beside(self, open_one: Callable[[], Connection]) -> Connection:
        """Return what `open_one` returns: a connection to the file that the writer has open.

        Args:
            open_one: opens it, and calls `check_current` when it has the database open and nothing else.

        Raises:
            FileReplaced: there is another file now, which the writer has not entered. Nothing of it was touched.
        """
        opening = _Opening()
        openings = self.openings
        try:
            openings.add(opening)
            if self._file is not None:
                self._file.hold_inherited_locks()
            self.check_current()
            return open_one()
        finally:
            openings.discard(opening)

    def check_current(self) -> None:
        """Raise `FileReplaced` if the file that is there now is not the one that was opened last."""
        if self._file is not None and not self.has_current_file():
            raise is_changing(self._file)


class WriterTurn(Turn):
    """A turn at the gate of the file that the writer has open. That may become another one while this turn waits.

    Who came through the gate of the old file, and waited there for the connection, which is with somebody at the new
    gate, would keep that one out: other processes know both gates by the same lock.
    """

    __slots__ = ("_is_last", "_writer")

    def __init__(self, writer: Writer, deadline: float | None, *, is_last: bool = False) -> None:
        super().__init__(writer.gate, deadline)
        self._writer = writer
        self._is_last = is_last

    def refusal(self) -> Exception | None:
        """Make the error for a turn that comes when the database is being closed, unless it is the one that closes."""
        return None if self._is_last else self._writer.refusal(is_queued=False)

    def enter(self, frame: FrameType | None = None) -> None:
        """Wait for the right to write, and take it: see `Turn.enter`."""
        frame = frame if frame is not None else sys._getframe(1)
        while True:
            self._gate = gate = self._writer.gate
            super().enter(frame)
            refused = self.refusal()
            if refused is None and self._writer.gate is gate:
                return
            self.leave()
            if refused is not None:
                raise refused


class ReaderPool(_DatabasePool):
    """Lends the connections that only read.

    Attributes:
        writers: the pool of the writer.
        writer_first: called with the deadline before a connection is opened; returns when the writer has opened the
            file that is there now.
    """

    writers: WriterPool
    writer_first: Callable[[float | None], object]

    def _prepare(self, deadline: float | None) -> None:
        file = self._file
        if file is not None:
            if not file.left and file.look() is not None:
                self._look_at_file(file, monotonic())
            self.writer_first(deadline)

    def _create_once(self, slot: Slot[Connection], deadline: float | None) -> Connection:
        create = partial(super()._create_once, slot, deadline)
        return create() if self._file is None else self.writers.open_beside(create)

    def _check_file(self, before: tuple[int, int] | None) -> None:
        self.writers.check_current()

    def open_apart(self, deadline: float | None) -> Connection:
        """Open a connection like those of the pool, that is not one of them: `close_apart` closes it."""
        return self._create(Slot(), deadline)

    def _enter_file(self, file: DatabaseFile) -> None:
        """Nothing to do: the writer has set the old journal aside."""
