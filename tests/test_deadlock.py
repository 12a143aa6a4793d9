"""Promise 6: when nobody can go on, the one that closed the circle is told at once; and there is no false alarm."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from pool_support import PATIENCE, Item, eventually, held, start

from sqlitepool import Pool, PoolDeadlock, PoolTimeout

AT_ONCE = 3.0  # seconds; it takes some 20 ms


def make_pool(max_size: int, **options: Any) -> Pool[int]:
    return Pool(iter(range(1000, 2000)).__next__, max_size=max_size, **{"timeout": PATIENCE, **options})


def waiting(pool: Pool[Any], number: int) -> None:
    eventually(lambda: pool.stats().waiting == number)


def all_can_be_borrowed(pool: Pool[Any], count: int) -> bool:
    items = [pool.acquire(timeout=0) for _ in range(count)]
    for item in items:
        pool.release(item)
    return len(set(items)) == count


def nest(pool: Pool[int], depth: int) -> None:
    """Hold `depth` items in nested blocks, and ask for one more."""
    with pool.connection():
        if depth > 1:
            nest(pool, depth - 1)
        else:
            pool.acquire()


@pytest.mark.parametrize("fairness", [0, 0.005])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_thread_that_holds_everything_and_wants_more_is_told_at_once(size: int, fairness: float) -> None:
    pool = make_pool(size, fairness=fairness)
    began = time.monotonic()
    with pytest.raises(PoolDeadlock) as caught:
        nest(pool, size)
    assert time.monotonic() - began < AT_ONCE
    assert str(caught.value).count("test_deadlock.py") == size
    assert all_can_be_borrowed(pool, size)


def test_blocks_of_one_frame_are_told_too() -> None:
    pool = make_pool(2)
    with pytest.raises(PoolDeadlock), pool.connection(), pool.connection(), pool.connection():
        pass
    assert all_can_be_borrowed(pool, 2)


@pytest.mark.parametrize("size", [2, 3])
def test_of_a_ring_the_one_that_closed_it_is_told_and_the_others_go_on(size: int) -> None:
    pool = make_pool(size)
    closing = threading.Event()
    all_hold = threading.Barrier(size)

    def hold_and_want(last: bool) -> str:
        try:
            with pool.connection():
                all_hold.wait(PATIENCE)
                if last:
                    assert closing.wait(PATIENCE)
                with pool.connection():
                    return "went on"
        except PoolDeadlock:
            return "was told"

    others = [start(hold_and_want, False) for _ in range(size - 1)]
    last = start(hold_and_want, True)
    waiting(pool, size - 1)
    closing.set()
    assert last.result(AT_ONCE) == "was told"
    assert [other.result(AT_ONCE) for other in others] == ["went on"] * (size - 1)
    assert all_can_be_borrowed(pool, size)


def test_a_bystander_in_the_line_changes_nothing() -> None:
    """Another thread waits without holding anything: no reason to spare the deadlock, nor to punish the bystander."""
    pool = make_pool(1)
    closing, holding = threading.Event(), threading.Event()

    def hold_and_want() -> None:
        with pool.connection():
            holding.set()
            assert closing.wait(PATIENCE)
            with pytest.raises(PoolDeadlock):
                pool.acquire()

    def stand_by() -> None:
        with pool.connection():
            pass

    holder = start(hold_and_want)
    assert holding.wait(PATIENCE)
    bystander = start(stand_by)
    waiting(pool, 1)
    closing.set()
    holder.result(AT_ONCE)
    bystander.result(AT_ONCE)


# -- no false alarm. Each of these waits looks like a deadlock to those who ask only which thread took what.


def unharmed(wait: Future[Any], seconds: float = 0.3) -> None:
    """The wait goes on, for longer than a deadlock takes to be found."""
    threading.Event().wait(seconds)
    assert not wait.done(), wait.exception()


def test_a_lease_that_moved_on_to_other_threads_is_no_deadlock() -> None:
    """As FastAPI does it: entered on A, used on B, left on C; meanwhile A serves somebody else and waits."""
    pool = make_pool(1)

    @contextmanager
    def dependency() -> Iterator[int]:
        with pool.connection() as item:
            yield item

    entered, go_on = threading.Event(), threading.Event()
    leases = []

    def on_a() -> int:
        manager = dependency()
        leases.append((manager, manager.__enter__()))
        entered.set()
        assert go_on.wait(PATIENCE)
        with pool.connection() as item:
            return item

    a = start(on_a)
    assert entered.wait(PATIENCE)
    manager, item = leases.pop()
    go_on.set()
    waiting(pool, 1)
    unharmed(a)
    assert start(lambda: item + 0).result(PATIENCE) == item
    start(manager.__exit__, None, None, None).result(PATIENCE)
    assert a.result(PATIENCE) == item


def test_a_generator_suspended_while_its_caller_waits_is_no_deadlock_and_running_it_is() -> None:
    pool = make_pool(1)

    def block(inner: bool) -> Iterator[int]:
        with pool.connection() as item:
            if inner:
                pool.acquire()
            yield item

    with pytest.raises(PoolDeadlock):
        next(block(inner=True))
    suspended = block(inner=False)
    next(suspended)
    with pytest.raises(PoolTimeout) as caught:
        pool.acquire(timeout=0.2)
    assert not isinstance(caught.value, PoolDeadlock)
    del suspended
    assert all_can_be_borrowed(pool, 1)


def test_what_an_exit_stack_entered_is_no_proof() -> None:
    pool = make_pool(1)
    with ExitStack() as stack:
        stack.enter_context(pool.connection())
        wait = start(pool.acquire)
        with pytest.raises(PoolTimeout):
            pool.acquire(timeout=0.2)
        unharmed(wait, 0.05)
    pool.release(wait.result(PATIENCE))


def test_an_item_that_acquire_lent_may_come_back_from_anywhere() -> None:
    pool = make_pool(1)
    item = pool.acquire()
    wait = start(pool.acquire)
    with pytest.raises(PoolTimeout):
        pool.acquire(timeout=0.2)
    unharmed(wait, 0.05)
    start(pool.release, item).result(PATIENCE)
    pool.release(wait.result(PATIENCE))


def test_a_block_beside_an_item_in_the_hands_of_a_running_thread_is_no_deadlock() -> None:
    pool = make_pool(2)

    def hold_and_want() -> None:
        with pool.connection(), pool.connection():
            pass

    with held(pool, 1) as go:
        wait = start(hold_and_want)
        waiting(pool, 1)
        unharmed(wait)
        go.set()
        wait.result(PATIENCE)
    assert all_can_be_borrowed(pool, 2)


def test_a_block_beside_an_item_that_is_being_opened_is_no_deadlock() -> None:
    opening, opened = threading.Event(), threading.Event()
    made = iter((Item(1), Item(2)))

    def factory() -> Item:
        item = next(made)
        if item.number == 2:
            opening.set()
            assert opened.wait(PATIENCE)
        return item

    pool = Pool(factory, max_size=2, timeout=PATIENCE)

    def hold_and_want() -> None:
        with pool.connection():
            other = start(lambda: pool.release(pool.acquire()))
            assert opening.wait(PATIENCE)
            with pool.connection():
                other.result(PATIENCE)

    wait = start(hold_and_want)
    waiting(pool, 1)
    unharmed(wait)
    opened.set()
    wait.result(PATIENCE)


def test_a_block_beside_an_item_that_is_being_reset_is_no_deadlock() -> None:
    resetting, go = threading.Event(), threading.Event()

    def reset(item: Item) -> None:
        if threading.current_thread().name == "slow":
            resetting.set()
            assert go.wait(PATIENCE)

    pool = Pool(lambda: Item(1), max_size=2, timeout=PATIENCE, reset=reset)

    def hold_and_want() -> None:
        with pool.connection():
            slow = start(lambda: pool.release(pool.acquire()), name="slow")
            assert resetting.wait(PATIENCE)
            with pool.connection():
                slow.result(PATIENCE)

    wait = start(hold_and_want)
    waiting(pool, 1)
    unharmed(wait)
    go.set()
    wait.result(PATIENCE)


def test_a_block_of_another_pool_on_the_stack_proves_nothing() -> None:
    first, second = make_pool(1), make_pool(1)
    with held(second, 1) as go, first.connection():
        wait = start(lambda: second.release(second.acquire()))
        with pytest.raises(PoolTimeout) as caught:
            second.acquire(timeout=0.2)
        assert not isinstance(caught.value, PoolDeadlock)
        go.set()
        wait.result(PATIENCE)


def test_blocks_nested_within_the_size_never_alarm_however_busy_the_pool_is() -> None:
    """Eight threads nest two deep in a pool that is large enough for seven of them to hold one and one to hold two."""
    pool = make_pool(9)

    def work() -> None:
        for _ in range(200):
            with pool.connection() as outer, pool.connection() as inner:
                assert outer != inner

    for worker in [start(work) for _ in range(8)]:
        worker.result(PATIENCE)
    assert all_can_be_borrowed(pool, 9)
