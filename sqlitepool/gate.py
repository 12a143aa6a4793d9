"""The write gate: the right to write to one database file, for one at a time.

SQLite's own waiting polls, and lets some wait for ever. So whoever wants to write comes through here first, and takes
the right to write before any connection. Between the threads of a process the rule is that of `waiting.py`: whoever
asks may take the gate until the longest waiter has waited `fairness` seconds, then it goes to the waiters in order: not
one after the other, though, but one in `fairness` seconds, or more of them in a long line. In between, those who run
already may go on: to hand the gate to a sleeping thread takes as long as to write a row.
Between processes the rule is of the same kind: see `process_gate.py`.

A gate is free when its token is in `_free` (see `turn.py`); the lock guards the line of those who wait for it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic

from sqlitepool import fork
from sqlitepool.errors import WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.limits import NEVER
from sqlitepool.process_gate import ProcessGate
from sqlitepool.stats import GateHolder
from sqlitepool.turn import Token, Turn
from sqlitepool.waiting import locked

# Who finds the gate with another process tries again after these pauses (seconds) before the helper is sent for.
_QUICK_TRIES = (0.0001, 0.0002, 0.0004)
# Who is woken in vain, because another thread was quicker, is not woken again for so long (seconds).
_REST = 0.003
# However long the line is, all in it have had their turn in about this time (seconds), where turns are short.
_ROUND = 0.06
# Where no helper can be started, whoever is first in line goes on trying, with this pause.
_WITHOUT_HELPER = 0.01
# A waiter looks this often (seconds) for a turn whose end nobody was told of.
_PATIENCE = 1.0
# How long (seconds) a finalizer waits for the lock.
_RENEW_PATIENCE = 0.1


class _Waiter:
    """One thread in the line."""

    __slots__ = ("condition", "since", "turn")

    def __init__(self, lock: threading.RLock, since: float, turn: Turn) -> None:
        self.condition = threading.Condition(lock)
        self.since = since
        self.turn = turn

    def check(self) -> None:
        """See to it that nobody waits, or is served, whose turn is refused."""
        error = self.turn.refusal()
        if error is not None:
            raise error


class Gate(ProcessGate):
    """The right to write to one database file. `gate_of` finds it.

        gate = gate_of("app.db")
        with gate.turn(monotonic() + 30):
            ...

    Never ask for it with a connection or a lock in hands that others may need to end their turn.

    Args:
        database: the path of the file, None for a database that no other process can have.
        fairness: for how long (seconds) a waiting thread may be passed over.
    """

    def __init__(self, database: str | None, *, fairness: float = 0.005) -> None:
        self._fairness = fairness
        self._on_death = partial(_renew, weakref.ref(self))
        self._token: Callable[[], Token | None] = _no_token
        super().__init__(database)
        fork.register(self)

    def _start_anew(self) -> None:
        super()._start_anew()
        inherited = self._token()
        if inherited is not None:
            inherited.is_inherited = True
        self._line: deque[_Waiter] = deque()
        self._woken: _Waiter | None = None
        self._handed_at = -NEVER  # when somebody in the line had their turn last
        self._rests_until = -NEVER  # until then the first in line looks for themselves, and is not woken
        self._make_token()
        self._look()

    # -- what callers see

    def turn(self, deadline: float | None = None) -> Turn:
        """Return a turn to be entered, by `with` or `enter()`.

        Args:
            deadline: until when to wait, on the clock of `time.monotonic()`; None to wait for ever. Where it has
                passed, the right to write is taken if it can be had at once.
        """
        return Turn(self, deadline)

    def holder(self) -> GateHolder | None:
        """Describe who has the right to write, None if it is nobody in this process."""
        token = self._token()
        return None if token is None or not same_process[0] else token.describe()

    def waiting(self) -> int:
        """Return how many threads of this process wait."""
        return len(self._line) if same_process[0] else 0

    def rouse(self) -> None:
        """Wake all who wait, because some of them are refused from now on: see `Turn.refusal`."""
        locked(self._lock, self._wake_all)

    def __repr__(self) -> str:
        return f"<Gate of {self._name}, {'free' if self.holder() is None else 'held'}>"

    # -- waiting

    def _wait(self, turn: Turn, deadline: float | None) -> Token:
        """Wait in the line for the token."""
        if not same_process[0]:
            fork.start_anew()
        if not self._is_opened or self._complaint is not None:
            self._prepare()
        waiter = _Waiter(self._lock, monotonic(), turn)
        try:
            return self._wait_as(waiter, deadline)
        except BaseException:
            locked(self._lock, self._leave_line, waiter)
            raise

    def _wait_as(self, waiter: _Waiter, deadline: float | None) -> Token:
        # A function of its own, because the jump back of a loop is outside of its `try` statement for CPython 3.13.
        tries = deque(_QUICK_TRIES)
        token: Token | None = None
        try:
            token = locked(self._lock, self._line_up, waiter, deadline)
            while token is None:
                if deadline is not None and monotonic() >= deadline:
                    self._return_connection()
                    locked(self._lock, self._leave_line, waiter)  # already here, where an interruption is handled
                    raise WriteTimeout(self._why_not(monotonic() - waiter.since))
                token = locked(self._lock, self._sleep, waiter, tries, deadline)
            return token
        except BaseException:
            lost, token = token, None
            self._undo(lost)
            raise

    def _return_connection(self) -> None:
        """Have the connection that waits for the next transaction returned: there may be none before it is closed."""
        token: Token | None = None
        try:
            token = self._free.pop()
            if token.connection is not None:
                token.return_connection()
        except IndexError:
            pass
        finally:
            if token is not None:
                self._put(token)

    def _why_not(self, waited: float) -> str:
        holder = self.holder()
        who = "nobody in this process" if holder is None else str(holder)
        return f"the right to write to {self._name} could not be had in {waited:.3f} s. Held by: {who}"

    def _attend(self) -> None:
        """See to who is next."""
        locked(self._lock, self._settle)

    def _undo(self, token: Token | None) -> None:
        """Take back what an interrupted call had, and have the others look anew at what is free."""
        if token is not None and self._knows(token):
            token.since = 0.0
            self._leave_file(token)
            self._put(token)
        self._attend()

    # -- the decisions: called with the lock held

    def _look(self) -> None:
        """Work out until when the quick way may be taken; for ever, if nobody waits and all is well."""
        is_well = self._is_opened and self._complaint is None
        self._overdue_at = NEVER
        if self._line:
            enough = min(self._fairness, _ROUND / len(self._line))
            self._overdue_at = max(self._line[0].since + self._fairness, self._handed_at + enough)
        self._quick_until = self._overdue_at if is_well else -NEVER

    def _line_up(self, waiter: _Waiter, deadline: float | None) -> Token | None:
        """Join the line, if the caller may wait, and take the token if it can be had at once."""
        waiter.check()
        if waiter.since < self._overdue_at:
            token = self._take_token()
            if token is not None:
                return token
        if deadline is None or waiter.since < deadline:
            self._line.append(waiter)
            return self._settle(waiter, ask=False)
        return None

    def _sleep(self, waiter: _Waiter, tries: deque[float], deadline: float | None) -> Token | None:
        """Sleep in the line until there is something to do; take the token if it is our turn then."""
        waiter.check()
        if self._woken is not waiter:
            pause = _PATIENCE
            if self._line[0] is waiter and (rest := self._rests_until - monotonic()) > 0:
                pause = rest
            elif self._free and self._line[0] is waiter:
                # another process has the file lock, and nobody here waits for it yet
                if tries and not (self._file is not None and self._file.is_awaited):
                    pause = tries.popleft()
                elif not self._ring():
                    pause = _WITHOUT_HELPER
            if deadline is not None:
                pause = min(pause, deadline - monotonic())
            if pause > 0:
                waiter.condition.wait(pause)
                waiter.check()
        in_vain = self._woken is waiter
        if in_vain:
            self._woken = None
        token = self._settle(waiter, ask=not tries)
        if token is None and in_vain and not self._free:
            self._rests_until = min(monotonic() + _REST, self._overdue_at)
        return token

    def _wake_all(self) -> None:
        for waiter in self._line:
            waiter.condition.notify()

    def _leave_line(self, waiter: _Waiter) -> None:
        self._rests_until = -NEVER
        if waiter in self._line:
            self._line.remove(waiter)
        if self._woken is waiter:
            self._woken = None
        self._settle()

    def _is_awaited(self) -> bool:
        return bool(self._line)

    def _settle(self, awake: _Waiter | None = None, ask: bool = True) -> Token | None:
        """See to who is next; return the token if it is `awake`. To be called after each change. There are five cases:

        1. Somebody has the token: nothing to do.
        2. Nobody waits: let go of the file lock.
        3. Another process has the file lock: have the helper wait for it, unless the first in line is `awake`, and
           goes on trying by itself (not `ask`).
        4. The first in line is `awake`: they have the token.
        5. They are not: wake them. Until they run, others may be quicker, if the rule allows it.
        """
        if not self._free and self._token() is None:
            self._make_token()
        head = self._line[0] if self._line else None
        self._look()
        token = self._take_token(with_file=head is not None)
        if token is None:
            if head is not None and (ask or head is not awake) and self._free:
                self._ring()
        elif head is not None and head is awake:
            self._line.popleft()
            self._handed_at = monotonic()
            self._rests_until = -NEVER
            self._look()
            return token
        else:
            self._put(token)
            if head is not None and self._woken is None and monotonic() >= self._rests_until:
                head.condition.notify()
                self._woken = head
        return None

    def _take_token(self, with_file: bool = True) -> Token | None:
        """Take the token, with the file lock or without, if both are to be had at once."""
        back: Token | None
        token: Token | None = None
        try:
            try:
                token = self._free.pop()
            except IndexError:
                return None
            if not with_file:
                self._leave_file(token)
            elif not self._take_file(token, monotonic()):
                back, token = token, None
                self._free.append(back)
                back = None
            return token
        except BaseException:
            back = None
            if token is not None:
                lost, token = token, None
                self._put(lost)
            raise

    # -- the token

    def _knows(self, token: Token) -> bool:
        """Tell whether it is our token, and not the one of the process that forked us."""
        return self._token() is token

    def _make_token(self) -> None:
        token = Token()
        self._token = weakref.ref(token, self._on_death)
        self._free.append(token)

    def _renew(self, dead: weakref.ref[Token]) -> None:
        """Make a new token, because the old one died with a call that was interrupted, or a turn that was forgotten.

        Called where the last reference went, in the midst of anything: if the lock cannot be had, the next one to come
        or to look makes the token.
        """
        if not same_process[0] or self._token is not dead:
            return
        if self._file is not None:
            self._file.unlock()
        lock = self._lock
        if lock._is_owned() or not lock.acquire(timeout=_RENEW_PATIENCE):  # type: ignore[attr-defined]
            return
        try:
            self._settle()
        finally:
            lock.release()


def _no_token() -> None:
    pass


def _renew(gate: weakref.ref[Gate], dead: weakref.ref[Token]) -> None:
    its_gate = gate()
    if its_gate is not None:
        its_gate._renew(dead)


_gates: weakref.WeakValueDictionary[tuple[int, int], Gate] = weakref.WeakValueDictionary()
_gates_lock = threading.RLock()


def gate_of(database: str | os.PathLike[str]) -> Gate:
    """Return the gate of a database file: always the same one, whatever path names the file, while somebody has it.

    A file that was replaced has another gate than the one before it. Hard links share the gate in this process only:
    other processes know them by their names (and SQLite does not support them,
    https://www.sqlite.org/howtocorrupt.html, section 2.5).

    Args:
        database: the path of the file, not a `file:` URI.

    Raises:
        FileNotFoundError: there is no such file. Opening a connection makes it.
        OSError: the file cannot be looked at.
    """
    return locked(_gates_lock, _find_gate, os.fspath(database))


def _find_gate(database: str) -> Gate:
    file = _identify(database)
    gate = _gates.get(file)
    if gate is None or not _is_of(gate, file):
        gate = Gate(os.path.realpath(database))
        _gates[file] = gate
    return gate


def _is_of(gate: Gate, file: tuple[int, int]) -> bool:
    """Tell whether the gate's path still names that file: the number of a deleted file may be used again."""
    try:
        return gate.database is not None and _identify(gate.database) == file
    except OSError:
        return False


def _identify(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
