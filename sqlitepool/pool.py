"""`Pool`: a bounded pool that lends items of any kind to threads and takes them back.

How nothing is lost. Every item, from before it is opened until after it is closed, has a `Slot` in the pool's books, so an
interrupted call (Ctrl-C, a signal handler that raises) can lose track of a slot but never lose the slot. Each function
that has a slot in its hands returns it when anything is raised. What slips through all the same, because the exception came
between two functions, is found by the audit (`reclaim.py`): a slot that is not idle, and that nobody refers to, is lost.

How it is quick. Free slots stand in a `deque`, whose `pop` and `append` are single steps for all threads; while nothing
out of the ordinary is going on (`_quiet_until`, `_attention`) a checkout and a return are one such step each, without
the lock. Everything else is decided under the lock by a short function of `books.py` that only changes the books and returns
what is to be opened or closed. User code never runs while the lock is held.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from types import EllipsisType, TracebackType
from typing import Any, Self, TypeVar

from sqlitepool import checks, fork, reclaim
from sqlitepool.books import Books
from sqlitepool.errors import ForeignItem
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease, Slot, lend
from sqlitepool.stats import LeaseInfo, PoolStats
from sqlitepool.waiting import NEVER, Waiter, locked

T = TypeVar("T")

logger = logging.getLogger("sqlitepool")
_numbers = itertools.count(1)

# An item idle for this long (seconds) is looked at by `check` before it is lent.
_CHECK_AFTER = 1.0
# A waiter sleeps this long (seconds) before it looks for lost items and deadlocks; then twice as long, up to the most.
_PATIENCE = 0.01
_MOST_PATIENCE = 1.0
# No more than this share of a lifetime is cut at random, so that items opened together are not all replaced together.
_JITTER = 0.1


def _rollback(item: Any) -> None:
    rollback = getattr(item, "rollback", None)
    if rollback is not None:
        rollback()


def _sizes(max_size: int, min_size: int) -> tuple[int, int]:
    checks.count("max_size", max_size, 1)
    checks.count("min_size", min_size, 0)
    if min_size > max_size:
        raise ValueError(f"min_size must be at most max_size, not {min_size} > {max_size}")
    return max_size, min_size


def _close(item: Any) -> None:
    close = getattr(item, "close", None)
    if close is not None:
        close()


class Pool(Books[T]):
    """Lends items to threads, each to one borrower at a time, and takes them back for reuse.

        pool = Pool(lambda: UserDatabase("app.db"), max_size=8)
        with pool.connection() as db:
            db.log_in("ann")

    Think of a counter with a few tools: whoever needs one takes it, or waits for the next that is brought back.

    Args:
        factory: called without arguments to make an item, when one is asked for and none is free.
        max_size: the most items alive at any time, those being opened included.
        min_size: so many are opened at once, and stay open however long they are idle.
        timeout: how long, in seconds, a caller waits for an item (None: for ever; 0: tries once).
        max_waiting: the most callers that may wait; one more gets `PoolFull` (None: no limit).
        max_idle: an item idle for so many seconds is closed (None: never). Looked at when items are asked for.
        max_lifetime: an item so many seconds old is replaced, less a random part of up to a tenth (None: never).
        fairness: free items may be taken by whoever asks until the longest waiter has waited so many seconds; from then
            on they are handed to the waiters in order. 0: always in order.
        reset: called with an item that comes back; if it fails the item is closed, and the failure logged. By default
            `item.rollback()`, if there is such a method.
        check: called with an item that was idle for a second or more before it is lent; if it returns false or fails the
            item is replaced.
        close: called with an item at its end. By default `item.close()`, if there is such a method.
        name: stands in errors and statistics.

    Raises:
        TypeError: `factory` or a hook is not callable, or a number is of the wrong type.
        ValueError: a number is out of range.

    `factory`, `reset`, `check` and `close` may take their time: no lock is held while they run.
    """

    def __init__(
        self,
        factory: Callable[[], T],
        *,
        max_size: int = 8,
        min_size: int = 0,
        timeout: float | None = 30.0,
        max_waiting: int | None = None,
        max_idle: float | None = None,
        max_lifetime: float | None = None,
        fairness: float = 0.005,
        reset: Callable[[T], object] | None = None,
        check: Callable[[T], object] | None = None,
        close: Callable[[T], object] | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(factory):
            raise TypeError(f"factory must be callable, such as `lambda: UserDatabase(path)`, not {factory!r}")
        for hook, value in (("reset", reset), ("check", check), ("close", close)):
            checks.callable_or_none(hook, value)
        self._clock = time.monotonic
        self._factory = factory
        self._reset = reset if reset is not None else _rollback
        self._check = check
        self._closer = close if close is not None else _close
        self._max_size, self._min_size = _sizes(max_size, min_size)
        self._timeout = checks.optional_seconds("timeout", timeout)
        self._max_waiting = None if max_waiting is None else checks.count("max_waiting", max_waiting, 0)
        self._max_idle = checks.optional_seconds("max_idle", max_idle, above_zero=True)
        self._max_lifetime = checks.optional_seconds("max_lifetime", max_lifetime, above_zero=True)
        self._fairness = checks.seconds("fairness", fairness)
        self._trusted_for = min(NEVER if check is None else _CHECK_AFTER, self._max_idle or NEVER)
        self._tend_every = min(self._max_idle or NEVER, self._max_lifetime or NEVER) / 4
        self.name = name if name is not None else f"pool-{next(_numbers)}"
        self._discarded_items: dict[int, weakref.ref[Any]] = {}
        self._open_books()
        fork.register(self)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    # -- what borrowers call

    def connection(self, timeout: float | EllipsisType | None = ...) -> Lease[T]:
        """Return a lease for a `with` block: the item is taken when the block begins, returned when it ends.

            with pool.connection() as item:
                ...

        Args:
            timeout: seconds to wait for an item, instead of the pool's own; None: for ever; 0: try once.

        Raises (when the block begins):
            PoolTimeout: no item came free in time.
            PoolDeadlock: every item is held by a `with` block of a thread that waits for this pool.
            PoolFull: `max_waiting` callers wait already.
            PoolClosed: the pool is closed.
            Exception: whatever the factory raised.
        """
        if timeout is not ...:
            checks.timeout(timeout)
        return Lease(self, timeout)

    def acquire(self, timeout: float | EllipsisType | None = ...) -> T:
        """Take an item, to be returned with `release` or `discard`. The arguments and errors are `connection`'s."""
        slot = None
        try:
            slot = self._checkout(checks.timeout(timeout))
            return lend(slot, sys._getframe(1))
        except BaseException:
            if slot is not None:
                lost, slot = slot, None
                self._undo_checkout(lost)
            raise

    def release(self, item: T) -> None:
        """Return an item that `acquire` lent.

        Raises:
            ForeignItem: it is not on loan from this pool, or was returned before.
        """
        slot = self._on_loan(item, "release")
        if slot is not None:
            self._return(slot, slot.loan[0], None)

    def discard(self, item: T) -> None:
        """Have a lent item closed on its return, so that it is never lent again.

        An item from `acquire` is returned by this, and a `release` after it does nothing. An item of a `with` block
        is closed when the block ends.

        Raises:
            ForeignItem: it is not on loan from this pool, or was returned before.
        """
        slot = self._on_loan(item, "discard")
        if slot is None:
            return
        slot.condemn()
        if not slot.frame:
            try:
                self._discarded_items[id(item)] = weakref.ref(item)
            except TypeError:  # no weak references to such an item
                pass
            self._return(slot, slot.loan[0], None)

    def _on_loan(self, item: T, verb: str) -> Slot[T] | None:
        slot = self._index.get(id(item))
        if slot is not None and slot.item is item and slot.loan:
            return slot
        if slot is None:
            discarded = self._discarded_items.pop(id(item), None)
            if discarded is not None and discarded() is item:
                return None
            if not same_process[0]:
                fork.start_anew()
                return None
        whose = "it was returned before" if slot is not None and slot.item is item else "this pool does not know it"
        raise ForeignItem(f"cannot {verb} {item!r}: it is not on loan from {self!r}, {whose}")

    # -- what owners call

    def resize(self, max_size: int, min_size: int | None = None) -> None:
        """Change the bounds. Items too many are closed at once if they are free, else on their return.

        Args:
            max_size: the new most items.
            min_size: the new number kept open; None: as before, but no more than `max_size`.

        Raises:
            TypeError, ValueError: as in the constructor; nothing has changed then.
            PoolClosed: the pool is closed.
        """
        if min_size is None:
            min_size = min(self._min_size, checks.count("max_size", max_size, 1))
        self._close_all(locked(self._lock, self._resized, *_sizes(max_size, min_size)))
        self._fill()

    def drain(self) -> None:
        """Replace every item by and by: the free ones are closed now, the lent ones on their return.

        For a change that only new items show, such as an SQL function that `setup` has begun to register.
        """
        self._close_all(locked(self._lock, self._condemn_all))

    def close(self, timeout: float | None = 0.0) -> list[LeaseInfo]:
        """Close the pool: nobody gets an item any more, waiters get `PoolClosed`, lent items are closed on return.

        May be called again, and from any thread.

        Args:
            timeout: how long to wait, in seconds, for lent items to come back (None: for ever).

        Returns:
            The items still out, empty if all came back.
        """
        limit = checks.optional_seconds("timeout", timeout)
        deadline = None if limit is None else self._clock() + limit
        self._close_all(locked(self._lock, self._shut))
        while True:
            self._reclaim()
            left = NEVER if deadline is None else deadline - self._clock()
            if left <= 0 or locked(self._lock, self._wait_for_returns, min(left, _MOST_PATIENCE)):
                return self.leases()

    def stats(self) -> PoolStats:
        """Describe the pool at this moment. Takes lost items back first, so that `in_use` counts those in use."""
        self._reclaim()
        return locked(self._lock, self._snapshot)

    def leases(self) -> list[LeaseInfo]:
        """Return who holds what, the longest first."""
        self._reclaim()
        infos = locked(self._lock, self._lease_infos, self._clock())
        return sorted(infos, key=lambda info: -info.age)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- lending

    def _checkout(self, timeout: float | EllipsisType | None) -> Slot[T]:
        """Take a slot with an open item. The quick way first."""
        slot = None
        try:
            now = self._clock()
            if now < self._quiet_until and same_process[0]:
                try:
                    slot = self._idle.pop()
                except IndexError:
                    pass
                else:
                    if now < slot.good_until:
                        slot.since = now
                        return slot
                    back, slot = slot, None
                    self._idle.append(back)
        except BaseException:
            if slot is not None:
                lost, slot = slot, None
                self._undo_checkout(lost)
            raise
        return self._checkout_slowly(now, self._timeout if timeout is ... else timeout)

    def _checkout_slowly(self, started: float, timeout: float | None) -> Slot[T]:
        if not same_process[0]:
            fork.start_anew()
        deadline = None if timeout is None else started + timeout
        slot = None
        try:
            while True:
                now = self._clock()
                self._tend(now)
                slot = locked(self._lock, self._claim, now)
                if slot is None:
                    slot = self._wait(started, deadline)
                if slot.item is None:
                    fresh, slot = slot, None
                    self._open(fresh, deadline)
                    slot = fresh
                    slot.since = self._clock()
                    return slot
                slot.since, idle_for = (now := self._clock()), now - slot.since
                if now < slot.expires and self._is_good(slot, idle_for):
                    return slot
                bad, slot = slot, None
                self._retire(bad, discarded=now < bad.expires)
        except BaseException:
            if slot is not None:
                lost, slot = slot, None
                self._undo_checkout(lost)
            raise

    def _wait(self, started: float, deadline: float | None) -> Slot[T]:
        """Wait in the line for a slot. Now and then, and before giving up, see whether the wait can ever end."""
        waiter: Waiter[Slot[T]] | None = None
        try:
            if self._hopeless(deadline):
                self._reclaim()
            waiter = locked(self._lock, self._join, started, deadline)
            pause = _PATIENCE
            while waiter.given is None:
                if waiter.error is not None:
                    raise waiter.error
                asleep = self._clock()
                left = NEVER if deadline is None else deadline - asleep
                rest = min(pause, left)
                if rest > 0:
                    locked(self._lock, self._sleep, waiter, rest)
                if self._clock() - asleep >= rest:
                    self._reclaim()
                    locked(self._lock, self._break_deadlock)
                    if rest == left:
                        locked(self._lock, self._give_up, waiter, started)
                    pause = min(pause * 2, _MOST_PATIENCE)
            slot, waiter.given = waiter.given, None
            return slot
        except BaseException:
            if waiter is not None:
                given = locked(self._lock, self._leave, waiter)
                if given is not None:
                    lost, given = given, None
                    self._undo_checkout(lost)
            raise

    def _undo_checkout(self, slot: Slot[T]) -> None:
        """Take back a slot whose checkout was interrupted: its borrower has never seen the item."""
        slot.loan.clear()
        slot.frame = 0
        locked(self._lock, self._put_back, slot)
        self._attend()

    # -- taking back

    def _return(self, slot: Slot[T] | None, loan: float, commit: bool | None) -> None:
        """End a loan. `commit`: its block ended well (True) or with an exception (False), or it was no block (None)."""
        assert slot is not None
        try:
            now = self._clock()
            if not same_process[0]:
                fork.start_anew()
            try:
                found = slot.loan.pop()
            except IndexError:
                found = None
            if found is not loan:
                stale, slot = slot, None
                self._refuse_return(stale, loan, found)
                return
            slot.frame = 0
            slot.held.record(now - loan)
            if self._finish(slot, commit) and now < slot.expires:
                slot.since = now
                slot.good_until = min(slot.expires, now + self._trusted_for)
                back, slot = slot, None
                self._idle.append(back)
        except BaseException:
            back = stale = None
            if slot is None:
                self._attend()
            elif not slot.loan or slot.loan[0] is loan:
                slot.loan.clear()
                lost, slot = slot, None
                self._retire(lost, discarded=True)
            raise
        if slot is not None:
            self._retire(slot, discarded=True)
        elif self._attention:
            self._attend()

    def _refuse_return(self, slot: Slot[T], loan: float, current: float | None) -> None:
        """Say that a loan had ended before: an error, unless the pool itself ended it or this is another process."""
        if current is not None:
            slot.loan.append(current)
        if slot in self._slots and loan not in self._reclaimed_loans:
            raise ForeignItem(f"{slot.item!r} was returned to {self!r} before the block that it was lent to had ended")

    def _attend(self) -> None:
        """See to what a free slot or a change of the books may have made possible."""
        line = self._line
        if (
            self._closed
            or len(self._slots) > self._max_size
            or (self._idle and (line.woken is None or self._clock() >= line.overdue_at))
        ):
            self._close_all(locked(self._lock, self._settle))

    def _reclaim(self) -> bool:
        """Take back what nobody can be using any more; tell whether there was any."""
        lost = locked(self._lock, self._find_lost)
        found = bool(lost)
        while lost:
            self._take_back_lost(lost.pop())
        return found

    def _take_back_lost(self, slot: Slot[T]) -> None:
        info = slot.lease_info(self._clock())
        if info is None:  # lost on its way, by an interrupted call of the pool itself: nobody knows in which state
            self._retire(slot, discarded=True)
            return
        locked(self._lock, self._count_reclaimed, slot.loan[0])
        self._return(slot, slot.loan[0], None)
        warnings.warn(
            f"pool {self.name!r} took back an item that was lost without being returned: {info}", ResourceWarning, 3
        )

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
            if self._max_lifetime is not None:
                expires = self._clock() + self._max_lifetime * (1 - _JITTER * random.random())
            locked(self._lock, self._admit, slot, item, reclaim.parts_of(item), expires)
        except BaseException:
            if slot.item is not None:
                self._undo_checkout(slot)
            else:
                try:
                    if item is not None and id(item) not in self._index:
                        self._dispose(slot, item)
                finally:
                    self._close_all(locked(self._lock, self._forget, slot, False))
            raise

    def _retire(self, slot: Slot[T], discarded: bool) -> None:
        """Close the slot's item, then give its place away."""
        try:
            if slot.item is not None:
                self._dispose(slot, slot.item)
        finally:
            self._close_all(locked(self._lock, self._forget, slot, discarded))

    def _close_all(self, slots: list[Slot[T]]) -> None:
        while slots:
            self._retire(slots.pop(), discarded=False)

    # -- user code, run without the lock; `ConnectionPool` has its own

    def _create(self, slot: Slot[T], deadline: float | None) -> T:
        """Make the item of `slot`, by the monotonic time `deadline` where that can be had."""
        return self._factory()

    def _finish(self, slot: Slot[T], commit: bool | None) -> bool:
        """End what the borrower was doing, and tell whether the item may be lent again."""
        try:
            self._reset(slot.item)
        except Exception:
            logger.warning("pool %r closes an item: its reset failed", self.name, exc_info=True)
            return False
        return True

    def _is_good(self, slot: Slot[T], idle_for: float) -> bool:
        """Tell whether an item that was idle for so many seconds may still be lent."""
        if self._max_idle is not None and idle_for >= self._max_idle and len(self._slots) > self._min_size:
            return False
        if self._check is None or idle_for < _CHECK_AFTER:
            return True
        try:
            return bool(self._check(slot.item))
        except Exception:
            logger.warning("pool %r replaces an item: its check failed", self.name, exc_info=True)
            return False

    def _dispose(self, slot: Slot[T], item: T) -> None:
        """Close `item`."""
        try:
            self._closer(item)
        except Exception:
            logger.warning("pool %r could not close an item", self.name, exc_info=True)

    def _tend(self, now: float) -> None:
        """Do what is due from time to time, when somebody asks for an item."""
        if now >= self._tend_at:
            self._close_all(locked(self._lock, self._trim, now))

    # -- forked children

    def _start_anew(self) -> None:
        """In a forked child: leave all that was inherited alone for ever, and begin with empty books."""
        for slot in list(self._slots):
            self._abandon(slot)
            slot.condemn()
            slot.loan.clear()
        closed = self._closed
        self._open_books()
        self._closed = closed
        self._look()

    def _abandon(self, slot: Slot[T]) -> None:
        if slot.item is not None:
            fork.keep_forever(slot.item)
