"""One transaction on the writing connection: the right to write, the connection, BEGIN IMMEDIATE to COMMIT.

The order is always the same. The gate first, so that who waits has nothing that others need; then the connection, which
nobody else can have by then; then the lock of SQLite. Inside this process that lock is free by now; a process that does
not come through the gate may have it, so BEGIN is tried again until the deadline. `SQLITE_BUSY` never gets out of here.

How nothing is lost. A `Transaction` is its turn at the gate. It has the token, and the token has the loan of the
connection. A call that is interrupted lets go of both; where it cannot, they die with the transaction, and gate and
pool take back what they lent. That is why the writer knows its transaction by a weak reference only.

How it is quick. After a COMMIT the connection, proved clean, stays with the token, and is there for the transaction
after it. Whoever takes a turn for something else has it returned to the pool first (`Turn.enter`).
"""

from __future__ import annotations

import sqlite3
import weakref
from time import monotonic
from types import FrameType

from sqlitepool import fork
from sqlitepool.cleaning import clean, close_handles
from sqlitepool.database_file import is_inherited
from sqlitepool.errors import PoolTimeout, WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease, enter_thread, here
from sqlitepool.tracking import Connection
from sqlitepool.turn import Token, Turn
from sqlitepool.writer import Block, Place, Writer, insist, is_busy, time_left
from sqlitepool.writing_connection import BEGIN, COMMIT, ROLLBACK, lost, own_cursor

_SAVEPOINT, _RELEASE, _ROLL_BACK_TO = "SAVEPOINT sqlitepool", "RELEASE sqlitepool", "ROLLBACK TO sqlitepool"

_Cursor = sqlite3.Cursor  # `Connection.execute` would call the `cursor` method of our subclass


class Transaction(Turn, Block):
    """One transaction. `begin` and `end` are a pair; between them `conn` is the connection.

    It is the place of its outermost block as well.

    Args:
        writer: where it is to be made.
        timeout: for how long, in seconds, it may wait for its beginning, and for its end; None for ever.

    Attributes:
        conn: the connection, None while there is none.
        frame: the `id` of the frame of the outermost block, 0 if no block is open.
        inner: the open blocks that are savepoints, the outermost first.
        is_committed: COMMIT has succeeded.
    """

    __slots__ = (
        "__weakref__", "_is_committing", "_timeout", "_writer", "code", "conn", "frame", "inner", "instruction",
        "is_certain", "is_committed",
    )  # fmt: skip

    def __init__(self, writer: Writer, timeout: float | None) -> None:
        self._writer = writer
        self._timeout = timeout
        self._token = None
        self._is_committing = False
        self.conn: Connection | None = None
        self.frame = 0
        self.is_certain = False
        self.inner: tuple[Place, ...] = ()
        self.is_committed = False

    # -- the whole of it

    def begin(self, frame: FrameType, since: float | None = None, block: FrameType | None = None) -> Connection:
        """Wait for the right to write, and begin.

        Args:
            frame: who is named as the one that has the right to write.
            since: from when on the time is counted, on the clock of `time.monotonic()`; from now on by default.
            block: the frame that will end the transaction for sure; by default it is the `with` block of `frame`.

        Raises:
            WriteTimeout: it could not be had in time.
        """
        if since is None:
            since = monotonic()
        while True:
            conn = self.try_to_begin(frame, since, block)
            if conn is not None:
                return conn

    def try_to_begin(
        self, frame: FrameType, since: float, block: FrameType | None = None, wait: bool = True
    ) -> Connection | None:
        """Begin as `begin` does; None if the gate has to be passed again, being another, or if it would take a `wait`
        that is not wanted.
        """
        writer = self._writer
        self._gate = gate = writer.gate
        try:
            try:
                token = self._take(since, self._timeout, wait)
            except WriteTimeout as error:
                raise WriteTimeout(f"{error}{writer.say_more()}") from None
            if token is None:
                return None
            if writer.gate is not gate:  # the file was replaced while we waited: to the gate of the new one
                self.leave()
                return None
            began = token.since
            if began >= writer.trusted_until and not writer.look_around(began):
                token.clean_for = None
            if token.clean_for is writer.pool:
                token.clean_for = None
            elif not self._take_connection(token, frame, since):
                return None
            slot, cursor = token.slot, token.cursor
            assert slot is not None
            assert cursor is not None
            slot.code = self.code = frame.f_code
            slot.instruction = self.instruction = frame.f_lasti
            try:
                slot.borrower = here.borrower
            except AttributeError:
                slot.borrower = enter_thread()
            conn: Connection = slot.item
            self.conn = conn
            try:
                cursor.execute(BEGIN)
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                insist(cursor, BEGIN, self._deadline_from(since), self._why_no_begin, writer.on_busy)
                token.since = began = monotonic()
            writer.waits.append(began - since)
            if block is not None:
                frame = block
                self.is_certain = True
            self.frame = id(frame)
            writer._current = weakref.ref(self)
            return conn
        except BaseException:
            self.end()
            raise

    def _deadline_from(self, since: float) -> float | None:
        return None if self._timeout is None else since + self._timeout

    def _take_connection(self, token: Token, frame: FrameType, since: float) -> bool:
        """Take the connection from its pool; not, and without the right to write, if it leads to another file."""
        writer = self._writer
        token.return_connection()
        token.note(frame)
        token.connection = lease = Lease(writer.pool, time_left(self._deadline_from(since)))
        try:
            conn = lease.__enter__()
        except sqlite3.OperationalError as error:  # it was opened just now
            if not is_busy(error):
                raise
            raise self._why_no_begin() from error
        token.slot = slot = lease._slot
        assert slot is not None
        slot.frame = 0  # nobody can wait for it in a block that it encloses
        if slot.checkouts == 1 and writer.has_moved():  # a new connection: to which file?
            token.return_connection()
            self.leave()
            return False
        token.cursor = own_cursor(conn)
        return True

    def end(self) -> None:
        """End what is left of the transaction: roll back what was not committed, give back what was taken."""
        self.frame = 0
        self.inner = ()
        token = self._token
        if token is None:
            return
        is_kept = False
        try:
            conn = self.conn
            if conn is not None:
                self.conn = None
                pool, slot = self._writer.pool, token.slot
                if self.is_committed and slot is not None and not pool._attention and clean(conn):
                    slot.borrower = None  # it is in nobody's hands
                    token.clean_for = pool
                    is_kept = True
                elif conn.in_transaction and self._is_ours():
                    roll_back(conn)
        finally:
            try:
                if not is_kept:
                    token.return_connection()
            finally:
                token = None
                self.leave()

    def _is_ours(self) -> bool:
        """Tell whether the connection may be used: not in a child that was forked inside of the block."""
        if not same_process[0]:
            fork.start_anew()
        return self.is_held

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
        conn, token = self.conn, self._token
        if not same_process[0]:
            fork.start_anew()
        if conn is None or token is None or token.is_inherited:
            return  # a forked child leaves its parent's block
        if not conn.in_transaction:
            raise lost()
        cursor = token.cursor
        assert cursor is not None
        self._is_committing = True
        try:
            cursor.execute(COMMIT)
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            close_handles(conn)  # a half-read RETURNING makes COMMIT fail
            insist(cursor, COMMIT, self._deadline_from(monotonic()), self._why_no_commit)
        self.is_committed = True
        writer = self._writer
        writer.commits += 1
        if writer.is_watch_due:
            writer.is_watch_due = False
            writer.watch(conn)

    def begin_again(self) -> None:
        """Roll back, and begin a new transaction in the same turn."""
        conn = self.conn
        assert conn is not None
        if conn.in_transaction:
            roll_back(conn)
        insist(_Cursor(conn), BEGIN, self._deadline_from(monotonic()), self._why_no_begin)

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
        self._execute(_SAVEPOINT)
        if place is not None:
            self.inner += (place,)

    def release(self) -> None:
        """End the part since the last savepoint: keep it."""
        self._execute(_RELEASE)

    def undo(self) -> None:
        """End the part since the last savepoint: undo it. Nothing to do if the transaction is lost."""
        if not self.is_lost:
            self._execute(_ROLL_BACK_TO)
            self._execute(_RELEASE)

    def _execute(self, sql: str) -> None:
        conn, token = self.conn, self._token
        if conn is None or token is None or token.cursor is None or not conn.in_transaction:
            raise lost()
        token.cursor.execute(sql)

    def break_up(self) -> None:
        """Roll all of it back, while blocks of it are still open: each of them will see that it is lost."""
        conn = self.conn
        if conn is not None and conn.in_transaction:
            roll_back(conn)

    # -- what to say

    def _why_no_begin(self) -> WriteTimeout:
        file = self._gate.database
        if file is not None and is_inherited(file):
            who = "the process that forked this one, which was writing at that moment, or by somebody who does"
        else:
            who = "somebody who does"
        return WriteTimeout(
            f"the right to write to {self._writer.pool.name!r} could not be had in time: the lock of SQLite is held by "
            f"{who} not come through the gate, another program or a connection of its own"
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
