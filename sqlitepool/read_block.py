"""`with db.read() as conn`: a read-only connection, and one snapshot of the database for the whole block."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from time import monotonic
from types import EllipsisType, TracebackType

from sqlitepool.claimants import caller
from sqlitepool.connection_pool import ConnectionPool
from sqlitepool.database_file import name_file
from sqlitepool.errors import PoolTimeout, QueryTimeout
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease, note_place
from sqlitepool.reading_connection import BEGIN, ROLLBACK
from sqlitepool.time_limit import TimeLimit
from sqlitepool.tracking import Connection
from sqlitepool.writer import insist, is_busy, time_left

_execute = sqlite3.Connection.execute
_LOOK = "SELECT 1 FROM sqlite_master LIMIT 1"


class ReadBlock(Lease[Connection]):
    """One read block. Made by `Database.read`; to be entered once at a time.

    Args:
        at_once: begin the snapshot with the block, and wait for the lock there: without WAL a writer may have it.
        recover: called, with the deadline, to have a writer undo what one that died left half done.
    """

    __slots__ = ("_at_once", "_limit", "_recover", "_time_limit")

    def __init__(
        self,
        pool: ConnectionPool[Connection],
        timeout: float | EllipsisType | None,
        time_limit: float | None,
        at_once: bool,
        recover: Callable[[float | None], object],
    ) -> None:
        super().__init__(pool, timeout)
        self._at_once = at_once
        self._recover = recover
        self._time_limit = time_limit
        self._limit: TimeLimit | None = None

    def __enter__(self) -> Connection:
        since = monotonic()
        try:
            conn = super().__enter__()
        except sqlite3.Error as error:
            explain(error, None, self._file())
            raise
        try:
            slot = self._slot
            assert slot is not None
            frame = caller(sys._getframe(1))
            note_place(slot, frame)
            slot.frame = id(frame)
            _execute(conn, BEGIN)
            if self._at_once:
                timeout = self._pool._limits.timeout if isinstance(self._timeout, EllipsisType) else self._timeout
                self._take_snapshot(conn, None if timeout is None else since + timeout)
            if self._time_limit is not None:
                self._limit = limit = TimeLimit(conn, self._time_limit)
                limit.start()
            return conn
        except BaseException:
            slot = None
            self.__exit__(*sys.exc_info())
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        limit, self._limit = self._limit, None
        is_whole = True
        try:
            if limit is not None:
                limit.end()
            slot = self._slot
            if slot is not None and same_process[0]:
                if slot.base.in_transaction:
                    _execute(slot.base, ROLLBACK)
                else:  # without a loan it is a child's that was forked inside of the block
                    is_whole = not slot.loan
        except sqlite3.Error:  # closed by its borrower, or the like: the pool sees to it
            pass
        finally:
            slot = None
            super().__exit__(kind, error, traceback)
        if error is not None:
            explain(error, limit, self._file())
        elif not is_whole:
            raise sqlite3.OperationalError(
                "the snapshot of this read block was ended inside of it, by its code or by an error that it caught: "
                "its statements need not have seen the same moment"
            )

    def _file(self) -> str | None:
        return self._pool._target.file if isinstance(self._pool, ConnectionPool) else None

    def _take_snapshot(self, conn: Connection, deadline: float | None) -> None:
        """Read something, when no writer is in the way."""
        cursor = sqlite3.Cursor(conn)
        while True:
            try:
                insist(cursor, _LOOK, deadline, self._why_not)
                return
            except sqlite3.OperationalError as error:
                # There is a journal that only a writer can undo: its process died, or ends the journal this very moment
                if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK or time_left(deadline) == 0:
                    raise
            self._recover(deadline)

    def _why_not(self) -> PoolTimeout:
        return PoolTimeout(
            f"the lock for reading {self._pool.name!r} could not be had in time: without WAL, who writes keeps others "
            "from reading"
        )


def explain(error: BaseException, limit: TimeLimit | None, file: str | None) -> None:
    """Say in `error` what to do, if it came from a reader that wrote; raise ours if it was a time limit, or a lock."""
    name_file(error, file, "while reading")
    code = getattr(error, "sqlite_errorcode", None)
    if code is None or not isinstance(error, sqlite3.OperationalError):
        return
    if code == sqlite3.SQLITE_INTERRUPT and limit is not None and limit.has_passed:
        raise QueryTimeout(f"the query ran longer than its time limit of {limit.seconds} s") from error
    if is_busy(error):
        raise PoolTimeout(f"a lock for reading could not be had in time: {error}") from error
    if code & 0xFF == sqlite3.SQLITE_READONLY:
        error.args = (f"{error} (this connection only reads: use db.write(), execute_write() or run_write())",)
