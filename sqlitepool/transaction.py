"""One transaction on the writing connection: the right to write, the connection, BEGIN IMMEDIATE to COMMIT.

The order is always the same. The gate first, so that who waits has nothing that others need; then the connection, which
nobody else can have by then; then the lock of SQLite. Inside this process that lock is free by now; a process that does
not come through the gate may have it, so BEGIN is tried again until the deadline. `SQLITE_BUSY` never gets out of here.

How nothing is lost. The turn at the gate and the lease of the connection are attributes of the `Transaction`. A call
that is interrupted lets go of both; where it cannot, they die with the transaction, and gate and pool take back what
they lent. That is why the writer knows its transaction by a weak reference only.
"""

from __future__ import annotations

import sqlite3
import weakref
from time import monotonic
from types import FrameType

from sqlitepool import fork
from sqlitepool.cleaning import _close_handles as close_handles
from sqlitepool.errors import PoolTimeout, WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease
from sqlitepool.stats import MOST_PENDING
from sqlitepool.tracking import Connection
from sqlitepool.turn import Turn
from sqlitepool.writer import Place, Writer, insist, is_busy, time_left
from sqlitepool.writing_connection import BEGIN, COMMIT, ROLLBACK, lost

_SAVEPOINT, _RELEASE, _ROLL_BACK_TO = "SAVEPOINT sqlitepool", "RELEASE sqlitepool", "ROLLBACK TO sqlitepool"

_Cursor = sqlite3.Cursor  # `Connection.execute` would call the `cursor` method of our subclass


class Transaction:
    """One transaction. `begin` and `end` are a pair; between them `conn` is the connection.

    Attributes:
        blocks: the open blocks, the outermost first: each but the first is a savepoint.
        is_committed: COMMIT has succeeded.
    """

    __slots__ = (
        "__weakref__", "_cursor", "_is_committing", "_lease", "_patience", "_turn", "_writer", "blocks", "conn",
        "is_committed",
    )  # fmt: skip

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._turn: Turn | None = None
        self._lease: Lease[Connection] | None = None
        self._patience: float | None = None
        self._is_committing = False
        self.blocks: list[Place] = []
        self._cursor: sqlite3.Cursor | None = None
        self.conn: Connection | None = None
        self.is_committed = False

    # -- the whole of it

    def begin(self, timeout: float | None, since: float, frame: FrameType, place: Place) -> Connection:
        """Wait for the right to write, and begin.

        Args:
            timeout: for how long, in seconds, None for ever.
            since: from when on, on the clock of `time.monotonic()`.
            frame: who is named as the one that has the right to write.
            place: the outermost block.

        Raises:
            WriteTimeout: it could not be had in time.
        """
        writer = self._writer
        deadline = None if timeout is None else since + timeout
        self._patience = timeout
        try:
            conn = self._take_connection(deadline, frame)
            while conn is None:
                conn = self._take_connection(deadline, frame)
            self._cursor = cursor = _Cursor(conn)
            try:
                cursor.execute(BEGIN)
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                insist(cursor, BEGIN, deadline, self._why_no_begin, writer.on_busy)
            waits = writer.waits
            waits.append(monotonic() - since)
            if len(waits) > MOST_PENDING:
                writer.waits = waits.folded()
            self.blocks.append(place)
            writer._current = weakref.ref(self)
            return conn
        except BaseException:
            self.end()
            raise

    def _take_connection(self, deadline: float | None, frame: FrameType) -> Connection | None:
        """Take the right to write and the connection; None if the gate has to be passed again, being another."""
        writer = self._writer
        self._turn = turn = writer.gate.turn(deadline)
        try:
            turn.enter(frame)
        except WriteTimeout as error:
            raise WriteTimeout(f"{error}{writer.say_more()}") from None
        self._lease = lease = Lease(writer.pool, time_left(deadline))
        try:
            self.conn = conn = lease.__enter__()
        except sqlite3.OperationalError as error:  # it was opened just now
            if not is_busy(error):
                raise
            raise self._why_no_begin() from error
        slot = lease._slot
        assert slot is not None
        slot.code = frame.f_code
        slot.instruction = frame.f_lasti
        slot.frame = id(frame)
        if slot.checkouts == 1 and writer.has_moved():  # a new connection: to which file?
            self._let_go()
            return None
        return conn

    def end(self) -> None:
        """End what is left of the transaction: roll back what was not committed, give back what was taken."""
        self.blocks.clear()
        try:
            conn = self.conn
            if conn is not None and conn.in_transaction and self._is_ours():
                roll_back(conn)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self.conn = self._cursor = None
        try:
            lease, self._lease = self._lease, None
            if lease is not None:
                lease.__exit__(BaseException, None, None)  # so that nothing that was left open is committed
        finally:
            turn, self._turn = self._turn, None
            if turn is not None:
                turn.leave()

    def _is_ours(self) -> bool:
        """Tell whether the connection may be used: not in a child that was forked inside of the block."""
        if not same_process[0]:
            fork.start_anew()
        return self._turn is not None and self._turn.is_held

    # -- its parts

    @property
    def is_lost(self) -> bool:
        """SQLite has rolled it back by itself."""
        return self.conn is None or not self.conn.in_transaction

    def commit(self) -> None:
        """Commit.

        Raises:
            WriteTimeout: readers were in the way for too long (in WAL there are none that could be).
            sqlite3.Error: it failed. The transaction may still be open: `end` sees to that.
        """
        conn, cursor = self.conn, self._cursor
        if conn is None or cursor is None or not self._is_ours():
            return  # a forked child leaves its parent's block
        if not conn.in_transaction:
            raise lost()
        self._is_committing = True
        try:
            cursor.execute(COMMIT)
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            close_handles(conn)  # a half-read RETURNING makes COMMIT fail
            deadline = None if self._patience is None else monotonic() + self._patience
            insist(_Cursor(conn), COMMIT, deadline, self._why_no_commit)
        self.is_committed = True
        self._writer.commits += 1
        self._writer.watch(conn)

    def begin_again(self) -> None:
        """Roll back, and begin a new transaction in the same turn."""
        conn = self.conn
        assert conn is not None
        if conn.in_transaction:
            roll_back(conn)
        self._cursor = cursor = _Cursor(conn)
        insist(cursor, BEGIN, None if self._patience is None else monotonic() + self._patience, self._why_no_begin)

    def was_committed(self, error: BaseException) -> bool:
        """Tell whether it is committed, after `error` interrupted `commit`. Needs the connection."""
        if self.is_committed:
            return True
        if not self._is_committing or isinstance(error, sqlite3.Error | PoolTimeout):
            return False
        failed = isinstance(error.__context__, sqlite3.Error)
        return not failed and self.conn is not None and not self.conn.in_transaction

    def save(self, place: Place | None = None) -> None:
        """Set a savepoint, for a block inside."""
        conn = self.conn
        if conn is None or self._cursor is None or not conn.in_transaction:
            raise lost()
        self._cursor.execute(_SAVEPOINT)
        if place is not None:
            self.blocks.append(place)

    def release(self) -> None:
        """End the part since the last savepoint: keep it."""
        conn = self.conn
        if conn is None or self._cursor is None or not conn.in_transaction:
            raise lost()
        self._cursor.execute(_RELEASE)

    def undo(self) -> None:
        """End the part since the last savepoint: undo it. Nothing to do if the transaction is lost."""
        conn = self.conn
        if conn is not None and self._cursor is not None and conn.in_transaction:
            self._cursor.execute(_ROLL_BACK_TO)
            self._cursor.execute(_RELEASE)

    def break_up(self) -> None:
        """Roll all of it back, while blocks of it are still open: each of them will see that it is lost."""
        conn = self.conn
        if conn is not None and conn.in_transaction:
            roll_back(conn)

    # -- what to say

    def _why_no_begin(self) -> WriteTimeout:
        return WriteTimeout(
            f"the right to write to {self._writer.pool.name!r} could not be had in time: the lock of SQLite is held by "
            "somebody who does not come through the gate, another program or a connection of its own"
        )

    def _why_no_commit(self) -> WriteTimeout:
        return WriteTimeout(
            f"the transaction on {self._writer.pool.name!r} could not be committed in time, and was rolled back: "
            f"without WAL it has to wait for readers. {self._writer._blockers()}"
        )


def roll_back(conn: Connection) -> None:
    """End a transaction, and what is half read in it."""
    try:
        close_handles(conn)
        _Cursor(conn).execute(ROLLBACK)
    except sqlite3.Error:  # the pool will close a connection that it finds in this state
        pass
