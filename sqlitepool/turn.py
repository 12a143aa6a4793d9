"""One turn at the write gate, and the token that whoever has the turn holds.

There is one token for each gate, and who has it may write. It is either in `Gate._free`, a list, whose `append` and
`pop` are single steps for all threads, or in somebody's hands. While nothing out of the ordinary is going on
(`Gate._quick_until`), to take a turn and to end it is one such step each, and one call of `flock`.

How nothing is lost. A call that is interrupted gives back the token that it has. Where it cannot, because the exception
came between two steps, the token dies with the last reference to it; the gate is told by a weak reference, and makes a
new one. So a turn that was forgotten ends by itself, too.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from threading import get_ident
from time import monotonic
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from sqlitepool import fork
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease, Slot, place
from sqlitepool.limits import NEVER
from sqlitepool.stats import GateHolder

if TYPE_CHECKING:
    from sqlitepool.gate import Gate

_frame = sys._getframe
_thread = threading.current_thread


class Token:
    """The right to write. Who has it in hands is the only one to touch it, the gate's file lock, and the connection.

    Attributes:
        has_file: the file lock is ours. While the token is free, this is so only if a waiter is on its way to it.
        slice_ends: until this monotonic time the process may take the file lock past the queue.
        since: the monotonic time at which the turn began, 0.0 while there is none.
        thread_name, thread_id, code, instruction: who began it, and where. Not the `Thread`: in a child of a fork that
            Python does not know of, CPython 3.13 crashes when the object of a thread of the parent is dropped.
        last_sql: what `Turn.note_sql` was told.
        connection: the loan of the writing connection, if the last turn was a transaction: see `Transaction`.
        slot: that of the connection. It then says who has the turn, and where that began.
        cursor: a cursor on that connection, for what begins and ends transactions.
        clean_for: the pool of that connection, if the next transaction may have it as it is.
        is_inherited: it is the token of the process that forked us: nothing of it may be touched.
    """

    __slots__ = (
        "__weakref__", "clean_for", "code", "connection", "cursor", "has_file", "instruction", "is_inherited",
        "last_sql", "since", "slice_ends", "slot", "thread_id", "thread_name",
    )  # fmt: skip

    def __init__(self) -> None:
        self.has_file = False
        self.slice_ends = -NEVER
        self.since = 0.0
        self.thread_name = ""
        self.thread_id = 0
        self.code: CodeType | None = None
        self.instruction = 0
        self.last_sql: str | None = None
        self.connection: Lease[Any] | None = None
        self.slot: Slot[Any] | None = None
        self.cursor: sqlite3.Cursor | None = None
        self.clean_for: object = None
        self.is_inherited = False

    def return_connection(self) -> None:
        """Return the connection to its pool, which undoes what was left open, and proves it clean."""
        lease, self.connection = self.connection, None
        cursor, self.cursor = self.cursor, None
        self.slot = self.clean_for = None
        try:
            if cursor is not None and same_process[0] and not self.is_inherited:
                cursor.close()  # one that has failed would keep the connection from being closed
        except sqlite3.ProgrammingError:  # which its borrower has done already
            pass
        finally:
            if lease is not None:
                lease.__exit__(BaseException, None, None)  # so that nothing is committed

    def note(self, frame: FrameType) -> None:
        """Write down who has the turn, and where it began."""
        self.thread_name = _thread().name
        self.thread_id = get_ident()
        self.code = frame.f_code
        self.instruction = frame.f_lasti
        self.last_sql = None

    def describe(self) -> GateHolder | None:
        """Tell who has a turn; None if nobody has."""
        name, ident, code, instruction, since = (
            self.thread_name, self.thread_id, self.code, self.instruction, self.since,
        )  # fmt: skip
        slot = self.slot
        if slot is not None and slot.borrower is not None:
            thread = slot.borrower.thread
            name, ident, code, instruction = thread.name, thread.ident or 0, slot.code, slot.instruction
        if not since or code is None:
            return None
        age = monotonic() - since
        return GateHolder(name, ident, time.time() - age, age, place(code, instruction), self.last_sql)


class Turn:
    """One turn at the gate: `with gate.turn(deadline):`. Made by `Gate.turn`.

    The turn is the owner, not the thread: another thread may end it. Where a block does not fit:

        turn = gate.turn(deadline)
        try:
            turn.enter()
            ...
        finally:
            turn.leave()
    """

    __slots__ = ("_deadline", "_gate", "_token")

    def __init__(self, gate: Gate, deadline: float | None) -> None:
        self._gate = gate
        self._deadline = deadline
        self._token: Token | None = None

    def refusal(self) -> Exception | None:
        """Make the error for a turn that is not to be had any more; None, as long as it is. Asked while it waits."""
        return None

    @property
    def is_held(self) -> bool:
        """This turn has the right to write."""
        token = self._token
        return token is not None and self._gate._knows(token)

    def note_sql(self, sql: str) -> None:
        """Have those who wait in vain for this turn to end read what it was doing."""
        if self._token is not None:
            self._token.last_sql = sql

    def enter(self, frame: FrameType | None = None) -> None:
        """Wait for the right to write, and take it.

        Args:
            frame: who is named as the one that has it; the caller by default.

        Raises:
            WriteTimeout: it could not be had before the deadline. Names the holder if it is in this process.
            RuntimeError: this turn has it already.
        """
        if self._token is not None:
            raise RuntimeError("this turn has the right to write already: call gate.turn() once for each")
        try:
            token = self._take(0.0, self._deadline)
            assert token is not None
            if token.connection is not None:
                token.return_connection()
            token.note(frame if frame is not None else _frame(1))
        except BaseException:
            self.leave()
            raise

    def _take(self, since: float, timeout: float | None, wait: bool = True) -> Token | None:
        """Take the token, and return it; None, without a `wait`, if somebody is in the way.

        The time is counted from `since` on; to wait until a deadline, count from 0.0 on.
        """
        gate = self._gate
        token: Token | None = None
        back: Token | None
        try:
            now = monotonic()
            if now < gate._quick_until and same_process[0]:
                try:
                    token = gate._free.pop()
                except IndexError:
                    pass
                else:
                    file = gate._file
                    if file is not None and now < token.slice_ends and not token.has_file:
                        try:  # the usual case of `_take_file`, without the call
                            barge = file.barge
                            barge()
                            token.has_file = True
                        except OSError:
                            pass  # `_take_file` will see it too, and knows what to do
                    if not token.has_file and not gate._take_file(token, now):
                        back, token = token, None
                        gate._free.append(back)
                        back = None
            if token is None:
                if not wait:
                    if gate._quick_until < NEVER:  # somebody may have looked for the token meanwhile
                        gate._attend()
                    return None
                token = gate._wait(self, None if timeout is None else since + timeout)
                now = monotonic()
            token.since = now
            self._token = token
            return token
        except BaseException:
            self._token = back = None
            lost, token = token, None
            gate._undo(lost)
            raise

    def leave(self) -> None:
        """Give the right to write back, if this turn has it."""
        gate = self._gate
        token: Token | None = None
        back: Token | None
        try:
            if not same_process[0]:
                fork.start_anew()
            token, self._token = self._token, None
            if token is None or token.is_inherited:
                return
            token.since = 0.0
            if token.has_file and (gate._quick_until >= NEVER or monotonic() >= token.slice_ends):
                file = gate._file  # `_leave_file`, without the call
                if file is not None:
                    unlock = file.unlock
                    unlock()
                token.has_file = False
            back, token = token, None
            gate._free.append(back)
            back = None
            # who is on the way to the gate, or looks there soon, finds the token without our help
            if gate._quick_until < NEVER and gate._woken is None and monotonic() >= gate._rests_until:
                gate._attend()
        except BaseException:
            self._token = back = None
            lost, token = token, None
            gate._undo(lost)
            raise

    def __enter__(self) -> Turn:
        self.enter(_frame(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
