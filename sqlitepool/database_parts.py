"""What a `Database` is made of, and how its parts are opened together: here, and in a forked child."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from types import EllipsisType, FrameType
from typing import Any, Literal, TypeAlias

from sqlitepool import fork, limits
from sqlitepool.claimants import claimants_of
from sqlitepool.connection import normalise_path
from sqlitepool.database_file import is_inherited
from sqlitepool.database_pools import ReaderPool, WriterPool, WriterTurn
from sqlitepool.errors import FileReplaced, PoolClosed, PoolDeadlock, PoolTimeout, WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.group_commit import GroupCommit
from sqlitepool.lease import Lease
from sqlitepool.own_connection import Opener
from sqlitepool.reading_connection import ReadingConnection
from sqlitepool.waiting import locked
from sqlitepool.wal import Wal, warn_of_wal_reset_bug
from sqlitepool.writer import Writer, time_left
from sqlitepool.writing_connection import WritingConnection

Timeout: TypeAlias = float | EllipsisType | None

# Between two uses of the writing connection, if they are no longer apart (seconds), the file is not looked at.
_TRUSTED_FOR = 0.001


class DatabaseParts:
    """The pool of readers, the writer with its gate, the group commit and the log of one database."""

    def __init__(
        self,
        database: str | os.PathLike[str],
        readers: int,
        durable: bool,
        timeout: float | None,
        max_queue: int,
        pragmas: Mapping[str, object] | None,
        setup: Callable[[sqlite3.Connection], object] | None,
        if_replaced: Literal["reopen", "raise"],
        name: str | None,
    ) -> None:
        self._timeout = limits.optional_seconds("timeout", timeout)
        self._max_readers = limits.count("readers", readers, 1)
        self._max_queue = limits.count("max_queue", max_queue, 1)
        self._if_replaced: Literal["reopen", "raise"] = if_replaced
        target = normalise_path(database, read_only=False)
        self.name = name if name is not None else os.path.basename(target.file or str(database))
        self._opener = Opener(target, {"synchronous": "FULL" if durable else "NORMAL", **(pragmas or {})}, setup)
        self._is_closed = self._is_stale = False
        self._reopening = threading.RLock()
        self._open()
        fork.register(self)

    def _open(self) -> None:
        """Make the pools and open the writing connection, which makes the file what readers can open."""
        target = self._opener.target
        self._writers = WriterPool(max_size=1, factory=WritingConnection, **self._pool_options({"busy_timeout": 0}))
        self._writers._limits = replace(self._writers._limits, trusted_for=_TRUSTED_FOR)
        if target.file is not None and not os.path.exists(target.file):
            sqlite3.connect(target.database, uri=target.uri).close()
        self._writer = Writer(self._writers, target.file, self._say_who_reads)
        self._claimants = claimants_of(self._writer.gate)
        self._claimants.add(self._writer)
        with WriterTurn(self._writer, self._deadline(self._timeout)), self._writers.connection() as conn:
            self._has_wal = conn.read_pragma("journal_mode") == "wal"
        patience: dict[str, object] = {} if self._has_wal else {"busy_timeout": 0}  # we wait ourselves, see `ReadBlock`
        options = self._pool_options(patience)
        self._readers = ReaderPool(max_size=self._max_readers, read_only=True, factory=ReadingConnection, **options)
        self._readers.writers = self._writers
        self._readers.writer_first = self._writer_first
        self._wal = Wal(self._writer, target.file if self._has_wal else None, self._readers.leases)
        if self._has_wal:
            self._writer.watch = self._wal.watch
            self._writer.on_busy = self._warn
        self._group = GroupCommit(self._writer, self._max_queue, self.name)

    def _pool_options(self, pragmas: Mapping[str, object]) -> dict[str, Any]:
        opener = self._opener
        return {
            "database": opener.target.database,
            "isolation_level": None,
            "timeout": self._timeout,
            "pragmas": {**opener.pragmas, **pragmas},
            "setup": opener.setup,
            "if_replaced": self._if_replaced,
            "name": self.name,
        }

    def __repr__(self) -> str:
        return f"<Database {self.name!r}, {'closed' if self._is_closed else 'open'}>"

    def _check_open(self) -> None:
        if self._is_closed:
            raise self._closed()
        if not same_process[0]:
            fork.start_anew()
        if self._is_stale:
            locked(self._reopening, self._reopen)

    def _closed(self) -> PoolClosed:
        return PoolClosed(f"database {self.name!r} is closed")

    def _seconds(self, timeout: Timeout) -> float | None:
        return self._timeout if isinstance(timeout, EllipsisType) else limits.optional_seconds("timeout", timeout)

    def _deadline(self, seconds: float | None) -> float | None:
        return None if seconds is None else monotonic() + seconds

    def _is_enclosed(self, frame: FrameType) -> bool:
        """Tell whether a block that has the right to write provably encloses `frame`."""
        try:
            self._claimants.refuse_to_wait(frame, self._writer)
        except PoolDeadlock:
            return True
        return self._writer.enclosing(frame) is not None

    def _refuse_to_wait_for_ourselves(self, frame: FrameType) -> None:
        if self._opener.target.memory and self._writer.enclosing(frame) is not None:
            raise PoolDeadlock(
                "a database in memory cannot be read while a write block is open, and this one encloses the call: "
                "read by the connection of the write block"
            )

    def _recover(self, deadline: float | None) -> None:
        """Have the writer read, which undoes what somebody who died left half done."""
        with WriterTurn(self._writer, deadline), Lease(self._writers, time_left(deadline)) as conn:
            conn.read("SELECT 1 FROM sqlite_master LIMIT 1")

    def _writer_first(self, deadline: float | None) -> None:
        """Before a reader opens a connection: have the writer open the file that is there now, if it has another."""
        writers, writer = self._writers, self._writer
        if writers.has_current_file():
            return
        if self._is_enclosed(sys._getframe()):
            raise FileReplaced(
                f"the file of {self.name!r} was replaced while a block was open that writes, and encloses this call: "
                "the file that is there now can be read when that block has ended"
            )
        try:
            with WriterTurn(writer, deadline):
                if not writers.has_current_file():
                    writers.enter_current_file(deadline)
                    writer.has_moved()
        except WriteTimeout as error:
            raise PoolTimeout(f"the file of {self.name!r} was replaced, and cannot be opened yet: {error}") from error

    def _say_who_reads(self) -> str:
        readers = self._readers.leases()
        return f"Reading: {readers[0]}" if readers else "Nobody in this process reads"

    def _warn(self) -> None:
        file = self._opener.target.file
        if file is not None and not is_inherited(file):  # then it is the lock that we had at the fork
            warn_of_wal_reset_bug(os.path.realpath(file))

    def _start_anew(self) -> None:
        """In a forked child: files are opened anew by the pools themselves; a database in memory begins empty."""
        self._reopening = threading.RLock()
        self._is_stale = self._opener.target.memory and not self._is_closed

    def _reopen(self) -> None:
        """In a forked child: begin a new database in memory. The parent's connections are never touched."""
        if self._is_stale:
            self._opener = replace(self._opener, target=normalise_path(":memory:", read_only=False))
            self._open()
            self._is_stale = False
