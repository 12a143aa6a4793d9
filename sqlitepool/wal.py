"""The write-ahead log (`-wal`): how large it is, and its checkpoints. https://www.sqlite.org/wal.html

SQLite copies the log into the database by itself, in the COMMIT that makes it longer than 1,000 pages, but starts the
file anew only when no reader needs it. With readers that come and go there may never be such a moment. So when the file
is too large, the writer waits a little for those who read: while it has the right to write and all is copied, new
readers need the log no more, and those before them end.

Every checkpoint passes the write gate, `close()` included, except where SQLite makes one for the last connection of a
file, which nobody else can have open. So no checkpoint ever overlaps a commit through the gate, which is what the
WAL-reset bug needs (3.7.0 to 3.51.2, see https://www.sqlite.org/wal.html#walresetbug).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from sqlitepool.database_pools import WriterTurn
from sqlitepool.lease import Lease
from sqlitepool.limits import NEVER
from sqlitepool.stats import LeaseInfo
from sqlitepool.tracking import Connection
from sqlitepool.writer import Writer, time_left

logger = logging.getLogger("sqlitepool")

#: Above this size (bytes) the log is cut with the next commit.
MOST_BYTES = 64 * 1024 * 1024
# How often the size is looked at, and how often it is tried again to cut the log when readers were in the way; how long
# the writer waits for them; how often that is logged. All in seconds.
_LOOK_EVERY, _TRY_EVERY, _PATIENCE, _SAY_EVERY = 0.1, 1.0, 0.05, 60.0
_PAUSE = 0.001

# Whoever was warned of for which file.
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """What a checkpoint came to.

    Attributes:
        is_complete: all of the log is in the database, and the log is empty.
        log_frames: how many pages the log holds.
        copied_frames: how many of them are in the database.
        blocked_by: if it is not complete, the reader of this process that has read for the longest time; None if the
            one that was in the way is not one of ours.
    """

    is_complete: bool
    log_frames: int
    copied_frames: int
    blocked_by: LeaseInfo | None


class Wal:
    """The log of one database.

    Args:
        writer: the one who may make checkpoints.
        file: the path of the database, None where there is no log.
        readers: tells who reads, the longest first.
    """

    def __init__(self, writer: Writer, file: str | None, readers: Callable[[], list[LeaseInfo]]) -> None:
        self._writer = writer
        self._path = None if file is None else f"{os.path.realpath(file)}-wal"
        self._readers = readers
        self._look_at = NEVER if file is None else -NEVER
        self._say_at = -NEVER

    def size(self) -> int:
        """Return the size of the log in bytes."""
        if self._path is None:
            return 0
        try:
            return os.stat(self._path).st_size
        except OSError:
            return 0

    def watch(self, conn: Connection) -> None:
        """Cut the log if it has become too large. Called by whoever has the right to write, after each commit.

        A failure is only logged: it must not look like one of the commit.
        """
        now = monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
        size = self.size()
        if size <= MOST_BYTES:
            return
        try:
            result = self._cut(conn, now + _PATIENCE)
        except sqlite3.Error:
            self._look_at = now + _TRY_EVERY
            logger.warning("the write-ahead log of %r could not be cut", self._writer.pool.name, exc_info=True)
            return
        self._look_at = monotonic() + (_LOOK_EVERY if result.is_complete else _TRY_EVERY)
        if not result.is_complete and now >= self._say_at:
            self._say_at = now + _SAY_EVERY
            logger.warning(
                "the write-ahead log of %r has %d bytes and cannot be cut: %s", self._writer.pool.name, size,
                "somebody outside of this process reads" if result.blocked_by is None else result.blocked_by,
            )  # fmt: skip

    def checkpoint(self, deadline: float | None) -> CheckpointResult:
        """Copy the log into the database and empty it; give way to writers while readers are in the way."""
        pause = _PAUSE
        while True:
            with WriterTurn(self._writer, deadline), Lease(self._writer.pool, time_left(deadline)) as conn:
                end = monotonic() + _PATIENCE
                result = self._cut(conn, end if deadline is None else min(end, deadline))
            left = time_left(deadline)
            if result.is_complete or left == 0:
                return result
            time.sleep(pause if left is None else min(pause, left))
            pause = min(pause * 2, _PATIENCE)

    def _cut(self, conn: Connection, deadline: float) -> CheckpointResult:
        while True:
            try:
                busy, log, copied = conn.read("PRAGMA wal_checkpoint(TRUNCATE)")[0]
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise
                busy, log, copied = 1, -1, -1
            if not busy:
                return CheckpointResult(True, max(log, 0), max(copied, 0), None)
            if monotonic() >= deadline:
                readers = self._readers()
                return CheckpointResult(False, max(log, 0), max(copied, 0), readers[0] if readers else None)
            time.sleep(_PAUSE)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Tell whether a version of SQLite can corrupt a database when a checkpoint overlaps a commit."""
    if version[:2] == (3, 50):
        return version < (3, 50, 7)
    if version[:2] == (3, 44):
        return version < (3, 44, 6)
    return (3, 7, 0) <= version <= (3, 51, 2)


def warn_of_wal_reset_bug(file: str) -> None:
    """Warn, once for each file: somebody writes to it who does not come through the gate."""
    if file in _warned or not has_wal_reset_bug(sqlite3.sqlite_version_info):
        return
    _warned.add(file)
    warnings.warn(
        f"{file} is written to by somebody who does not come through sqlitepool's write gate, and SQLite "
        f"{sqlite3.sqlite_version} can corrupt a database when a checkpoint overlaps such a commit "
        "(https://www.sqlite.org/wal.html#walresetbug): use SQLite 3.51.3 or later, or let all write through Database",
        RuntimeWarning,
        stacklevel=2,
    )
