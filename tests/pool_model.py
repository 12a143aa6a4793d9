"""The model that a pool is compared with, and the hooks of its items: what `test_pool_machine` drives."""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize
from pool_support import PATIENCE, Clock

from sqlitepool import Pool

NEVER = float("inf")


class Thing:
    """An item. The model knows it by its number alone: who refers to the thing itself holds it."""

    def __init__(self, number: int, conn: object) -> None:
        self.number = number
        self.conn = conn


class FactoryFailed(Exception):
    """What the factory raises when it is told to."""


class TickingClock(Clock):
    """A nanosecond later each time: no two loans begin at once."""

    def __call__(self) -> float:
        self.now += 1e-9
        return self.now


@dataclass
class Resting:
    """An idle item."""

    number: int
    since: float
    expires: float


@dataclass(eq=False)
class Loan:
    """An item that is lent, and the `with` block it is lent to, if it is not from `acquire`."""

    thing: Thing
    since: float
    expires: float
    block: Generator[Thing] | None = None
    spoiled: bool = False

    @property
    def number(self) -> int:
        return self.thing.number


def is_free(machine: PoolModel) -> bool:
    return not machine.closed and (bool(machine.idle) or machine.size < machine.max_size)


class PoolModel(RuleBasedStateMachine):
    """A pool, what it must have by now, and what the hooks of its items saw."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr("sqlitepool.lending._PATIENCE", 3600.0)  # who waits does not look around by itself
        self.patches.setattr("sqlitepool.lending._JITTER", 0.0)
        self.patches.setattr("sqlitepool.pool.logger.disabled", True)  # hooks fail by the hundred
        self.clock = TickingClock(self.patches)
        self.folder = tempfile.TemporaryDirectory()
        self.closed = False
        # the model
        self.idle: list[Resting] = []
        self.loans: list[Loan] = []
        self.waiters: deque[Future[Thing]] = deque()
        self.gone: set[int] = set()
        self.checkouts = self.timeouts = self.discarded = self.reclaimed = self.waited = self.waited_in_vain = 0
        self.held: list[float] = []
        # what the hooks saw, and how often they are to fail
        self.made: list[int] = []
        self.closings: Counter[int] = Counter()
        self.checked: list[int] = []
        self.failed_checks: list[int] = []
        self.complaints: list[str] = []
        self.failing_opens = self.failing_resets = self.failing_checks = 0

    def make_pool(self, **options: Any) -> Pool[Thing]:
        return Pool(lambda: self.open_thing(None), **options)

    @initialize(
        max_size=st.integers(1, 4),
        min_size=st.integers(0, 2),
        fairness=st.sampled_from([0, 0.005]),
        max_waiting=st.sampled_from([None, 0, 2]),
        max_idle=st.sampled_from([None, 20.1234]),  # no sum of the times that pass comes within nanoseconds of these
        max_lifetime=st.sampled_from([None, 300.1234]),
        check=st.booleans(),
    )
    def begin(self, max_size: int, min_size: int, check: bool, **options: Any) -> None:
        self.max_size, self.min_size = max_size, min(min_size, max_size)
        self.least = self.min_size  # the greatest `min_size` ever
        self.max_idle: float = options["max_idle"] or NEVER
        self.max_lifetime: float = options["max_lifetime"] or NEVER
        self.max_waiting: float = NEVER if options["max_waiting"] is None else options["max_waiting"]
        self.check = check
        self.pool = self.make_pool(
            max_size=self.max_size,
            min_size=self.min_size,
            reset=self.reset_thing,
            check=self.check_thing if check else None,
            close=self.close_thing,
            **options,
        )
        self.fill()

    # -- hooks

    def open_thing(self, conn: object) -> Thing:
        self.lock_is_free("factory")
        if self.failing_opens:
            self.failing_opens -= 1
            raise FactoryFailed
        thing = Thing(len(self.made) + 1, conn)
        self.made.append(thing.number)
        return thing

    def reset_thing(self, thing: Thing) -> None:
        self.lock_is_free("reset")
        if self.failing_resets:
            self.failing_resets -= 1
            raise LookupError("reset failed")

    def check_thing(self, thing: Thing) -> bool:
        self.lock_is_free("check")
        self.checked.append(thing.number)
        if self.failing_checks:
            self.failing_checks -= 1
            self.failed_checks.append(thing.number)
            return False
        return True

    def close_thing(self, thing: Thing) -> None:
        self.lock_is_free("close")
        self.closings[thing.number] += 1
        if thing.number % 3 == 0:
            raise LookupError("close failed: an item counts as closed all the same")

    def lock_is_free(self, hook: str) -> None:
        """Promise 5. A hook's exception would be swallowed, so the complaint is kept for later."""
        lock: Any = self.pool._lock if hasattr(self, "pool") else None  # none yet: `min_size` is opened at once
        if lock is not None and lock._is_owned():
            self.complaints.append(f"{hook} ran with the lock held")

    # -- the model

    @property
    def size(self) -> int:
        return len(self.idle) + len(self.loans)

    @property
    def acquired(self) -> list[Loan]:
        return [loan for loan in self.loans if loan.block is None]

    @property
    def blocks(self) -> list[Loan]:
        return [loan for loan in self.loans if loan.block is not None]

    def lent(self, thing: Thing, expires: float, block: Generator[Thing] | None = None) -> None:
        known = [loan.number for loan in self.loans]
        assert thing.number not in known, f"item {thing.number} is lent twice"
        assert thing.number not in self.closings, f"item {thing.number} is lent after its end"
        self.loans.append(Loan(thing, self.clock.now, expires, block))
        self.checkouts += 1

    def expiry(self) -> float:
        return self.clock.now + self.max_lifetime

    def fill(self) -> None:
        """Book what the pool opened by itself, to have `min_size`."""
        missing = max(0, self.min_size - self.size)
        known = self.gone.union((loan.number for loan in self.loans), (resting.number for resting in self.idle))
        new = [number for number in self.made if number not in known]
        assert len(new) == missing
        self.idle += [Resting(number, self.clock.now, self.expiry()) for number in new]

    def strike_off_the_old(self, timeout: float) -> None:
        """Book the idle items that the pool closed on a checkout; each must have had its reason."""
        now, spare = self.clock.now, self.size - self.min_size
        for resting in [resting for resting in self.idle if resting.number in self.closings]:
            if resting.number in self.failed_checks:
                self.discarded += 1
            elif now < resting.expires:
                assert now - resting.since >= self.max_idle, f"item {resting.number} was closed without a reason"
                assert spare > 0, "more items than min_size allows were closed for being idle"
                spare -= 1
            self.idle.remove(resting)
            self.gone.add(resting.number)
        if timeout == 0:  # there was time for one of them
            return
        late = min(self.max_idle, self.max_lifetime) / 4
        for resting in self.idle:
            assert now - late < resting.expires, "an item stays open long after its lifetime"
            assert self.least or now - late < resting.since + self.max_idle, "an item stays open long after max_idle"

    def returned(self, loan: Loan, failing_opens: int = 0) -> None:
        """Book the return of an item, which may serve a waiter, after so many for whom the factory fails."""
        surplus = self.size > self.max_size
        self.loans.remove(loan)
        self.held.append(self.clock.now - loan.since)
        self.discarded += loan.spoiled
        if loan.spoiled or surplus or self.closed or self.clock.now >= loan.expires:
            self.gone.add(loan.number)
        else:
            self.idle.append(Resting(loan.number, self.clock.now, loan.expires))
        self.serve_waiters(failing_opens)

    def serve_waiters(self, failing_opens: int = 0) -> None:
        """Promises 3 and 4: what is free by now goes to those who wait, in order, without another word."""
        while self.waiters and is_free(self):
            waiter = self.waiters.popleft()
            if failing_opens and not self.idle:  # which wakes the next
                failing_opens -= 1
                self.waited_in_vain += 1
                with pytest.raises(FactoryFailed):
                    waiter.result(PATIENCE)
                continue
            resting = self.idle.pop() if self.idle else None
            thing = waiter.result(PATIENCE)
            assert resting is None or thing.number == resting.number
            self.waited += 1
            self.lent(thing, self.expiry() if resting is None else resting.expires)
