"""Connections outside of the pools: for work that nobody else's connection can do, and for backups."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import FrameType, TracebackType
from typing import Any

from sqlitepool import fork
from sqlitepool.claimants import Claimants, caller
from sqlitepool.cleaning import end_block, retire
from sqlitepool.connection import Target, normalise_path, open_connection
from sqlitepool.database_file import name_file
from sqlitepool.database_pools import WriterTurn
from sqlitepool.errors import PoolDeadlock
from sqlitepool.tracking import Connection
from sqlitepool.turn import Turn
from sqlitepool.writer import Place, Writer, time_left

# A backup copies so many pages at a time; in between Ctrl-C and `progress` have their chance.
_PAGES = 1000


@dataclass(frozen=True, slots=True)
class Opener:
    """How connections to one database are opened."""

    target: Target
    pragmas: Mapping[str, object]
    setup: Callable[[sqlite3.Connection], object] | None

    def open(self, deadline: float | None, *, read_only: bool, **pragmas: object) -> Connection:
        """Open a connection in autocommit mode."""
        target = normalise_path(self.target.database, read_only)
        return open_connection(
            target.database,
            uri=target.uri,
            read_only=read_only,
            pragmas={**self.pragmas, **pragmas},
            setup=self.setup,
            deadline=deadline,
            connect_options={"isolation_level": None},
        )


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
            left = time_left(deadline)
            patience = 2**31 - 1 if left is None else int(left * 1000)
            self._conn = conn = self._opener.open(deadline, read_only=False, busy_timeout=min(patience, 2**31 - 1))
            return conn
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

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
                    retire(conn)
            elif conn is not None:  # a child that was forked inside of the block
                fork.keep_forever(conn)
        finally:
            self._turn = None
            if turn is not None:
                turn.leave()
            self._claimants.remove(self)

    def enclosing(self, frame: FrameType | None) -> IsolatedBlock | None:
        """Return this block if it has the right to write, and provably encloses `frame`."""
        place, turn, stack = self._place, self._turn, set()
        while frame is not None:
            stack.add(id(frame))
            frame = frame.f_back
        return self if place is not None and place.encloses(stack) and turn is not None and turn.is_held else None


def back_up(
    opener: Opener,
    destination: str | os.PathLike[str] | sqlite3.Connection,
    progress: Callable[[int, int, int], object] | None,
    deadline: float | None,
) -> None:
    """Copy the database as it is now. See `Database.backup`."""
    source = opener.open(deadline, read_only=True)
    try:
        source.execute("BEGIN")
        source.read("SELECT 1 FROM sqlite_master LIMIT 1")  # from here on one snapshot, so that the copy never restarts
        if isinstance(destination, sqlite3.Connection):
            source.backup(destination, pages=_PAGES, progress=progress)
        else:
            _back_up_to_file(source, opener.target, os.path.abspath(os.fspath(destination)), progress)
    finally:
        retire(source)


def _back_up_to_file(source: Connection, target: Target, path: str, progress: Any) -> None:
    if target.file is not None and os.path.exists(path) and os.path.samefile(path, target.file):
        raise ValueError(f"a database cannot be its own backup: {path}")
    for journal in (f"{path}-wal", f"{path}-journal"):
        if os.path.exists(journal):
            raise FileExistsError(
                errno.EEXIST, "a database that is in use, or was not closed well, is not overwritten", journal
            )
    partial = f"{path}-partial"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
    try:
        with contextlib.closing(sqlite3.connect(partial)) as copy:
            source.backup(copy, pages=_PAGES, progress=progress)
        os.replace(partial, path)
    except BaseException:
        for left_over in (partial, f"{partial}-journal", f"{partial}-wal", f"{partial}-shm"):
            with contextlib.suppress(OSError):
                os.unlink(left_over)
        raise
