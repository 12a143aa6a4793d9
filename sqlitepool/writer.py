"""The writing side of one database: who writes at the moment, and which block encloses which.

Also how a lock of SQLite is waited for: in short tries, until the deadline, because SQLite's own wait (`busy_timeout`)
knows no deadline and cannot be interrupted.
"""

from __future__ import annotations

import dis
import sqlite3
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from threading import get_ident
from time import monotonic
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from sqlitepool import fork
from sqlitepool.errors import PoolDeadlock, PoolTimeout
from sqlitepool.fork import same_process
from sqlitepool.gate import Gate, gate_of
from sqlitepool.lease import place
from sqlitepool.limits import NEVER
from sqlitepool.stats import MOST_PENDING, GateHolder, Tally
from sqlitepool.tracking import Connection
from sqlitepool.writing_connection import last_statement

if TYPE_CHECKING:
    from sqlitepool.database_pools import WriterPool
    from sqlitepool.transaction import Transaction

# Between two tries to get the lock of SQLite, in seconds: the first pause, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01

# The file is looked at so often (seconds) by who writes all the time.
_TRUSTED_FOR = 0.001
#: Where nobody waits to write, it is looked at when the last one was done with it longer than this (seconds) ago.
TRUSTED_AT_REST = 0.00001

_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_busy(error: sqlite3.Error) -> bool:
    """Tell whether it is only the lock that cannot be had."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY


def time_left(deadline: float | None) -> float | None:
    """Return the seconds until `deadline`, None if there is none."""
    return None if deadline is None else max(0.0, deadline - monotonic())


def insist(
    cursor: sqlite3.Cursor,
    sql: str,
    deadline: float | None,
    why_not: Callable[[], PoolTimeout],
    on_busy: Callable[[], object] | None = None,
) -> None:
    """Run `sql`, and again while the database is locked, until the deadline; then raise `why_not()`.

    `on_busy` is called if it takes some milliseconds: longer than a process that was killed needs to go.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            cursor.execute(sql)
            return
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            left = time_left(deadline)
            if left == 0:
                raise why_not() from error
        time.sleep(pause if left is None else min(pause, left))
        pause = min(pause * 2, _LONGEST_PAUSE)
        if on_busy is not None and pause == _LONGEST_PAUSE:
            on_busy()
            on_busy = None


class Block:
    """An open block, and where it was entered: proves that it encloses what runs now.

    It does if the frame that entered it, by a `with` statement of its own, is on the stack: see `deadlock.py`.

    Attributes:
        frame: the `id` of that frame.
        code, instruction: the line.
        is_certain: the frame is ours, and known to end the block.
    """

    __slots__ = ()

    frame: int
    code: CodeType
    instruction: int
    is_certain: bool

    def encloses(self, stack: set[int]) -> bool:
        """Tell whether the block encloses code that runs on `stack`, the `id` of each of its frames."""
        return self.frame in stack and (
            self.is_certain or dis.opname[self.code.co_code[self.instruction]] == "BEFORE_WITH"
        )

    @property
    def where(self) -> str:
        """`file:line in function` that entered the block."""
        return place(self.code, self.instruction)


class Place(Block):
    """A block that is not a transaction: a savepoint in one, say."""

    __slots__ = ("code", "frame", "instruction", "is_certain")

    def __init__(self, frame: FrameType) -> None:
        self.frame = id(frame)
        self.code = frame.f_code
        self.instruction = frame.f_lasti
        self.is_certain = False

    def __str__(self) -> str:
        return self.where


class Writer:
    """The writing side of one database: its one connection, its gate, and its transaction of the moment.

    Args:
        pool: of one connection, a `WritingConnection`.
        file: the path of the database, None for one in memory.
        blockers: tells who reads, for the message when a COMMIT has to wait for readers.

    Attributes:
        commits: how many transactions were committed.
        waits: how long each had to wait for its beginning.
        watch: called with the connection after a commit, while the right to write is still held.
        is_watch_due: it is to be called with the next commit: once in a millisecond, at most.
        on_busy: called when somebody who does not come through the gate writes.
        trusted_until: until this monotonic time nobody looks whether the file was replaced,
        look_at: but who begins a transaction does so from this one on.
    """

    def __init__(self, pool: WriterPool, file: str | None, blockers: Callable[[], str]) -> None:
        self.pool = pool
        self.commits = 0
        self.waits = Tally()
        self.watch: Callable[[Connection], object] = _nothing
        self.is_watch_due = False
        self.on_busy: Callable[[], object] = _nothing
        self._file = file
        self._blockers = blockers
        self._current: weakref.ref[Transaction] | None = None
        self.trusted_until = self.look_at = -NEVER
        self._closed: Callable[[], Exception] | None = None
        self._is_closed_for_all = False
        self.gate = self._find_gate()
        fork.register(self)

    def _start_anew(self) -> None:
        self._current = None

    def _find_gate(self) -> Gate:
        return gate_of(self._file) if self._file is not None else Gate(None)

    def has_moved(self) -> bool:
        """Look for the gate of the file that is there now; tell whether it is another one."""
        if self._file is None:
            return False
        before, self.gate = self.gate, self._find_gate()
        return self.gate is not before

    def look_around(self, now: float) -> bool:
        """See to what is seen to once in a millisecond, at most, and tell whether the file is still the same."""
        self.is_watch_due = True
        if len(self.waits) > MOST_PENDING:
            self.waits = self.waits.folded()
        if self.has_same_file(now):
            return True
        file = self.pool._file
        if file is not None and not file.left:
            self.pool._look_at_file(file, now)  # which may trust in it a little longer, if it is not told
        return False

    def has_same_file(self, now: float) -> bool:
        """Look whether the file is still the one that the connection has open; if so, trust in it for a while."""
        if not self.pool.has_current_file():
            return False
        self.trusted_until = now + _TRUSTED_FOR
        return True

    def close(self, error: Callable[[], Exception]) -> None:
        """Refuse who comes to write by a block, or waits for the right to; what is queued may still be written.

        Args:
            error: makes the error that they get.
        """
        self._closed = error
        self.gate.rouse()

    def close_for_all(self) -> None:
        """Refuse what is queued, too."""
        if self._closed is not None:
            self._is_closed_for_all = True
            self.gate.rouse()

    def refusal(self, *, is_queued: bool) -> Exception | None:
        """Make the error for who is refused, None for who is not."""
        if self._closed is None or (is_queued and not self._is_closed_for_all):
            return None
        return self._closed()

    def enclosing(self, frame: FrameType | None) -> Transaction | None:
        """Return the transaction whose block encloses `frame`; None if there is none, or that cannot be proved.

        Raises:
            PoolDeadlock: it encloses, but a block inside of it that does not is still open. Nothing can be written in
                that one's savepoint, and to wait for the right to write would never end.
        """
        if self.gate._free:
            return None  # nobody is writing
        current = self._current
        transaction = None if current is None else current()
        if transaction is None or not (outermost := transaction.frame):
            return None
        inside = frame
        while inside is not None and id(inside) != outermost:
            inside = inside.f_back
        if inside is None or not same_process[0]:
            return None
        inner, stack = transaction.inner, set()
        while frame is not None:
            stack.add(id(frame))
            frame = frame.f_back
        if not transaction.encloses(stack):
            return None
        for block in inner:
            if not block.encloses(stack):
                raise PoolDeadlock(
                    f"the write block that began at {block.where} is open, and suspended or entered by something else "
                    f"than a `with` statement, inside of the one that began at {transaction.where} and encloses this "
                    "call: nothing else can be written until it has ended"
                )
        return transaction

    def holder(self) -> GateHolder | None:
        """Describe who in this process has the right to write, with the last statement if it is our transaction."""
        holder = self.gate.holder()
        current = self._current
        transaction = None if current is None else current()
        conn = None if transaction is None else transaction.conn
        return holder if holder is None or conn is None else replace(holder, last_sql=last_statement(conn))

    def say_more(self) -> str:
        """Say what the gate does not know of the one that somebody waited for in vain."""
        holder = self.holder()
        said = "" if holder is None or holder.last_sql is None else f", last statement {holder.last_sql!r}"
        if holder is not None and holder.thread_id == get_ident():
            said += (
                ". That is this very thread: a block in a suspended generator or coroutine, or one that no `with` "
                "statement entered, cannot be joined. Pass its connection on, or end it first"
            )
        return said


def _nothing(*_: object) -> None:
    pass
