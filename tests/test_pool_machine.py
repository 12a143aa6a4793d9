"""A pool must do what a simple model of it does, whatever is asked of it in whatever order: promises 1 to 5, 9 and 10.

The machine lends, takes back, loses, resizes, drains, closes, lets hooks fail, callers wait and time pass. The model is
a list of idle items in the order of their return, a list of loans, a line of waiters and a few counters. After each
step the pool's statistics must be the model's, to the last count.

Nothing is left to chance: the clock moves only when the machine says so, waiters look around only when notified, and
the machine waits until whoever must be served by now was served.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from pool_model import NEVER, FactoryFailed, Loan, PoolModel, Thing, is_free
from pool_support import PATIENCE, eventually, start

from sqlitepool import ConnectionPool, ForeignItem, Pool, PoolClosed, PoolFull, PoolTimeout

pytestmark = pytest.mark.timeout(600)  # a failure is made small before it is reported
BUDGET = settings(max_examples=100, stateful_step_count=50, derandomize=True, deadline=None)


def pick(loans: list[Loan], which: int) -> Loan:
    return loans[which % len(loans)]


def is_exhausted(machine: PoolModel) -> bool:
    return not machine.closed and not is_free(machine)


def has_acquired(machine: PoolModel) -> bool:
    return bool(machine.acquired)


def has_blocks(machine: PoolModel) -> bool:
    return bool(machine.blocks)


WHICH = st.integers(0, 3)
PAUSES = [0.004, 1.1, 4.5, 16.0, 61.0, 290.0]
RARELY = st.sampled_from([False, False, False, True])


class PoolMachine(PoolModel):
    """Drives a `Pool`; `ConnectionPoolMachine` does the same with connections."""

    # -- lending

    def block(self, timeout: float) -> Generator[Thing]:
        with self.pool.connection(timeout=timeout) as thing:
            yield thing

    @precondition(is_free)
    @rule(
        pause=st.sampled_from([0.0, 0.0, *PAUSES]),
        count=st.integers(1, 4),
        in_block=st.booleans(),
        at_once=st.booleans(),
        failing_checks=st.integers(0, 2),
    )
    def the_item_used_last_is_lent_first(
        self, pause: float, count: int, in_block: bool, at_once: bool, failing_checks: int
    ) -> None:
        self.clock.now += pause
        for _ in range(count):
            if is_free(self):
                self.lend(in_block, 0 if at_once else 30, failing_checks)

    def lend(self, in_block: bool, timeout: float, failing_checks: int) -> None:
        self.failing_checks = failing_checks
        block = self.block(timeout) if in_block else None
        thing = self.pool.acquire(timeout=timeout) if block is None else next(block)
        known = len(self.idle)
        self.strike_off_the_old(timeout)
        gave_up_on_idle_ones = timeout == 0 and len(self.idle) < known  # there was time to try one
        gave_up_on_idle_ones &= thing.number not in [resting.number for resting in self.idle]
        if self.idle and not gave_up_on_idle_ones:
            resting = self.idle.pop()
            assert thing.number == resting.number
            idle_for, expires = self.clock.now - resting.since, resting.expires
            assert self.clock.now < expires, "an item is lent after its lifetime"
            assert idle_for < self.max_idle or self.size < self.min_size, "an item is lent after max_idle"
            assert (thing.number in self.checked) == (self.check and idle_for >= 1.0)
        else:
            expires = self.expiry()
        self.lent(thing, expires, block)
        self.failing_checks = 0
        self.checked.clear()
        self.failed_checks.clear()

    @precondition(lambda self: len(self.idle) >= 2 and self.max_idle < NEVER and not self.closed)
    @rule()
    def an_item_too_long_idle_is_not_lent_even_if_the_pool_has_just_looked_for_such(self) -> None:
        self.clock.now += 0.8 * self.max_idle
        self.lend(False, 30, 0)  # it looks
        loan = self.loans[-1]
        self.pool.release(loan.thing)
        self.returned(loan)
        self.clock.now += 0.21 * self.max_idle  # it looks again after a quarter
        self.lend(False, 30, 0)
        self.lend(False, 30, 0)

    @precondition(lambda self: is_free(self) and not self.idle)
    @rule(timeout=st.sampled_from([0, 30]))
    def a_failed_open_costs_no_slot(self, timeout: float) -> None:
        self.failing_opens = 1
        with pytest.raises(FactoryFailed):
            self.pool.acquire(timeout=timeout)
        assert self.failing_opens == 0
        self.lend(False, timeout, 0)

    @precondition(is_exhausted)
    @rule()
    def who_cannot_wait_is_sent_away(self) -> None:
        if len(self.waiters) >= self.max_waiting:
            with pytest.raises(PoolFull):
                self.pool.acquire(timeout=30)
        with pytest.raises(PoolTimeout, match=rf"size {self.size} .* {self.size} in use, {len(self.waiters)} waiting"):
            self.pool.acquire(timeout=0)
        self.timeouts += 1

    # -- waiting

    def line_up(self, timeout: float | None) -> Future[Thing] | None:
        """Have another thread wait, if there is room in the line."""
        waiter = start(self.pool.acquire, timeout)
        if len(self.waiters) >= self.max_waiting:
            with pytest.raises(PoolFull):
                waiter.result(PATIENCE)
            return None
        eventually(lambda: waiter.done() or self.pool.stats().waiting == len(self.waiters) + 1)
        return waiter

    @precondition(lambda self: is_exhausted(self) and len(self.waiters) < 4)
    @rule(count=st.integers(1, 3))
    def some_wait(self, count: int) -> None:
        for _ in range(count):
            waiter = self.line_up(None)
            if waiter is not None:
                self.waiters.append(waiter)

    @precondition(is_exhausted)
    @rule()
    def a_waiter_gives_up_at_its_deadline_and_nobody_else_notices(self) -> None:
        waiter = self.line_up(0.01)
        if waiter is not None:
            self.clock.now += 0.01
            with pytest.raises(PoolTimeout):
                waiter.result(PATIENCE)
            self.timeouts += 1

    @precondition(lambda self: self.size)
    @rule(seconds=st.sampled_from(PAUSES))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    # -- taking back

    @precondition(has_blocks)
    @rule(which=WHICH, reset_fails=RARELY, end=st.sampled_from(["well", "with an error", "abandoned"]))
    def a_block_returns_its_item_however_it_ends(self, which: int, reset_fails: bool, end: str) -> None:
        loan = pick(self.blocks, which)
        assert loan.block is not None
        self.failing_resets = int(reset_fails)
        if end == "well":
            assert next(loan.block, None) is None
        elif end == "abandoned":
            loan.block.close()
        else:
            with pytest.raises(LookupError):
                loan.block.throw(LookupError())
        loan.spoiled |= reset_fails
        self.returned(loan)

    @precondition(has_blocks)
    @rule()
    def all_items_come_back_one_after_the_other(self) -> None:
        self.return_all()

    def return_all(self) -> None:
        while self.loans:
            loan = self.loans[0]
            if loan.block is None:
                self.pool.release(loan.thing)
            else:
                loan.block.close()
            self.returned(loan)

    @precondition(has_acquired)
    @rule(which=WHICH, reset_fails=RARELY)
    def a_released_item_is_lent_again_unless_its_reset_failed(self, which: int, reset_fails: bool) -> None:
        loan = pick(self.acquired, which)
        self.failing_resets = int(reset_fails)
        self.pool.release(loan.thing)
        loan.spoiled = reset_fails
        self.returned(loan)

    @precondition(lambda self: self.acquired and not self.waiters)  # a waiter would have the item again
    @rule(which=WHICH)
    def an_item_that_is_not_on_loan_is_refused(self, which: int) -> None:
        loan = pick(self.acquired, which)
        thing = loan.thing
        self.pool.release(thing)
        self.returned(loan)
        for give_back in (self.pool.release, self.pool.discard):
            for foreign in (thing, Thing(0, None)):
                with pytest.raises(ForeignItem):
                    give_back(foreign)

    @precondition(has_acquired)
    @rule(which=WHICH, failing_opens=st.integers(0, 2))
    def a_discarded_item_is_closed_and_a_failed_open_wakes_the_next_waiter(
        self, which: int, failing_opens: int
    ) -> None:
        loan = pick(self.acquired, which)
        thing = loan.thing
        self.failing_opens = failing_opens
        self.pool.discard(thing)
        assert self.closings[loan.number] == 1
        self.pool.release(thing)  # as in `finally`: once, it is no error
        with pytest.raises(ForeignItem):
            self.pool.release(thing)
        loan.spoiled = True
        self.returned(loan, failing_opens)
        self.failing_opens = 0

    @precondition(has_blocks)
    @rule(which=WHICH)
    def an_item_discarded_in_its_block_is_closed_when_the_block_ends(self, which: int) -> None:
        loan = pick(self.blocks, which)
        self.pool.discard(loan.thing)
        loan.spoiled = True

    @precondition(has_blocks)
    @rule(which=WHICH)
    def a_block_whose_item_was_released_in_it_says_so(self, which: int) -> None:
        loan = pick(self.blocks, which)
        assert loan.block is not None
        self.pool.release(loan.thing)
        number = loan.number
        self.returned(loan)
        if number in self.gone:  # there is nothing to say any more
            assert next(loan.block, None) is None
        else:
            with pytest.raises(ForeignItem):
                next(loan.block)

    @precondition(has_acquired)
    @rule(which=WHICH)
    def a_lost_item_comes_back_with_a_warning(self, which: int) -> None:
        loan = pick(self.acquired, which)
        loan.thing = Thing(loan.number, None)  # a stand-in: nobody has the item itself, once its thread has ended
        gc.collect()  # and no traceback of an error of before has it either
        with pytest.warns(ResourceWarning, match="lost without being returned: thread .* taken at "):
            eventually(lambda: self.pool.stats().reclaimed > self.reclaimed)
        self.reclaimed += 1
        self.returned(loan)

    # -- what owners do

    @precondition(lambda self: self.loans and not self.closed)
    @rule(max_size=st.sampled_from([1, 2, 3, 5, 6]), min_size=st.sampled_from([None, None, 0, 1, 2]))
    def a_new_bound_holds_at_once_for_what_is_free(self, max_size: int, min_size: int | None) -> None:
        self.a_new_bound(max_size, min_size)

    def a_new_bound(self, max_size: int, min_size: int | None) -> None:
        self.min_size = min(max_size, self.min_size if min_size is None else min_size)
        self.max_size, self.least = max_size, max(self.least, self.min_size)
        self.pool.resize(max_size, None if min_size is None else self.min_size)
        while self.idle and self.size > max_size:
            self.gone.add(self.idle.pop(0).number)
        self.serve_waiters()
        self.fill()

    @precondition(lambda self: len(self.waiters) >= 2)
    @rule(more=st.integers(2, 3))
    def a_wider_bound_serves_as_many_as_fit(self, more: int) -> None:
        self.a_new_bound(self.max_size + more, None)

    @precondition(lambda self: self.size >= 2)
    @rule()
    def drain_replaces_every_item_by_and_by(self) -> None:
        self.pool.drain()
        self.gone.update(resting.number for resting in self.idle)
        self.idle.clear()
        for loan in self.loans:
            loan.expires = -NEVER

    @precondition(lambda self: self.checkouts >= 15 and not self.closed)
    @rule()
    def close_refuses_new_borrowers_and_wakes_every_waiter(self) -> None:
        still_out = self.pool.close()
        assert len(still_out) == len(self.loans)
        self.closed = True
        self.gone.update(resting.number for resting in self.idle)
        self.idle.clear()
        assert len(self.pool.close()) == len(self.loans)  # again
        while self.waiters:
            with pytest.raises(PoolClosed):
                self.waiters.popleft().result(PATIENCE)

    @precondition(lambda self: self.closed)
    @rule()
    def a_closed_pool_stays_closed(self) -> None:
        for ask in (self.pool.acquire, lambda: next(self.block(30)), lambda: self.pool.resize(4)):
            with pytest.raises(PoolClosed):
                ask()

    # -- after each step

    @invariant()
    def idle_and_in_use_and_opening_are_size_and_size_is_bounded(self) -> None:
        stats = self.pool.stats()
        assert stats.idle + stats.in_use + stats.opening == stats.size
        assert stats.size <= stats.max_size or stats.idle == 0  # more only after `resize`, while they are lent
        assert (stats.max_size, stats.min_size) == (self.max_size, self.min_size)
        assert (stats.idle, stats.in_use, stats.opening) == (len(self.idle), len(self.loans), 0)

    @invariant()
    def counters_are_exact(self) -> None:
        stats = self.pool.stats()
        assert stats.opened == len(self.made)
        assert stats.closed == sum(self.closings.values())
        assert stats.checkouts == self.checkouts
        assert stats.timeouts == self.timeouts
        assert stats.discarded == self.discarded
        assert stats.reclaimed == self.reclaimed
        assert stats.held_seconds.count == len(self.held)
        assert stats.held_seconds.total == pytest.approx(sum(self.held), abs=1e-3)
        assert stats.held_seconds.max == pytest.approx(max(self.held, default=0.0), abs=1e-3)
        assert self.waited <= stats.wait_seconds.count <= self.waited + self.waited_in_vain

    @invariant()
    def every_closed_item_was_closed_once(self) -> None:
        assert set(self.closings) == self.gone
        assert self.closings.total() == len(self.gone)

    @invariant()
    def nobody_waits_for_what_is_free(self) -> None:
        assert self.pool.stats().waiting == len(self.waiters)
        assert not any(waiter.done() for waiter in self.waiters)
        assert not (self.waiters and is_free(self))

    @invariant()
    def every_loan_is_told_the_longest_first(self) -> None:
        ages = sorted((self.clock.now - loan.since for loan in self.loans), reverse=True)
        told = [lease.age for lease in self.pool.leases()]
        assert told == sorted(told, reverse=True)
        assert told == pytest.approx(ages, abs=1e-3)

    @invariant()
    def no_hook_ran_with_the_lock_held(self) -> None:
        assert not self.complaints

    def teardown(self) -> None:
        pool: Pool[Thing] | None = getattr(self, "pool", None)
        try:
            self.return_all()
            assert not self.waiters
            if pool is not None:
                assert pool.close() == []
                assert pool.stats().size == 0
            assert self.closings == Counter(self.made)
        finally:
            if pool is not None:
                pool.close()
            self.patches.undo()
            self.folder.cleanup()


class ConnectionPoolMachine(PoolMachine):
    """The same promises with connections to a file."""

    def make_pool(self, **options: Any) -> Pool[Thing]:
        return ConnectionPool(Path(self.folder.name, "app.db"), wrap=self.open_thing, **options)


TestPool = PoolMachine.TestCase
TestPool.settings = BUDGET
TestConnectionPool = ConnectionPoolMachine.TestCase
TestConnectionPool.settings = settings(BUDGET, max_examples=30)
