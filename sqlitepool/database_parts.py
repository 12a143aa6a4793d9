"""What a `Database` is made of, and how its parts are opened together: here, and in a forked child."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from types import EllipsisType, FrameType
from typing import Any, Literal, TypeAlias

from sqlitepool import fork, limits
from sqlitepool.connection import normalise_path
from sqlitepool.connection_pool import ConnectionPool
from sqlitepool.errors import PoolClosed, PoolDeadlock
from sqlitepool.fork import same_process
from sqlitepool.group_commit import GroupCommit
from sqlitepool.lease import Lease
from sqlitepool.own_connection import Opener
from sqlitepool.tracking import Connection
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
        self._writers = self._make_pool(1, {"busy_timeout": 0}, factory=WritingConnection)
        self._writers._limits = replace(self._writers._limits, trusted_for=_TRUSTED_FOR)
        if target.file is not None and not os.path.exists(target.file):
            sqlite3.connect(target.database, uri=target.uri).close()
        self._readers = self._make_pool(self._max_readers, {}, read_only=True)
        self._writer = Writer(self._writers, target.file, self._say_who_reads)
        with self._writer.gate.turn(self._deadline(self._timeout)), self._writers.connection() as conn:
            self._has_wal = conn.read_pragma("journal_mode") == "wal"
        self._wal = Wal(self._writer, target.file if self._has_wal else None, self._readers.leases)
        if self._has_wal:
            self._writer.watch = self._wal.watch
            self._writer.on_busy = self._warn
        self._group = GroupCommit(self._writer, self._max_queue, self.name)

    def _make_pool(self, size: int, pragmas: Mapping[str, object], **options: Any) -> ConnectionPool[Connection]:
        opener = self._opener
        return ConnectionPool(
            opener.target.database,
            max_size=size,
            isolation_level=None,
            timeout=self._timeout,
            pragmas={**opener.pragmas, **pragmas},
            setup=opener.setup,
            if_replaced=self._if_replaced,
            name=self.name,
            **options,
        )

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

    def _refuse_to_wait_for_ourselves(self, frame: FrameType) -> None:
        if self._opener.target.memory and self._writer.enclosing(frame) is not None:
            raise PoolDeadlock(
                "a database in memory cannot be read while a write block is open, and this one encloses the call: "
                "read by the connection of the write block"
            )

    def _recover(self, deadline: float | None) -> None:
        """Have the writer read, which undoes what somebody who died left half done."""
        with self._writer.gate.turn(deadline), Lease(self._writers, time_left(deadline)) as conn:
            conn.read("SELECT 1 FROM sqlite_master LIMIT 1")

    def _say_who_reads(self) -> str:
        readers = self._readers.leases()
        return f"Reading: {readers[0]}" if readers else "Nobody in this process reads"

    def _warn(self) -> None:
        file = self._opener.target.file
        if file is not None:
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
