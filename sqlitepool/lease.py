"""One item of a pool and its loan: who has it, since when, and how it comes back.

A `Slot` is the pool's record of one item, from before it is opened until after it is closed. A `Lease` is one loan, the
object that a `with` block holds.
"""

from __future__ import annotations

import dis
import sys
import threading
import time
import weakref
from contextlib import ExitStack
from itertools import islice
from time import monotonic
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from sqlitepool.fork import same_process
from sqlitepool.limits import NEVER
from sqlitepool.stats import LeaseInfo, Tally

if TYPE_CHECKING:
    from types import EllipsisType

    from sqlitepool.pool import Pool

T = TypeVar("T")
_frame = sys._getframe
_ENTER_CONTEXT = ExitStack.enter_context.__code__


class Borrower:
    """A thread, as the one that took an item. Outlives the thread, and knows that it ended."""

    __slots__ = ("_presence", "thread")

    def __init__(self, presence: _Presence) -> None:
        self.thread = threading.current_thread()
        self._presence = weakref.ref(presence)

    @property
    def is_gone(self) -> bool:
        """The thread has ended. Names and idents are used again, even while threads live, so they prove nothing."""
        return self._presence() is None


class _Presence:
    """Lives in a thread's local storage, and therefore just as long as the thread."""

    __slots__ = ("__weakref__",)


#: `here.borrower` is the calling thread, where `enter_thread` has made it known.
here = threading.local()


def enter_thread() -> Borrower:
    """Make the calling thread known. Wherever this is interrupted or entered again, there is one presence a thread."""
    known = here.__dict__
    presence = known.setdefault("presence", _Presence())
    borrower: Borrower = known.setdefault("borrower", Borrower(presence))
    return borrower


class Slot(Generic[T]):
    """The pool's record of one item.

    Ownership is a single step: `loan` holds the time of the checkout while the item is lent and is empty otherwise;
    appending to a list and popping from it cannot be interrupted half way, nor done twice.

    Attributes:
        item: the item, None while it is being opened.
        base: what the item is built on, for the use of subclasses of `Pool`: the connection in a wrapper.
        loan: empty, or the monotonic time at which the item was lent.
        good_until: the monotonic time until which an idle item may be lent without a closer look.
        expires: the monotonic time from which it is not lent again: its lifetime, or at once when discarded.
        since: the monotonic time at which it was last taken or came back.
        frame: the `id` of the frame that entered the `with` block, 0 for `acquire()`. While that block is open the
            frame lives, and no other object can have its id.
        code, instruction: where in which code the item was taken; becomes a line number when somebody asks.
        borrower: the thread that took it.
        checkouts, held: how often it was lent, and for how long each time. Only the owner of the moment writes them,
            which is why they are exact without a lock.
        parts: see `reclaim.parts_at_first`.
        spoiled: the item is closed for what happened to it, not for its age.
    """

    __slots__ = (
        "base", "borrower", "checkouts", "code", "expires", "frame", "good_until", "held", "instruction", "item",
        "loan", "parts", "since", "spoiled",
    )  # fmt: skip

    item: T

    def __init__(self) -> None:
        self.item = None  # type: ignore[assignment]  # as long as it is being opened
        self.base: Any = None
        self.loan: list[float] = []
        self.good_until = NEVER
        self.expires = NEVER
        self.since = 0.0
        self.frame = 0
        self.code: CodeType | None = None
        self.instruction = 0
        self.borrower: Borrower | None = None
        self.checkouts = 0
        self.held = Tally()
        self.parts: dict[int, float] = {}
        self.spoiled = False

    def condemn(self) -> None:
        """Have the item closed rather than lent again."""
        self.expires = -NEVER  # first: a return at this very moment works `good_until` out of it
        self.good_until = -NEVER

    @property
    def is_of_with_block(self) -> bool:
        """The item was lent to the block of a `with` statement, by that statement itself."""
        code = self.code
        return bool(self.frame) and code is not None and dis.opname[code.co_code[self.instruction]] == "BEFORE_WITH"

    @property
    def where(self) -> str:
        """`file:line in function` that took the item."""
        return "an unknown line" if self.code is None else place(self.code, self.instruction)

    def lease_info(self, now: float) -> LeaseInfo | None:
        """Describe the loan, None if there is none. `now` is the monotonic time."""
        borrower = self.borrower
        try:
            age = now - self.loan[0]
        except IndexError:
            return None
        if borrower is None:  # lent this very moment
            return None
        thread = borrower.thread
        return LeaseInfo(thread.name, thread.ident or 0, time.time() - age, age, self.where)


class Lease(Generic[T]):
    """One loan of one item: `with pool.connection() as item`. Made by `Pool.connection`; to be entered once at a time.

    The item is taken when the block is entered and returned when it ends, whatever happened in it, by whichever thread
    ends it.
    """

    __slots__ = ("_loan", "_pool", "_slot", "_timeout")

    def __init__(self, pool: Pool[T], timeout: float | EllipsisType | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._slot: Slot[T] | None = None

    def __enter__(self) -> T:
        if self._slot is not None:
            raise RuntimeError("this lease is in use: call pool.connection() once for each with block")
        pool = self._pool
        slot: Slot[T] | None = None
        back: Slot[T] | None
        lost: Slot[T] | None
        try:
            now = monotonic()
            if now < pool._quiet_until and same_process[0]:
                try:
                    slot = pool._idle.pop()
                except IndexError:
                    pass
                else:
                    if now < slot.good_until:
                        slot.since = now
                    else:
                        back, slot = slot, None
                        pool._idle.append(back)
                        back = None
            if slot is None:
                slot = pool._checkout_slowly(now, self._timeout)
            frame = _frame(1)
            slot.code = code = frame.f_code
            if code is _ENTER_CONTEXT:
                frame = caller(frame)
                slot.code = frame.f_code
            slot.instruction = frame.f_lasti
            slot.frame = id(frame)
            try:
                slot.borrower = here.borrower
            except AttributeError:
                slot.borrower = enter_thread()
            slot.checkouts += 1
            self._loan = loan = slot.since
            slot.loan.append(loan)
            self._slot = slot
            return slot.item
        except BaseException:
            self._slot = None
            if slot is not None:
                lost, slot = slot, None
                pool._undo_checkout(lost)
                lost = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._pool._return(slot, self._loan, kind is None)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease cannot be copied or pickled: its item would be returned twice")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._pool!r}, {'out' if self._slot is not None else 'not lent'}>"


def place(code: CodeType, instruction: int) -> str:
    """Return `file:line in function` of an instruction."""
    position = next(islice(code.co_positions(), instruction // 2, None), (None,))
    return f"{code.co_filename}:{position[0] or code.co_firstlineno} in {code.co_qualname}"


def caller(frame: FrameType) -> FrameType:
    """Return the frame to be named as the one that entered a block: not that of an `ExitStack`, but its caller's."""
    outer = frame.f_back
    return outer if frame.f_code is _ENTER_CONTEXT and outer is not None else frame


def note_place(slot: Slot[T], frame: FrameType) -> None:
    """Write down which line of code took the item."""
    slot.code = frame.f_code
    slot.instruction = frame.f_lasti
