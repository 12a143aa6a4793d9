"""The books of a pool: which slots there are, who waits, and what is to happen next.

The methods here are decisions: they are called with the lock held (through `waiting.locked`), change the books, and
return what the pool then has to open or close with the lock free. None of them calls user code.
"""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import Generic, NoReturn, TypeVar

from sqlitepool import deadlock, reclaim
from sqlitepool.errors import PoolClosed, PoolFull, PoolTimeout
from sqlitepool.lease import Slot
from sqlitepool.limits import NEVER, Limits
from sqlitepool.stats import Counts, LeaseInfo, PoolStats
from sqlitepool.waiting import Line, Waiter

T = TypeVar("T")

# How many of the longest holders a `PoolTimeout` names.
_HOLDERS_NAMED = 3
# How many reclaimed loans are remembered, so that a late end of their blocks is no error.
_RECLAIMED_KNOWN = 1000


class Books(Generic[T]):
    """The state of a `Pool`, and the decisions on it.

    Attributes that the quick way reads without the lock:
        _idle: the free slots, the one used last at the right end.
        _quiet_until: until this monotonic time a checkout may simply take a free slot.
        _tend_at: from this monotonic time on a checkout must see to what is due from time to time.
        _attention: a return must see whether somebody waits, the pool is closed, or there is a slot too many.
    """

    name: str
    _max_size: int
    _min_size: int
    _limits: Limits

    def _open_books(self) -> None:
        self._lock = threading.RLock()
        self._gone = threading.Condition(self._lock)
        self._line: Line[Slot[T]] = Line(self._limits.fairness)
        self._idle: deque[Slot[T]] = deque()
        self._slots: set[Slot[T]] = set()
        self._index: dict[int, Slot[T]] = {}
        self._reclaimed_loans: deque[float] = deque(maxlen=_RECLAIMED_KNOWN)
        self._closed = False
        self._attention = False
        self._trim_at = monotonic() + self._limits.trim_every
        self._watch_at = NEVER
        self._tend_at = self._trim_at
        self._quiet_until = self._trim_at
        self._counts = Counts()

    def _look(self) -> None:
        """Work out anew what the quick way may do without asking, and wake the longest waiter if there is something for
        it, unless a wake-up is under way already. To be called after each change of the books.
        """
        line, size = self._line, len(self._slots)
        if self._closed or size > self._max_size:
            self._attention = True
            self._quiet_until = -NEVER
            return
        self._attention = len(line) > 0
        overdue, tend = line.overdue_at, self._tend_at
        self._quiet_until = overdue if overdue < tend else tend
        if self._attention and line.woken is None and (self._idle or size < self._max_size):
            line.wake_head()

    # -- asking for an item

    def _free_slot(self) -> Slot[T] | None:
        if len(self._slots) > self._max_size:
            return None
        try:
            return self._idle.pop()
        except IndexError:
            pass
        return self._new_slot(self._max_size)

    def _claim_new(self, started: float) -> Slot[T]:
        """Give the caller a new slot if there is room, else the error that its time is up."""
        if self._closed:
            raise PoolClosed(f"{self!r} is closed")
        slot = self._new_slot(self._max_size)
        if slot is None:
            self._fail_late(started)
        return slot

    def _fail_late(self, started: float) -> NoReturn:
        """Tell the caller that its time is up."""
        raise self._timed_out(monotonic(), started)

    def _new_slot(self, most: int) -> Slot[T] | None:
        """Enter a new slot in the books if there are fewer than `most`."""
        if len(self._slots) >= most:
            return None
        slot: Slot[T] = Slot()
        self._slots.add(slot)  # and count again: a finalizer or a signal handler may have done the same meanwhile
        if len(self._slots) <= most:
            return slot
        self._slots.discard(slot)
        return None

    def _line_up(self, waiter: Waiter[Slot[T]], started: float, seconds: float) -> None:
        """Serve the caller if something is free, else have it sleep in the line. There are five cases:

        1. The pool is closed: nobody gets anything.
        2. Somebody has waited for too long: it is their turn, not the caller's.
        3. A slot is free: take it.
        4. There is room for one more: take a new slot, to be opened by the caller (its item is None).
        5. Wait, if the caller may and `max_waiting` allows it.
        """
        if self._closed:
            raise PoolClosed(f"{self!r} is closed")
        if waiter.since < self._line.overdue_at:
            waiter.given = self._free_slot()
            if waiter.given is not None:
                return
        line, most = self._line, self._limits.max_waiting
        if seconds <= 0:
            raise self._timed_out(waiter.since, started)
        if most is not None and len(line) >= most:
            raise PoolFull(f"{self._state()}: as many callers wait already as max_waiting allows")
        line.join(waiter)
        self._attention = True  # from now on, who returns something looks; what was returned before is seen here
        if len(line) == 1 or (self._idle and line.woken is None):
            self._look()
        self._sleep(waiter, seconds)

    def _sleep(self, waiter: Waiter[Slot[T]], seconds: float) -> None:
        """Have the caller sleep in the line until it is woken, at most for so long; then take what is free for it."""
        line = self._line
        if line.woken is not waiter and waiter.error is None:  # neither came between two sleeps
            waiter.condition.wait(seconds)
        if waiter.error is not None:
            return
        if line.woken is waiter:
            line.woken = None  # first: what is returned after this wakes again
        elif line.head() is not waiter:
            return
        waiter.given = self._free_slot()
        if waiter.given is not None:
            self._counts.count_wait(monotonic() - waiter.since)
            line.leave(waiter)
        self._look()

    def _leave(self, waiter: Waiter[Slot[T]]) -> None:
        """Take the caller out of the line, and take back what it has taken in the meantime."""
        self._line.leave(waiter)
        given, waiter.given = waiter.given, None
        if given is not None:
            self._put_back(given)
        self._look()

    def _give_up(self, waiter: Waiter[Slot[T]], started: float) -> None:
        """Have the caller fail, unless its wait has ended by itself."""
        if waiter.given is None and waiter.error is None:
            raise self._timed_out(monotonic(), started)

    def _timed_out(self, now: float, started: float) -> PoolTimeout:
        self._counts.timeouts += 1
        named = "; ".join(map(str, self._lease_infos(now, _HOLDERS_NAMED))) or "nobody at this moment"
        return PoolTimeout(f"{self._state()}: nothing came free in {now - started:.3f} s. Held longest by: {named}")

    def _settle(self) -> list[Slot[T]]:
        """Return the slots that nobody may have, and that the caller is to close."""
        surplus: list[Slot[T]] = []
        while self._closed or len(self._slots) - len(surplus) > self._max_size:
            try:
                surplus.append(self._idle.popleft())
            except IndexError:
                break
        self._look()
        return surplus

    def _put_back(self, slot: Slot[T]) -> None:
        """Take a slot back that nobody has used."""
        if slot.item is None:
            self._slots.discard(slot)
        else:
            self._idle.append(slot)

    # -- opening and closing

    def _admit(self, slot: Slot[T], item: T, parts: dict[int, float], expires: float) -> None:
        """Enter a newly opened item in the books."""
        if self._closed:
            raise PoolClosed(f"{self!r} was closed while an item was opened")
        twin = self._index.get(id(item))
        if twin is not None and twin.item is item:
            raise ValueError(f"the factory of {self!r} returned the same object twice: {item!r}")
        slot.parts = parts
        slot.since = monotonic()
        slot.expires = min(slot.expires, expires)
        slot.good_until = min(slot.expires, slot.since + self._limits.trusted_for)
        self._index[id(item)] = slot
        slot.item = item
        self._counts.opened += 1

    def _claim_missing(self) -> Slot[T] | None:
        """Take a new slot if fewer than `min_size` are there."""
        return None if self._closed else self._new_slot(self._min_size)

    def _forget(self, slot: Slot[T]) -> list[Slot[T]]:
        """Strike a slot whose item is closed, or was never opened, off the books."""
        if slot in self._slots:
            if slot.item is not None:
                if self._index.get(id(slot.item)) is slot:
                    del self._index[id(slot.item)]
                self._counts.checkouts += slot.checkouts
                self._counts.held += slot.held.durations()
                self._counts.closed += 1
                self._counts.discarded += slot.spoiled
            slot.item = None  # type: ignore[assignment]  # the slot is dead
            self._slots.discard(slot)
        if self._closed and not self._slots:
            self._gone.notify_all()
        return self._settle()

    def _trim(self, now: float) -> list[Slot[T]]:
        """Take the slots that are too old, or idle for too long, out of the books' free ones."""
        self._trim_at = now + self._limits.trim_every
        self._tend_at = min(self._trim_at, self._watch_at)
        spare = len(self._slots) - self._min_size
        max_idle = self._limits.max_idle
        surplus, kept = [], []
        while self._idle:
            try:
                slot = self._idle.popleft()
            except IndexError:
                break
            if now >= slot.expires or (spare > 0 and max_idle is not None and now - slot.since >= max_idle):
                surplus.append(slot)
                spare -= 1
            else:
                kept.append(slot)
        self._idle.extendleft(reversed(kept))
        self._look()
        return surplus

    def _trim_later(self, surplus: list[Slot[T]]) -> None:
        """Put back what was to be closed: whoever asks next goes on with it."""
        self._idle.extendleft(reversed(surplus))
        self._trim_at = self._tend_at = -NEVER
        self._look()

    def _watch_from(self, moment: float) -> None:
        """Have checkouts call `_tend` from that monotonic time on."""
        self._watch_at = moment
        self._tend_at = min(self._trim_at, moment)
        self._look()

    def _condemn_all(self) -> list[Slot[T]]:
        """Have every item replaced: the free ones now, the lent ones on their return."""
        for slot in self._slots:
            slot.condemn()
        return self._take_idle()

    def _take_idle(self) -> list[Slot[T]]:
        taken: list[Slot[T]] = []
        while self._idle:
            try:
                taken.append(self._idle.pop())
            except IndexError:
                break
        return taken

    def _shut(self) -> list[Slot[T]]:
        """Close the books to new borrowers, and send the waiters away."""
        self._closed = True
        self._look()
        for waiter in list(self._line):
            self._line.fail(waiter, PoolClosed(f"{self!r} was closed while this call waited"))
        self._look()
        return self._take_idle()

    def _wait_for_returns(self, seconds: float, for_ever: bool) -> bool:
        """Sleep until the books of a closed pool are empty; tell whether they are."""
        if for_ever:
            deadlock.refuse_to_wait_for_own_block(self._slots)
        if self._slots:
            self._gone.wait(seconds)
        return not self._slots

    def _resized(self, max_size: int, min_size: int) -> list[Slot[T]]:
        if self._closed:
            raise PoolClosed(f"{self!r} is closed")
        self._max_size, self._min_size = max_size, min_size
        return self._settle()

    # -- looking after what went wrong

    def _find_lost(self) -> list[tuple[Slot[T], LeaseInfo | None, float | None]]:
        """Take the slots that nobody has, each with its loan; and out of the line those who left it without a word."""
        for waiter in reclaim.ghosts(self._line):
            self._line.leave(waiter)
        self._look()
        now = monotonic()
        found: list[tuple[Slot[T], LeaseInfo | None, float | None]] = []
        for slot, on_loan in reclaim.lost_slots(self._slots, tuple(self._idle), self._index):
            info = slot.lease_info(now)
            try:
                loan = slot.loan.pop() if on_loan else None
            except IndexError:  # somebody returns it at this very moment
                continue
            found.append((slot, info, loan))
            if loan is not None:
                self._counts.reclaimed += 1
                self._reclaimed_loans.append(loan)
        return found

    def _break_deadlock(self) -> None:
        """If those who wait hold everything between them, send the one that closed the circle away."""
        if self._idle or len(self._slots) < self._max_size:
            return
        circle = deadlock.find_circle(self._slots, self._line)
        if circle is not None:
            victim, error = circle
            self._line.fail(victim, type(error)(f"{self._state()}: {error}"))
            self._look()

    # -- telling

    def _lease_infos(self, now: float, most: int | None = None) -> list[LeaseInfo]:
        """Describe the `most` longest loans, the longest first."""
        lent = [(loan[0], slot) for slot in list(self._slots) if (loan := slot.loan[:])]
        lent.sort(key=lambda pair: pair[0])
        return [info for _, slot in lent[:most] if (info := slot.lease_info(now)) is not None]

    def _snapshot(self) -> PoolStats:
        slots = list(self._slots)
        idle = min(len(self._idle), len(slots))
        opening = sum(slot.item is None for slot in slots)
        counts = self._counts
        checkouts, held = counts.checkouts, counts.held
        for slot in slots:
            checkouts += slot.checkouts
            held += slot.held.durations()
        return PoolStats(
            name=self.name,
            size=len(slots),
            idle=idle,
            in_use=len(slots) - idle - opening,
            opening=opening,
            waiting=len(self._line),
            max_size=self._max_size,
            min_size=self._min_size,
            checkouts=checkouts,
            timeouts=counts.timeouts,
            opened=counts.opened,
            closed=counts.closed,
            discarded=counts.discarded,
            reclaimed=counts.reclaimed,
            wait_seconds=counts.waits.durations(),
            held_seconds=held,
        )

    def _state(self) -> str:
        """Describe the pool in a phrase, for errors: without user code, and cheap."""
        slots, idle, waiting = list(self._slots), len(self._idle), len(self._line)
        opening = sum(slot.item is None for slot in slots)
        in_use = max(0, len(slots) - idle - opening)  # as `stats()` counts
        between = in_use - sum(bool(slot.loan) for slot in slots)
        in_hooks = f" ({between} of them being reset, checked or closed)" if between > 0 else ""
        being_opened = f", {opening} being opened" if opening else ""
        return (
            f"pool {self.name!r} (size {len(slots)} of at most {self._max_size}, {in_use} in use{in_hooks}"
            f"{being_opened}, {waiting} waiting)"
        )

    def __repr__(self) -> str:
        closed = "closed, " if self._closed else ""
        size = f"size {len(self._slots)} of at most {self._max_size}"
        idle, waiting = len(self._idle), len(self._line)
        return f"<{type(self).__name__} {self.name!r}: {closed}{size}, {idle} idle, {waiting} waiting>"
