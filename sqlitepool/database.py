"""`Database`: one writer and many readers of one SQLite database, for all threads of a process."""

from __future__ import annotations

import atexit
import contextlib
import os
import sqlite3
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Literal, Self, TypeVar, TypeVarTuple

from sqlitepool import limits
from sqlitepool.database_file import name_file
from sqlitepool.database_parts import DatabaseParts, Timeout
from sqlitepool.database_pools import WriterTurn
from sqlitepool.errors import PoolDeadlock, PoolError
from sqlitepool.job import Job, call
from sqlitepool.lease import Lease
from sqlitepool.own_connection import IsolatedBlock, back_up
from sqlitepool.read_block import ReadBlock, explain
from sqlitepool.statements import Parameters, WriteResult, execute_write, executemany_write
from sqlitepool.stats import DatabaseStats, LeaseInfo
from sqlitepool.wal import CheckpointResult
from sqlitepool.write_block import WriteBlock
from sqlitepool.writer import time_left

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

# How long the end of the program waits for what was submitted (seconds).
_PATIENCE_AT_EXIT = 10.0


class Database(DatabaseParts):
    """One SQLite database for all threads of a process: one of them writes at a time, the others read meanwhile.

        db = Database("app.db")
        with db.write() as conn:
            conn.execute("INSERT INTO visit (page) VALUES (?)", (page,))
        with db.read() as conn:
            visits, pages = count_visits(conn), list_pages(conn)     # both of the same moment
        rows = db.execute("SELECT * FROM visit WHERE page = ?", (page,))

    Think of a register with one pen: who wants to write queues for the pen, and everybody may look at what is written.
    "database is locked" never comes out of here. Writers are served in order, between processes too (see `gate.py`),
    and who waits in vain gets `WriteTimeout`, which names the one that has the pen.

    Many small writes are quickest as functions: `run_write` and `submit` commit the work of many callers at once.

    Args:
        database: a path, a `file:` URI, or ":memory:". The file is created if there is none.
        readers: the most connections for reading.
        durable: what a power cut may take. False (`synchronous=NORMAL`): the last commits may be gone, in order, and
            what is there is whole. True (`FULL`): nothing that was committed is lost, and a commit waits for the disk.
            The end of the process, even by SIGKILL, takes nothing that was committed in either case.
        timeout: how long, in seconds, a caller waits for a connection or for the right to write (None: for ever; 0:
            tries once), and a job in the queue for its beginning. Methods that take a `timeout` have `...` for this one
            as the default, which `help` shows as `Ellipsis`.
        max_queue: the most jobs that may be queued by `run_write`, `submit` and `execute_write`; who comes then waits.
        pragmas: PRAGMAs for each connection, over the defaults of `sqlitepool.connection`, by name.
        setup: called with each new connection, reading or writing, before it is used: to register functions and so on.
            A reading one cannot create tables: do that in `write()`.
        if_replaced: as in `ConnectionPool`.
        name: stands in errors, statistics and the names of threads; the file's name unless given.

    Raises:
        What `ConnectionPool` raises, and what opening the first connection raises.

    Without WAL (`pragmas={"journal_mode": "delete"}`) a COMMIT waits until nobody reads, and readers wait while it
    writes. `durable` is not quite enough there: a power cut right after a COMMIT can bring its journal back, which
    undoes it. Use `"synchronous": "EXTRA"` (https://www.sqlite.org/pragma.html#pragma_synchronous). In memory nobody
    reads while a write block is open, so `read()` inside of `write()` is refused there.
    """

    def __init__(
        self,
        database: str | os.PathLike[str],
        *,
        readers: int = 4,
        durable: bool = False,
        timeout: float | None = 30.0,
        max_queue: int = 1000,
        pragmas: Mapping[str, object] | None = None,
        setup: Callable[[sqlite3.Connection], object] | None = None,
        if_replaced: Literal["reopen", "raise"] = "reopen",
        name: str | None = None,
    ) -> None:
        super().__init__(database, readers, durable, timeout, max_queue, pragmas, setup, if_replaced, name)
        _databases.add(self)

    # -- reading

    def read(self, *, timeout: Timeout = ..., time_limit: float | None = None) -> ReadBlock:
        """Return a block for reading. All its statements see the same snapshot of the database.

            with db.read(time_limit=2.0) as conn:
                ...

        With WAL the snapshot is that of the first statement. Inside of a write block the connection is another one,
        and sees what was committed before.

        Args:
            timeout: seconds to wait for a connection, instead of the database's own; None: for ever; 0: try once.
            time_limit: seconds after which a statement of the block is interrupted; None: never.

        Raises (when the block begins):
            PoolTimeout: no connection came free in time, or, without WAL, a writer was in the way.
            PoolDeadlock: every connection is held by a block of a thread that waits for one.
            PoolClosed: the database is closed.

        Raises (when it ends):
            QueryTimeout: a statement was interrupted for the time limit, and the block did not catch that.
            sqlite3.OperationalError: a statement tried to write; the message says what to use instead. Or the snapshot
                was ended in the block, in a way that could not be refused.
        """
        limits.timeout(timeout)
        limits.optional_seconds("time_limit", time_limit)
        self._check_open()
        self._refuse_to_wait_for_ourselves(sys._getframe())
        return ReadBlock(self._readers, timeout, time_limit, not self._has_wal, self._recover)

    def execute(
        self, sql: str, parameters: Parameters = (), *, timeout: Timeout = ..., time_limit: float | None = None
    ) -> list[Any]:
        """Run one statement that reads, and return its rows. The arguments and errors are those of `read`.

        Example::

            for (title,) in db.execute("SELECT title FROM page WHERE id = ?", (7,)):
                ...
        """
        if time_limit is not None or not self._has_wal:
            with self.read(timeout=timeout, time_limit=time_limit) as conn:
                return conn.execute(sql, parameters).fetchall()
        self._check_open()
        try:
            with self._readers.connection(timeout) as conn:
                return conn.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            explain(error, None, self._opener.target.file)
            raise

    # -- writing

    def write(self, *, timeout: Timeout = ...) -> WriteBlock:
        """Return a block for writing: one transaction, committed at the end, or rolled back if the block raises.

            with db.write() as conn:
                conn.execute("UPDATE account SET balance = balance - 10 WHERE id = 1")
                conn.execute("UPDATE account SET balance = balance + 10 WHERE id = 2")

        A write block inside of another one of this database is a savepoint: it can fail without the outer one, and is
        committed with it. It is inside where the function that entered the outer block, by a `with` statement, is
        calling. A block in a suspended generator or coroutine is never joined, and to wait for it ends in
        `WriteTimeout`.

        The transaction is ended by the block alone: `commit()`, `rollback()` and their SQL are refused inside.
        `executescript` runs its statements in the transaction.

        Args:
            timeout: seconds to wait for the right to write, instead of the database's own; None: for ever; 0: try
                once. Without WAL, as long again for readers when it is committed.

        Raises (when the block begins):
            WriteTimeout: the right to write could not be had in time. Names who has it.
            PoolDeadlock: a block encloses this one that has the right to write and cannot be joined: `isolated()`, or a
                write block of another `Database` on the same file.
            PoolClosed: the database is closed.

        Raises (when it ends):
            sqlite3.Error: COMMIT failed, or SQLite had rolled the transaction back; nothing was written.
        """
        self._check_open()
        return WriteBlock(self._writer, self._seconds(timeout), self._claimants)

    def execute_write(self, sql: str, parameters: Parameters = ()) -> WriteResult:
        """Run one statement that writes, in a group commit; return what it did, after the COMMIT.

        Example::

            number = db.execute_write("INSERT INTO page (title) VALUES (?)", ("Home",)).lastrowid

        Raises:
            As `run_write`.
        """
        return self._run(execute_write, (sql, parameters), True, sys._getframe())  # type: ignore[no-any-return]

    def executemany_write(self, sql: str, rows: Iterable[Parameters]) -> int:
        """Run one statement for each of `rows`, all of them or none, in a group commit; return the row count.

        Args:
            sql: an INSERT, UPDATE, DELETE or REPLACE.
            rows: the parameters. Read to their end before anything is written.

        Raises:
            As `run_write`.
        """
        return self._run(executemany_write, (sql, list(rows)), False, sys._getframe())  # type: ignore[no-any-return]

    def run_write(self, fn: Callable[[sqlite3.Connection, *Ts], R], *args: *Ts) -> R:
        """Return `fn(conn, *args)`, called in a group commit, after the COMMIT. Many callers share one commit.

            def add_visit(conn, page):
                return conn.execute("INSERT INTO visit (page) VALUES (?)", (page,)).lastrowid

            number = db.run_write(add_visit, "/")

        `fn` is all or nothing: if it raises, what it did is undone, and this call raises the same. It may run more than
        once, when the commit of all failed or another function ended the transaction of all, and it may run on another
        caller's thread: so it must do nothing but write to the database, and be quick. What it returns must not be a
        cursor. Inside of a write block it is a savepoint of that block, and is committed with it.

        Raises:
            WriteTimeout: `fn` could not be begun within the database's `timeout`.
            PoolDeadlock: as in `write`.
            PoolFull: the queue is full, and only the caller itself can make room.
            PoolClosed: the database is closed.
            sqlite3.Error: COMMIT failed; nothing of `fn` was written.
            Exception: whatever `fn` raised.

        A caller that is interrupted (Ctrl-C) reads in a note to the exception whether its write was committed.
        """
        return self._run(fn, args, False, sys._getframe())  # type: ignore[no-any-return]

    def submit(self, fn: Callable[[sqlite3.Connection, *Ts], R], *args: *Ts) -> Future[R]:
        """Queue `fn(conn, *args)` for a group commit; return its future, which is done after the COMMIT.

        Like `run_write`, without waiting. What one thread submits is run in this order. The future can be cancelled
        until `fn` is begun. Callbacks of the future run on a thread of the database, and must not wait.

        Never wait for the future inside of a write block: the function runs when that has ended. What was submitted is
        run before the program ends, if that takes no longer than ten seconds; `close()` waits for it.

        Raises:
            WriteTimeout: the queue was full for the database's `timeout`.
            PoolFull: the queue is full, and only the caller itself can make room.
            PoolClosed: the database is closed.
        """
        self._check_open()
        return self._group.submit(Job(fn, args, self._timeout))

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], is_atomic: bool, frame: FrameType) -> Any:
        self._check_open()
        frame = frame.f_back or frame  # there is no caller in Python where C calls, as `atexit` does
        writer = self._writer
        if writer.enclosing(frame) is not None:
            with WriteBlock(writer, None, self._claimants) as conn:
                return call(fn, conn, args)
        if len(self._claimants.known) > 1:
            self._claimants.refuse_to_wait(frame, writer)
        return self._group.run(Job(fn, args, self._timeout, is_atomic), frame)

    # -- the whole database

    def isolated(self, *, timeout: Timeout = ...) -> IsolatedBlock:
        """Return a block with a connection of its own, closed at the end: for VACUUM, ATTACH, migrations.

            with db.isolated() as conn:
                conn.execute("VACUUM")

        The connection is in autocommit mode: begin and end transactions as you like. What is open at the end is
        committed, or rolled back if the block raises. The right to write is held all along the block.

        Args:
            timeout: seconds to wait for the right to write, and for locks; as in `write`.

        Raises (when the block begins):
            WriteTimeout: the right to write could not be had in time.
            PoolDeadlock: a write block, or another isolated one, encloses this one.
            FileReplaced: the file was replaced, by option.
            PoolClosed: the database is closed.
        """
        self._check_open()
        return IsolatedBlock(self._writer, self._opener, self._seconds(timeout), self._claimants)

    def backup(
        self,
        dest: str | os.PathLike[str] | sqlite3.Connection,
        *,
        progress: Callable[[int, int, int], object] | None = None,
    ) -> None:
        """Copy the database as it is at this moment, while others go on reading and writing.

        A file is replaced at one stroke when the copy is complete. With WAL the log grows while a backup runs; without
        it, nothing can be committed meanwhile.

        Args:
            dest: the path of a file (or a `file:` URI), or an open connection, whose database is overwritten.
            progress: called after each 1,000 pages, as by `sqlite3.Connection.backup`: status, remaining, total pages.

        Raises:
            FileExistsError: a database at `dest` is in use (there is a journal beside it, or somebody has a lock on
                it), or was not closed well.
            FileNotFoundError, IsADirectoryError: the folder of `dest` is missing, or `dest` is one.
            ValueError: `dest` is the file of this database, or one in memory.
            FileReplaced: the file was replaced: by option, or if a write block encloses this call that is still on the
                old one.
            PoolClosed: the database is closed.
        """
        self._check_open()
        self._refuse_to_wait_for_ourselves(sys._getframe())
        try:
            back_up(self._readers, dest, progress, self._deadline(self._timeout))
        except sqlite3.Error as error:
            name_file(
                error,
                self._opener.target.file,
                "in a backup" + ("" if isinstance(dest, sqlite3.Connection) else f" to {os.fspath(dest)}"),
            )
            raise

    def checkpoint(self, *, timeout: Timeout = ...) -> CheckpointResult:
        """Copy the write-ahead log into the database and empty it. There is rarely a need: see `wal.py`.

        Readers that still need the log are waited for; meanwhile others may write.

        Args:
            timeout: seconds to wait, as in `write`.

        Returns:
            What it came to, and who was in the way. Without WAL there is nothing to do.

        Raises:
            WriteTimeout: the right to write could not be had in time.
            PoolDeadlock: a write block, or an isolated one, encloses this call.
            PoolClosed: the database is closed.
        """
        self._check_open()
        if self._is_enclosed(sys._getframe()):
            raise PoolDeadlock("db.checkpoint() inside a write block would wait for that block to end")
        if not self._has_wal:
            return CheckpointResult(True, 0, 0, None)
        try:
            return self._wal.checkpoint(self._deadline(self._seconds(timeout)))
        except sqlite3.Error as error:
            name_file(error, self._opener.target.file, "in a checkpoint")
            raise

    def stats(self) -> DatabaseStats:
        """Describe the database at this moment."""
        writer, group = self._writer, self._group
        return DatabaseStats(
            name=self.name,
            readers=self._readers.stats(),
            commits=writer.commits,
            batches=group.batches,
            jobs=group.jobs,
            queued=group.queued,
            wait_seconds=writer.waits.durations(),
            job_wait_seconds=group.waits.durations(),
            gate_waiting=writer.gate.waiting(),
            holder=writer.holder(),
            wal_bytes=self._wal.size(),
        )

    def close(self, timeout: Timeout = ...) -> list[LeaseInfo]:
        """Close the database: refuse new work, finish what is queued, let SQLite optimize, close all connections.

        May be called again, and from any thread. What is lent is closed on its return.

        Args:
            timeout: seconds to wait for queued jobs, for the right to write and for lent connections, instead of the
                database's own; None: for ever. What is still queued then fails with `PoolClosed`.

        Returns:
            The connections still out, empty if all came back. Then no `-wal` file is left either.
        """
        limits.timeout(timeout)
        deadline = self._deadline(self._seconds(timeout))
        if self._is_enclosed(sys._getframe()):
            deadline = monotonic()  # what ends only after this call is not waited for
        self._is_closed = True
        self._writer.close(self._closed)
        if not self._group.flush(deadline):
            self._group.abandon(self._closed)
        self._group.end()
        still_out = self._readers.close(time_left(deadline))
        if self._writers.stats().size:  # not in a forked child, which has opened nothing
            with contextlib.suppress(PoolError), WriterTurn(self._writer, deadline, is_last=True):
                with contextlib.suppress(PoolError, sqlite3.Error), Lease(self._writers, time_left(deadline)) as conn:
                    conn.read("PRAGMA optimize")
                self._writers.close()
        return still_out + self._writers.close(time_left(deadline))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()


@atexit.register
def _finish_what_was_submitted() -> None:
    deadline = monotonic() + _PATIENCE_AT_EXIT
    for database in list(_databases):
        database._group.flush(deadline)
