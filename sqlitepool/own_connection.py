"""Connections outside of the pools: for work that nobody else's connection can do, and for backups."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import quote

from sqlitepool import fork
from sqlitepool.claimants import Claimants, caller
from sqlitepool.cleaning import end_block
from sqlitepool.connection import Target, normalise_path, open_connection
from sqlitepool.database_file import name_file
from sqlitepool.database_pools import ReaderPool, WriterTurn
from sqlitepool.errors import FileReplaced, PoolDeadlock
from sqlitepool.inherited import disown
from sqlitepool.reading_connection import BEGIN
from sqlitepool.tracking import Connection
from sqlitepool.turn import Turn
from sqlitepool.waiting import locked
from sqlitepool.writer import Place, Writer, is_busy, time_left

# A backup copies so many pages at a time; in between Ctrl-C and `progress` have their chance.
_PAGES = 1000
# If the file is replaced at the moment when it is opened, it is tried again after a pause (seconds).
_PAUSE = 0.001
# The longest that SQLite can be told to wait for locks (milliseconds).
_LONGEST_PATIENCE = 2**31 - 1

_IN_USE = "a database that is in use, or was not closed well, is not overwritten"


@dataclass(frozen=True, slots=True)
class Opener:
    """How connections to one database are opened."""

    target: Target
    pragmas: Mapping[str, object]
    setup: Callable[[sqlite3.Connection], object] | None

    def open(self, deadline: float | None, watch: Callable[[], object]) -> Connection:
        """Open a connection in autocommit mode, that waits for locks until the deadline."""
        return open_connection(
            self.target.database,
            uri=self.target.uri,
            read_only=False,
            pragmas={**self.pragmas, "busy_timeout": _patience(deadline)},
            setup=self.setup,
            deadline=deadline,
            connect_options={"isolation_level": None},
            watch=watch,
        )


def _patience(deadline: float | None) -> int:
    """Return how long SQLite is to wait for locks, in milliseconds."""
    left = time_left(deadline)
    return _LONGEST_PATIENCE if left is None else int(min(left * 1000, _LONGEST_PATIENCE))


class IsolatedBlock:
    """One block with a connection of its own. Made by `Database.isolated`; to be entered once at a time."""

    __slots__ = ("__weakref__", "_claimants", "_conn", "_opener", "_place", "_timeout", "_turn", "_writer")

    def __init__(self, writer: Writer, opener: Opener, timeout: float | None, claimants: Claimants) -> None:
        self._writer = writer
        self._claimants = claimants
        self._place: Place | None = None
        self._opener = opener
        self._timeout = timeout
        self._turn: Turn | None = None
        self._conn: Connection | None = None

    def __enter__(self) -> Connection:
        if self._turn is not None:
            raise RuntimeError("this block is in use: call db.isolated() once for each with block")
        frame = caller(sys._getframe(1))
        if self._writer.enclosing(frame) is not None:
            raise PoolDeadlock(
                "db.isolated() inside a write block would wait for that block to end: use one of the two"
            )
        self._claimants.refuse_to_wait(frame, self._writer)
        deadline = None if self._timeout is None else monotonic() + self._timeout
        try:
            self._turn = turn = WriterTurn(self._writer, deadline)
            turn.enter(frame)
            self._place = Place(frame)
            self._claimants.add(self)
            self._conn = conn = self._open(turn, frame, deadline)
            return conn
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _open(self, turn: Turn, frame: FrameType, deadline: float | None) -> Connection:
        """Open a connection to the file that is there now. The writer goes first, as it does for readers."""
        writer, pool = self._writer, self._writer.pool
        while True:
            while not pool.has_current_file():
                pool.enter_current_file(deadline)
                if writer.has_moved():
                    turn.leave()
                    turn.enter(frame)
            try:
                return pool.open_beside(partial(self._opener.open, deadline, pool.check_current))
            except FileReplaced:
                if time_left(deadline) == 0:
                    raise
            except sqlite3.Error:
                if pool.has_current_file() or time_left(deadline) == 0:
                    raise
            time.sleep(_PAUSE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        conn, self._conn = self._conn, None
        turn, self._place = self._turn, None
        try:
            if error is not None:
                name_file(error, self._opener.target.file, "in an isolated block")
            if conn is not None and turn is not None and turn.is_held:
                try:
                    end_block(conn, kind is None)
                finally:
                    self._writer.pool.close_apart(conn)
            elif conn is not None:  # a child that was forked inside of the block
                disown(conn)
        finally:
            self._turn = None
            if turn is not None:
                turn.leave()
            self._claimants.remove(self)

    def __repr__(self) -> str:
        return f"<IsolatedBlock of {self._writer.pool.name!r}, {'open' if self._conn is not None else 'not open'}>"

    def enclosing(self, frame: FrameType | None) -> IsolatedBlock | None:
        """Return this block if it has the right to write, and provably encloses `frame`."""
        place, turn, stack = self._place, self._turn, set()
        while frame is not None:
            stack.add(id(frame))
            frame = frame.f_back
        return self if place is not None and place.encloses(stack) and turn is not None and turn.is_held else None


class _Replacing:
    """Who replaces a file looks at it first, and for that moment its journal is there: so only one at a time does."""

    def __init__(self) -> None:
        self._start_anew()
        fork.register(self)

    def _start_anew(self) -> None:
        self.lock = threading.RLock()


_replacing = _Replacing()


def back_up(
    readers: ReaderPool,
    destination: str | os.PathLike[str] | sqlite3.Connection,
    progress: Callable[[int, int, int], object] | None,
    deadline: float | None,
) -> None:
    """Copy the database as it is now. See `Database.backup`."""
    path = "" if isinstance(destination, sqlite3.Connection) else _path_of(destination, readers._target.file)
    source = readers.open_apart(deadline)
    try:
        source.read(f"PRAGMA busy_timeout = {_patience(deadline)}")
        source.execute(BEGIN)
        source.read("SELECT 1 FROM sqlite_master LIMIT 1")  # from here on one snapshot, so that the copy never restarts
        if isinstance(destination, sqlite3.Connection):
            source.backup(destination, pages=_PAGES, progress=progress)
        else:
            _back_up_to_file(source, path, progress)
    finally:
        readers.close_apart(source)


def _path_of(destination: str | os.PathLike[str], file: str | None) -> str:
    """Return the path that a destination names, if the database of `file` may be copied there."""
    path = normalise_path(destination, read_only=False).file
    if path is None:
        raise ValueError(f"to copy to a database in memory pass a connection to it, not {destination!r}")
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "a folder, where the file of a backup is wanted", path)
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(errno.ENOENT, "no such folder: create it before the backup", os.path.dirname(path))
    if file is not None and os.path.exists(path) and os.path.samefile(path, file):
        raise ValueError(f"a database cannot be its own backup: {path}")
    locked(_replacing.lock, _refuse_if_in_use, path)
    return path


def _refuse_if_in_use(path: str) -> None:
    for journal in (f"{path}-wal", f"{path}-journal"):
        if os.path.exists(journal):
            raise FileExistsError(errno.EEXIST, _IN_USE, journal)
    if not os.path.exists(path):
        return
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=0)) as old:
            old.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:  # what cannot be opened, or is no database, is in nobody's way
        if is_busy(error):
            raise FileExistsError(errno.EEXIST, _IN_USE, path) from error


def _replace(copied: str, path: str) -> None:
    _refuse_if_in_use(path)
    os.replace(copied, path)


def _back_up_to_file(source: Connection, path: str, progress: Any) -> None:
    copied = f"{path}-partial-{uuid.uuid4().hex[:8]}"
    try:
        with contextlib.closing(sqlite3.connect(copied)) as copy:
            source.backup(copy, pages=_PAGES, progress=progress)
        locked(_replacing.lock, _replace, copied, path)
    except BaseException:
        for left_over in (copied, f"{copied}-journal", f"{copied}-wal", f"{copied}-shm"):
            with contextlib.suppress(OSError):
                os.unlink(left_over)
        raise
