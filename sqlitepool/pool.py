"""`Pool`: a bounded pool that lends items of any kind to threads and takes them back."""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable
from time import monotonic
from types import EllipsisType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

from sqlitepool import fork, limits
from sqlitepool.errors import ForeignItem, PoolClosed
from sqlitepool.lease import Lease, Slot, note_place
from sqlitepool.lending import MOST_PATIENCE, Lending
from sqlitepool.limits import NEVER
from sqlitepool.stats import LeaseInfo, PoolStats
from sqlitepool.waiting import locked

T = TypeVar("T")

logger = logging.getLogger("sqlitepool")
_numbers = itertools.count(1)
_new = object.__new__


def _rollback(item: Any) -> None:
    rollback = getattr(item, "rollback", None)
    if rollback is not None:
        rollback()


def close_item(item: Any) -> None:
    """Call `item.close()`, if there is such a method."""
    close = getattr(item, "close", None)
    if close is not None:
        close()


class Pool(Lending[T]):
    """Lends items to threads, each to one borrower at a time, and takes them back for reuse.

        pool = Pool(lambda: UserDatabase("app.db"), max_size=8)
        with pool.connection() as db:
            db.log_in("ann")

    Think of a counter with a few tools: whoever needs one takes it, or waits for the next that is brought back.

    Args:
        factory: called without arguments to make an item, when one is asked for and none is free.
        max_size: the most items alive at any time, those being opened included.
        min_size: so many are opened when the pool is made, and `max_idle` closes none of the last so many. There may be
            fewer for a while: an item closed for another reason (`drain`, `max_lifetime`, a failed `check`) is replaced
            when one is asked for.
        timeout: how long, in seconds, a caller waits for an item (None: for ever; 0: tries once).
        max_waiting: the most callers that may wait; one more gets `PoolFull` (None: no limit).
        max_idle: an item idle for so many seconds is closed (None: never). Looked at when items are asked for.
        max_lifetime: an item so many seconds old is replaced, less a random part of up to a tenth (None: never).
        fairness: free items may be taken by whoever asks until the longest waiter has waited so many seconds; from then
            on they are handed to the waiters in order. 0: always in order. While more than 32 wait it counts for
            longer, in proportion: twice with 64 waiters.
        reset: called with an item that comes back; if it fails the item is closed, and the failure logged. By default
            `item.rollback()`, if there is such a method.
        check: called with an item that was idle for a second or more before it is lent; if it returns false or fails,
            the item is replaced.
        close: called with an item at its end; if it fails that is logged. By default `item.close()`, if there is such a
            method.
        name: stands in errors and statistics.

    Raises:
        TypeError: `factory` or a hook is not callable, or a number is of the wrong type.
        ValueError: a number is out of range.

    `factory`, `reset`, `check` and `close` may take their time: no lock is held while they run. A `reset`, `check` or
    `close` that began in time is not cut short when the caller's `timeout` is over. What is not an `Exception`
    (`KeyboardInterrupt`, `SystemExit`) passes through to whoever made the call.
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
            limits.callable_or_none(hook, value)
        self._factory = factory
        self._reset = reset if reset is not None else _rollback
        self._check = check
        self._closer = close if close is not None else close_item
        self._max_size, self._min_size = limits.sizes(max_size, min_size)
        self._limits = limits.Limits.checked(timeout, max_waiting, max_idle, max_lifetime, fairness, check)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a text, not {name!r}")
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
            PoolDeadlock: every item is held by a `with` block of a thread that waits for this pool. Only the block of a
                `with` statement in the very frame that waits, or in one that called it, is proof of that: a block in a
                `@contextmanager` function, or in an `ExitStack`, has its time out instead.
            PoolFull: `max_waiting` callers wait already.
            PoolClosed: the pool is closed.
            Exception: whatever the factory raised.
        """
        if timeout is not ...:
            limits.timeout(timeout)
        lease: Lease[T] = _new(Lease)  # `Lease(self, timeout)` for a third less: this is the quick way
        lease._pool = self
        lease._timeout = timeout
        lease._slot = None
        return lease

    def acquire(self, timeout: float | EllipsisType | None = ...) -> T:
        """Take an item, to be returned with `release` or `discard`. The arguments and errors are `connection`'s."""
        lease = Lease(self, limits.timeout(timeout))
        lost: Slot[T] | None
        try:
            item = lease.__enter__()
            slot, lease._slot = lease._slot, None
            assert slot is not None
            note_place(slot, sys._getframe(1))
            slot.frame = 0
            return item
        except BaseException:
            slot, lease._slot = lease._slot, None
            if slot is not None:
                lost, slot = slot, None
                self._undo_checkout(lost)
                lost = None
            raise

    def release(self, item: T) -> None:
        """Return an item that `acquire` lent. Do so once: afterwards it may be lent to somebody else.

        Raises:
            ForeignItem: it is not on loan from this pool, or was returned before and has not been lent again since. If
                it has, a second `release` ends the loan of the new borrower, which looks just the same: a `with` block,
                whose lease knows its own loan, is safe from that.
        """
        found = self._find_loan(item, "release")
        if found is not None:
            self._return(*found, None)

    def discard(self, item: T) -> None:
        """Have a lent item closed on its return, so that it is never lent again.

        An item from `acquire` is returned by this, and a `release` after it does nothing. An item of a `with` block
        is closed when the block ends.

        Raises:
            ForeignItem: as `release`.
        """
        found = self._find_loan(item, "discard")
        if found is None:
            return
        slot, loan = found
        slot.spoiled = True
        slot.condemn()
        if not slot.frame:
            self._remember_discarded(item)
            self._return(slot, loan, None)

    def _find_loan(self, item: T, verb: str) -> tuple[Slot[T], float] | None:
        """Find the loan of `item`; None if there is none and that is no error."""
        self._notice_fork()
        slot = self._index.get(id(item))
        if slot is not None and slot.item is item:
            try:
                return slot, slot.loan[0]
            except IndexError:
                raise ForeignItem(f"cannot {verb} {item!r}: it was returned to {self!r} before") from None
        discarded = self._discarded_items.pop(id(item), None)
        if fork.is_kept(item) or (discarded is not None and discarded() is item):
            return None
        raise ForeignItem(f"cannot {verb} {item!r}: it is not on loan from {self!r}")

    def _remember_discarded(self, item: T) -> None:
        """Know `item` again as long as it lives. A `WeakValueDictionary` would run code of its own when it dies."""
        for key, known in list(self._discarded_items.items()):
            if known() is None:
                self._discarded_items.pop(key, None)
        try:
            self._discarded_items[id(item)] = weakref.ref(item)
        except TypeError:  # there are no weak references to such an item
            pass

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
            min_size = min(self._min_size, limits.count("max_size", max_size, 1))
        sizes = limits.sizes(max_size, min_size)
        self._notice_fork()
        self._close_all(locked(self._lock, self._resized, *sizes))
        self._fill()

    def drain(self) -> None:
        """Replace every item by and by: the free ones are closed now, the lent ones on their return.

        For a change that only new items show, such as an SQL function that `setup` has begun to register. Does nothing
        to a closed pool, whose items are closed on their return anyway.
        """
        self._notice_fork()
        self._close_all(locked(self._lock, self._condemn_all))

    def close(self, timeout: float | None = 0.0) -> list[LeaseInfo]:
        """Close the pool: nobody gets an item any more, waiters get `PoolClosed`, lent items are closed on return.

        May be called again, and from any thread.

        Args:
            timeout: how long to wait, in seconds, for lent items to come back (None: for ever).

        Returns:
            The items still out, empty if all came back.

        Raises:
            PoolDeadlock: with `timeout=None`, in a `with` block that has an item: that one could never come back. The
                pool is closed all the same.
        """
        wait = limits.optional_seconds("timeout", timeout)
        deadline = NEVER if wait is None else monotonic() + wait
        self._notice_fork()
        self._close_all(locked(self._lock, self._shut))
        while True:
            self._reclaim()
            left = deadline - monotonic()
            if left <= 0 or locked(self._lock, self._wait_for_returns, min(left, MOST_PATIENCE), wait is None):
                return self.leases()

    def stats(self) -> PoolStats:
        """Describe the pool at this moment. Takes lost items back first, so that `in_use` counts those in use."""
        self._notice_fork()
        self._reclaim()
        return locked(self._lock, self._snapshot)

    def leases(self) -> list[LeaseInfo]:
        """Return who holds what, the longest first."""
        self._notice_fork()
        self._reclaim()
        return locked(self._lock, self._lease_infos, monotonic())

    def __enter__(self) -> Self:
        if self._closed:
            raise PoolClosed(f"{self!r} is closed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied or pickled: its items would be lent twice")

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
        max_idle = self._limits.max_idle
        if max_idle is not None and idle_for >= max_idle and len(self._slots) > self._min_size:
            return False
        if self._check is None or not self._limits.check_is_due(idle_for):
            return True
        try:
            slot.spoiled = not self._check(slot.item)
        except Exception:
            logger.warning("pool %r replaces an item: its check failed", self.name, exc_info=True)
            slot.spoiled = True
        return not slot.spoiled

    def _dispose(self, slot: Slot[T], item: T) -> None:
        """Close `item`."""
        try:
            self._closer(item)
        except Exception:
            logger.warning("pool %r could not close an item", self.name, exc_info=True)

    def _tend(self, now: float) -> None:
        """Do what is due from time to time, when somebody asks for an item, beside closing the old ones."""

    # -- forked children

    def _start_anew(self) -> None:
        """In a forked child: leave all that was inherited alone for ever, and begin with empty books."""
        for slot in list(self._slots):
            self._abandon(slot)
            fork.keep_forever(slot.borrower)  # to let go of a thread of the parent can crash (CPython 3.13)
            slot.condemn()
            slot.loan.clear()
        closed = self._closed
        self._open_books()
        self._closed = closed
        self._look()

    def _abandon(self, slot: Slot[T]) -> None:
        if slot.item is not None:
            fork.keep_forever(slot.item)
