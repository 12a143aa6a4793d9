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
from sqlitepool.cleaning import clean, close_handles, is_closed, open_handles
from sqlitepool.database_file import is_inherited
from sqlitepool.errors import PoolClosed, PoolTimeout, WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease, enter_thread, here
from sqlitepool.limits import NEVER
from sqlitepool.tracking import Connection
from sqlitepool.turn import Token, Turn
from sqlitepool.writer import TRUSTED_AT_REST, Block, Place, Writer, insist, is_busy, time_left
from sqlitepool.writing_connection import BEGIN, COMMIT, ROLLBACK, ROLLED_BACK, closed, ended, lost, own_cursor

_SAVEPOINT, _RELEASE, _ROLL_BACK_TO = "SAVEPOINT sqlitepool", "RELEASE sqlitepool", "ROLLBACK TO sqlitepool"

# Errors on which SQLite rolls back by itself, wherever they come up: https://www.sqlite.org/lang_transaction.html
_ROLL_BACK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT)

_close_cursor = sqlite3.Cursor.close
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

    def refusal(self) -> Exception | None:
        """Make the error for one that comes when the database is closed: see `Turn.refusal`."""
        return self._writer.refusal(is_queued=True)

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
            if (began >= writer.look_at or began >= writer.trusted_until) and not writer.look_around(began):
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
        except PoolClosed as error:
            raise self.refusal() or error from None
        except PoolTimeout as error:  # a block that nobody ended has it
            raise WriteTimeout(f"the right to write is there, but not the connection: {error}") from error
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
                writer = self._writer
                writer.look_at = NEVER if self._gate._line else monotonic() + TRUSTED_AT_REST
                pool, slot = writer.pool, token.slot
                if self.is_committed and slot is not None and not pool._attention and clean(conn):
                    slot.borrower = None  # it is in nobody's hands
                    token.clean_for = pool
                    is_kept = True
                else:
                    conn.touched.discard(ROLLED_BACK)  # has been dealt with
                    if not is_at_rest(conn) and self._is_ours():
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
        """SQLite has rolled it back by itself, or somebody has ended it past us."""
        return self.conn is None or is_at_rest(self.conn)

    def why_lost(self, error: BaseException | None = None) -> tuple[sqlite3.Error, bool]:
        """Make the error for one that is lost, and tell whether it was rolled back for sure.

        Args:
            error: what the block or function has raised.
        """
        conn = self.conn
        if conn is None:
            return lost(), True
        if is_closed(conn) or "init" in conn.touched:
            return closed(), True
        if ROLLED_BACK in conn.touched or getattr(error, "sqlite_errorcode", 0) & 0xFF in _ROLL_BACK:
            return lost(), True
        return ended(), False

    def note_loss(self, error: BaseException) -> bool:
        """Note in the error of who has lost the transaction if others may be committed; tell whether it is undone."""
        why, is_undone = self.why_lost(error)
        if not is_undone and str(why) != str(error):
            error.add_note(f"sqlitepool: {why}")
        return is_undone

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
            raise self.why_lost()[0]
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
        if not is_at_rest(conn):
            roll_back(conn)
        insist(_Cursor(conn), BEGIN, self._deadline_from(monotonic()), self._why_no_begin)

    def was_committed(self, error: BaseException) -> bool:
        """Tell whether it is committed, after `error` interrupted `commit`. Needs the connection."""
        if self.is_committed:
            return True
        if not self._is_committing or isinstance(error, sqlite3.Error | PoolTimeout):
            return False
        failed = isinstance(error.__context__, sqlite3.Error)
        return not failed and self.conn is not None and is_at_rest(self.conn)

    def save(self, place: Place | None = None) -> None:
        """Set a savepoint, for a block inside."""
        try:
            self._execute(_SAVEPOINT)
        except sqlite3.OperationalError as error:
            if place is not None or self.conn is None or not is_busy(error):
                raise
            close_handles(self.conn)  # the function before this one has left something half read
            self._execute(_SAVEPOINT)
        if place is not None:
            self.inner += (place,)

    def release(self) -> None:
        """End the part since the last savepoint: keep it."""
        try:
            self._execute(_RELEASE)
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            self._release_half_read()

    def _release_half_read(self) -> None:
        """Release where a half-read RETURNING is in the way: close the youngest cursor, until there is none."""
        assert self.conn is not None
        cursors = [handle for handle in open_handles(self.conn) if isinstance(handle, sqlite3.Cursor)]
        while cursors:
            _close_cursor(cursors.pop())
            try:
                self._execute(_RELEASE)
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error) or not cursors:
                    raise

    def undo(self) -> None:
        """End the part since the last savepoint: undo it. Nothing to do if the transaction is lost."""
        if not self.is_lost:
            self._execute(_ROLL_BACK_TO)
            self._execute(_RELEASE)

    def _execute(self, sql: str) -> None:
        conn, token = self.conn, self._token
        if conn is None or token is None or token.cursor is None or is_at_rest(conn):
            raise lost()
        token.cursor.execute(sql)

    def break_up(self) -> None:
        """Roll all of it back, while blocks of it are still open: each of them will see that it is lost."""
        conn = self.conn
        if conn is not None and not is_at_rest(conn):
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


def is_at_rest(conn: Connection) -> bool:
    """Tell whether no transaction is open; there is none on a closed connection."""
    try:
        return not conn.in_transaction
    except sqlite3.ProgrammingError:
        return True


def roll_back(conn: Connection) -> None:
    """End a transaction, and what is half read in it."""
    try:
        close_handles(conn)
        _Cursor(conn).execute(ROLLBACK)
    except sqlite3.Error:  # the pool will close a connection that it finds in this state
        pass
