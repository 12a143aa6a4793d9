"""How an item goes out and comes back: the quick way, the slow way, and what happens when either is interrupted.

How nothing is lost. Every item, from before it is opened until after it is closed, has a `Slot` in the pool's books, so
an interrupted call (Ctrl-C, a signal handler that raises) can lose track of a slot but never lose the slot. Each
function that has a slot in its hands returns it when anything is raised. What slips through all the same, because the
exception came between two functions, is found by the audit (`reclaim.py`): a slot that is not idle, and that nobody
refers to, is lost.

How it is quick. Free slots stand in a `deque`, whose `pop` and `append` are single steps for all threads; while nothing
out of the ordinary is going on (`_quiet_until`, `_attention`) a checkout and a return are one such step each, without
the lock. Everything else is decided under the lock by a short function of `books.py` that only changes the books and
returns what is to be opened or closed. User code never runs while the lock is held.
"""

from __future__ import annotations

import random
import warnings
from time import monotonic, sleep
from types import EllipsisType
from typing import TypeVar

from sqlitepool import fork, reclaim
from sqlitepool.books import Books
from sqlitepool.errors import ForeignItem
from sqlitepool.fork import same_process
from sqlitepool.lease import Slot
from sqlitepool.limits import NEVER
from sqlitepool.stats import MOST_PENDING, LeaseInfo
from sqlitepool.waiting import Waiter, locked, surely

T = TypeVar("T")

# A waiter sleeps this long (seconds) before it looks for lost items and deadlocks; then twice as long, up to the most.
# In a long line it sleeps longer at first: those before it look for all.
_PATIENCE = 0.01
_PATIENCE_FOR_EACH = 0.001
MOST_PATIENCE = 1.0
# Who returns an item that was lent for so long (seconds) lets the woken waiter run first, if it is that one's turn:
# compared with such a loan the switch is cheap, and the waiter begins the sooner.
_WORTH_A_SWITCH = 0.0005
# No more than this share of a lifetime is cut at random, so that items opened together are not all replaced together.
_JITTER = 0.1


class Lending(Books[T]):
    """The ways of an item between the pool and its borrowers. `Pool` adds what callers see, and calls user code."""

    # -- lending

    def _checkout_slowly(self, started: float, timeout: float | EllipsisType | None) -> Slot[T]:
        """Take a slot with an open item, when there is anything to see to or to wait for."""
        if isinstance(timeout, EllipsisType):
            timeout = self._limits.timeout
        if not same_process[0]:
            fork.start_anew()
        deadline = None if timeout is None else started + timeout
        slot: Slot[T] | None = None
        bad: Slot[T] | None
        lost: Slot[T] | None
        try:
            now = started
            while True:
                if slot is None and (now >= self._tend_at or not self._attention):
                    self._tend(now)
                    if now >= self._trim_at:
                        self._close_old(now, deadline)
                if slot is None and now < self._quiet_until:
                    try:
                        slot = self._idle.pop()
                    except IndexError:
                        pass
                if slot is None:
                    slot = self._wait(now, started, deadline)
                    now = monotonic()
                if slot.item is None:
                    if deadline is not None and started < deadline <= now:  # too late to begin
                        lost, slot = slot, None
                        self._undo_checkout(lost)
                        lost = None
                        locked(self._lock, self._fail_late, started)
                    fresh, slot = slot, None
                    self._open(fresh, deadline)
                    return fresh
                since, slot.since = slot.since, now
                if now < slot.good_until or (now < slot.expires and self._is_good(slot, now - since)):
                    return slot
                bad, slot = slot, None
                self._retire(bad)
                bad = None
                now = monotonic()
                if deadline is not None and now >= deadline:  # no time to try one after the other
                    slot = locked(self._lock, self._claim_new, started)
        except BaseException:
            if slot is not None:
                lost, slot = slot, None
                self._undo_checkout(lost)
                lost = None
            raise

    def _notice_fork(self) -> None:
        if not same_process[0]:
            fork.start_anew()

    def _wait(self, now: float, started: float, deadline: float | None) -> Slot[T]:
        """Take a slot, or wait in the line for one."""
        waiter: Waiter[Slot[T]] = Waiter(self._lock, now)
        try:
            self._wait_as(waiter, started, deadline)
            slot, waiter.given = waiter.given, None
            assert slot is not None
            return slot
        except BaseException:
            surely(self._lock, self._leave, waiter)
            self._attend()
            raise

    def _wait_as(self, waiter: Waiter[Slot[T]], started: float, deadline: float | None) -> None:
        """Wait until `waiter` was given a slot. Now and then, and before giving up, see if that can ever end.

        A function of its own, because in CPython 3.13 the jump back of a loop is outside of the `try` around it.
        """
        asleep = waiter.since
        left = NEVER if deadline is None else deadline - asleep
        ahead, most = len(self._line), self._limits.max_waiting
        if left <= 0 or (most is not None and ahead >= most):
            self._reclaim()  # before this call is sent away
        pause = _PATIENCE + _PATIENCE_FOR_EACH * ahead
        locked(self._lock, self._line_up, waiter, started, pause if pause < left else left)
        while waiter.given is None:
            if waiter.error is not None:
                raise waiter.take_error()
            if monotonic() - asleep >= min(pause, left):
                self._reclaim()
                locked(self._lock, self._break_deadlock)
                if left <= pause:
                    locked(self._lock, self._give_up, waiter, started)
                pause = min(pause * 2, MOST_PATIENCE)
            asleep = monotonic()
            left = NEVER if deadline is None else deadline - asleep
            if left > 0:
                locked(self._lock, self._sleep, waiter, min(pause, left))

    def _undo_checkout(self, slot: Slot[T]) -> None:
        """Take back a slot whose checkout was interrupted: its borrower has never seen the item."""
        slot.loan.clear()
        slot.frame = 0
        locked(self._lock, self._put_back, slot)
        self._attend()

    # -- taking back

    def _return(self, slot: Slot[T] | None, loan: float, commit: bool | None, claimed: bool = False) -> None:
        """End a loan. `commit`: its block ended well (True) or with an exception (False), or it was no block (None).

        Who takes `loan` out of the slot has the slot. `claimed`: the caller has done so.
        """
        assert slot is not None
        back: Slot[T] | None
        ours = claimed
        try:
            now = monotonic()
            if not claimed:
                if not same_process[0]:
                    fork.start_anew()
                try:
                    found = slot.loan.pop()
                except IndexError:
                    found = None
                if found is not loan:
                    self._refuse_return(slot, loan, found)
                    return
                ours = True
            slot.frame = 0
            held = slot.held
            held.append(now - loan)
            if len(held) > MOST_PENDING:
                slot.held = held.folded()
            if not self._finish(slot, commit):
                slot.spoiled = True
            elif now < slot.expires:
                slot.since = now
                until = now + self._limits.trusted_for
                slot.good_until = until if until < slot.expires else slot.expires
                back, slot = slot, None
                self._idle.append(back)
                if self._attention:
                    self._attend()
                    if now - loan >= _WORTH_A_SWITCH and now >= self._line.overdue_at:
                        sleep(0)
                return
            back, slot = slot, None
            self._retire(back)
        except BaseException:
            back = None
            lost, slot = slot, None
            if lost is None:
                self._attend()
            elif ours or self._take_loan(lost, loan):
                lost.spoiled = True
                self._retire(lost)
            lost = None
            raise

    def _take_loan(self, slot: Slot[T], loan: float) -> bool:
        """Take `loan` out of the slot; tell whether it was there. If it was not, the slot may be anybody's."""
        try:
            found = slot.loan.pop()
        except IndexError:
            return False
        if found is not loan:
            slot.loan.append(found)
        return found is loan

    def _refuse_return(self, slot: Slot[T], loan: float, current: float | None) -> None:
        """Say that a loan had ended before: an error, unless the pool itself ended it or this is another process."""
        if current is not None:
            slot.loan.append(current)
        ended_by_us = any(known is loan for known in list(self._reclaimed_loans))  # two may have begun at the same time
        if slot in self._slots and not ended_by_us:
            raise ForeignItem(f"{slot.item!r} was returned to {self!r} before the block that it was lent to had ended")

    def _attend(self) -> None:
        """See to what a free slot or a change of the books may have made possible."""
        if self._closed or len(self._slots) > self._max_size:
            self._close_all(locked(self._lock, self._settle))
        elif self._line.woken is None and (self._idle or len(self._slots) < self._max_size):
            locked(self._lock, self._look)

    def _reclaim(self) -> None:
        """Take back what nobody can be using any more."""
        lost = locked(self._lock, self._find_lost)
        while lost:
            self._take_back_lost(*lost.pop())

    def _take_back_lost(self, slot: Slot[T], info: LeaseInfo | None, loan: float | None) -> None:
        if info is None or loan is None:
            # lost on its way, by an interrupted call of the pool itself: nobody knows in which state
            slot.spoiled = True
            self._retire(slot)
            return
        self._return(slot, loan, None, claimed=True)
        message = f"pool {self.name!r} took back an item that was lost without being returned: {info}"
        warnings.warn(message, ResourceWarning, stacklevel=4)

    # -- opening and closing items

    def _fill(self) -> None:
        """Open items up to `min_size`."""
        while (slot := locked(self._lock, self._claim_missing)) is not None:
            self._open(slot, None)
            self._undo_checkout(slot)

    def _open(self, slot: Slot[T], deadline: float | None) -> None:
        item = None
        try:
            item = self._create(slot, deadline)
            if item is None:
                raise TypeError(f"the factory of {self!r} returned None; it must return the item")
            expires = NEVER
            if self._limits.max_lifetime is not None:
                expires = monotonic() + self._limits.max_lifetime * (1 - _JITTER * random.random())
            locked(self._lock, self._admit, slot, item, reclaim.parts_at_first(item, id(slot.base)), expires)
        except BaseException:
            if slot.item is not None:
                self._undo_checkout(slot)
            else:
                try:
                    if item is not None and id(item) not in self._index:
                        self._dispose(slot, item)
                finally:
                    self._close_all(locked(self._lock, self._forget, slot))
            raise

    def _retire(self, slot: Slot[T]) -> None:
        """Close the slot's item, then give its place away."""
        try:
            if slot.item is not None:
                self._dispose(slot, slot.item)
        finally:
            self._close_all(locked(self._lock, self._forget, slot))

    def _close_all(self, slots: list[Slot[T]]) -> None:
        while slots:
            self._retire(slots.pop())

    def _close_old(self, now: float, deadline: float | None) -> None:
        """Close free items that are too old or were idle for too long: one at least, the others if there is time."""
        surplus = locked(self._lock, self._trim, now)
        while surplus:
            self._retire(surplus.pop())
            if surplus and deadline is not None and monotonic() >= deadline:
                locked(self._lock, self._trim_later, surplus)
                return

    # -- user code, run without the lock: see `Pool`

    def _create(self, slot: Slot[T], deadline: float | None) -> T:
        raise NotImplementedError

    def _finish(self, slot: Slot[T], commit: bool | None) -> bool:
        raise NotImplementedError

    def _is_good(self, slot: Slot[T], idle_for: float) -> bool:
        raise NotImplementedError

    def _dispose(self, slot: Slot[T], item: T) -> None:
        raise NotImplementedError

    def _tend(self, now: float) -> None:
        raise NotImplementedError
