"""Who gets the next free item.

The rule is bounded barging: whoever asks may take a free item until the longest waiter has waited `fairness` seconds;
from then on free items are handed to the waiters in order. Barging keeps a busy pool fast, because a thread that runs
already takes the item without a switch; the bound keeps it fair, because nobody can be passed over for longer. It is a
queue at a counter where a regular may call out an order, until somebody in the queue looks at the watch.

A waiter keeps its place while others barge. At most one wake-up is under way: the head of the line is woken, and takes
its item itself. If somebody was quicker it goes back to sleep where it was. Whoever wakes, and whoever leaves the line,
served or not, wakes the next if there is something for it (`Books._look`). To wake one thread after the other, and
not all for whom there is something, is what keeps a crowded pool fast: the threads of CPython take turns, and each that
is awake slows all others down.

To serve everybody once in order takes 30 to 50 us a waiter for the switches alone. In a line so long that this takes
all of `fairness` nobody could ever barge, so for more than 32 waiters the bound grows with the line.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Condition, get_ident
from typing import Any, Generic, ParamSpec, TypeVar

from sqlitepool.limits import NEVER

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

# With more waiters than this, `fairness` counts for longer, in proportion.
_LONG_LINE = 32

_NOT_HELD = ("cannot release un-acquired lock",)


def locked(lock: Any, decide: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return `decide(*args)`, called with the lock held. Whatever is raised, wherever, the lock is free again.

    The `RLock` itself is entered and left, which C code does at a stroke; `with condition:` would run Python code that
    a signal handler can interrupt half way. Two cases remain. `Condition.wait`, interrupted just after it let go of
    the lock, leaves without it: then there is nothing to release. And a tracing tool can raise between the end of the
    block and the release.
    """
    held_before = lock._is_owned()
    try:
        with lock:
            return decide(*args, **kwargs)
    except BaseException as error:
        if not held_before and lock._is_owned():
            lock.release()
        if isinstance(error, RuntimeError) and error.args == _NOT_HELD and error.__context__ is not None:
            raise error.__context__ from None
        raise


def surely(lock: Any, decide: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do as `locked` does what others depend on: when it is interrupted it is done again, from the start."""
    try:
        return locked(lock, decide, *args, **kwargs)
    except BaseException:
        locked(lock, decide, *args, **kwargs)
        raise


class Waiter(Generic[T]):
    """One caller in the line. What it took stands in `given`; what it must raise instead, in `error`."""

    __slots__ = ("condition", "error", "given", "since", "thread_id")

    def __init__(self, lock: Any, since: float) -> None:
        self.condition = Condition(lock)
        self.since = since
        self.thread_id = get_ident()
        self.given: T | None = None
        self.error: BaseException | None = None

    def take_error(self) -> BaseException:
        """Return the error, and refer to it no more: its traceback refers to the waiter, and would live on with it."""
        error, self.error = self.error, None
        assert error is not None
        return error


class Line(OrderedDict[Waiter[T], None]):
    """The waiters in order of arrival, and what the rule says of them. All but `overdue_at` needs the lock.

    Attributes:
        overdue_at: when the longest waiter will have waited `fairness` seconds (longer in a long line), on the clock of
            `since`; never, when nobody waits. May be read without the lock: it says whether barging is still allowed.
        woken: the waiter whose wake-up is under way.
    """

    def __init__(self, fairness: float) -> None:
        super().__init__()
        self._fairness = fairness
        self.overdue_at = NEVER
        self.woken: Waiter[T] | None = None

    def join(self, waiter: Waiter[T]) -> None:
        """Add `waiter` at the end of the line."""
        self[waiter] = None
        if len(self) == 1:
            self.overdue_at = waiter.since + self._fairness

    def leave(self, waiter: Waiter[T]) -> None:
        """Take `waiter` out of the line; does nothing if it is not in it."""
        if self.woken is waiter:
            self.woken = None
        self.pop(waiter, None)
        head, waiting = next(iter(self), None), len(self)
        if head is None:
            self.overdue_at = NEVER
        elif waiting <= _LONG_LINE:
            self.overdue_at = head.since + self._fairness
        else:
            self.overdue_at = head.since + self._fairness * waiting / _LONG_LINE

    def head(self) -> Waiter[T] | None:
        """Return the longest waiter; None, when nobody waits."""
        return next(iter(self), None)

    def fail(self, waiter: Waiter[T], error: BaseException) -> None:
        """Have `waiter` leave the line and raise `error`."""
        waiter.error = error
        self.leave(waiter)
        waiter.condition.notify()

    def wake_head(self) -> None:
        """Wake the longest waiter to take what is free; until it has, it keeps its place."""
        head = next(iter(self))
        head.condition.notify()  # first: interrupted in between, it is awake all the same
        self.woken = head
