"""Promise 10: `close`, `drain`, `discard` and `resize`, at rest and under way."""

from __future__ import annotations

import threading
from time import monotonic

import pytest
from pool_support import PATIENCE, Factory, Item, eventually, held, start

from sqlitepool import ForeignItem, Pool, PoolClosed, PoolTimeout


@pytest.fixture(autouse=True)
def only_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who waits looks around by itself: what is not handed out or notified is not seen."""
    monkeypatch.setattr("sqlitepool.lending._PATIENCE", 3600.0)


# -- close


def test_close_closes_the_idle_and_refuses_new_borrowers() -> None:
    factory = Factory()
    pool = Pool(factory, min_size=3)
    assert pool.close() == []
    assert all(item.closed for item in factory.made)
    for call in (pool.acquire, pool.connection().__enter__, lambda: pool.resize(2), lambda: pool.acquire(timeout=0)):
        with pytest.raises(PoolClosed, match=pool.name):
            call()
    assert pool.stats().size == 0


def test_close_may_be_called_again_and_from_any_thread() -> None:
    factory = Factory()
    pool = Pool(factory, min_size=4, close=factory.close)
    barrier = threading.Barrier(8)

    def close() -> None:
        barrier.wait(PATIENCE)
        assert pool.close() == []

    for thread in [start(close) for _ in range(8)]:
        thread.result(PATIENCE)
    pool.close()
    assert factory.alive == 0  # each closed once: Item.close would complain


def test_the_end_of_the_pools_block_closes_it() -> None:
    with pytest.raises(LookupError), Pool(Factory(), min_size=1) as pool:
        raise LookupError
    with pytest.raises(PoolClosed):
        pool.acquire()


def test_close_wakes_every_waiter_with_pool_closed() -> None:
    pool = Pool(Factory(), max_size=1)
    with held(pool):
        waiters = [start(pool.acquire, timeout) for timeout in (None, 5.0, 60.0, None)]
        eventually(lambda: pool.stats().waiting == 4)
        began = monotonic()
        pool.close()
        for waiter in waiters:
            with pytest.raises(PoolClosed, match="waited"):
                waiter.result(PATIENCE)
        assert monotonic() - began < 4
        assert pool.stats().waiting == 0


@pytest.mark.parametrize("way", ["with", "release", "discard"])
def test_a_lent_item_is_closed_on_its_return(way: str) -> None:
    factory = Factory()
    pool = Pool(factory)
    if way == "with":
        with pool.connection() as item:
            still_out = pool.close()
            assert not item.closed
    else:
        item = pool.acquire()
        still_out = pool.close()
        assert not item.closed
        getattr(pool, way)(item)
    assert item.closed
    assert len(still_out) == 1
    assert pool.close() == []


def test_close_with_a_timeout_reports_who_is_still_out() -> None:
    pool = Pool(Factory())
    with held(pool, 2) as go:
        began = monotonic()
        still_out = pool.close(timeout=0.05)
        assert 0.05 <= monotonic() - began < 5
        assert [info.thread_name for info in still_out] == ["holder-0", "holder-1"]
        assert all("pool_support.py:" in info.where and "in hold" in info.where for info in still_out)
        go.set()
    assert pool.close(timeout=PATIENCE) == []


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_close_with_a_timeout_waits_until_all_are_back(timeout: float | None) -> None:
    factory = Factory()
    pool = Pool(factory, close=factory.close)
    with held(pool, 3) as go:
        closing = start(pool.close, timeout)
        eventually(lambda: "closed" in repr(pool))
        assert not closing.done()
        go.set()
        began = monotonic()
        assert closing.result(PATIENCE) == []
        assert monotonic() - began < 0.9, "it is woken, and does not look now and then"
    assert factory.alive == 0


def test_close_while_an_item_is_opened() -> None:
    opening, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        opening.set()
        assert go.wait(PATIENCE)

    factory = Factory(slow)
    pool = Pool(factory, close=factory.close)
    borrower = start(pool.acquire)
    assert opening.wait(PATIENCE)
    closing = start(pool.close, None)
    eventually(lambda: "closed" in repr(pool))
    assert not closing.done()
    go.set()
    with pytest.raises(PoolClosed):
        borrower.result(PATIENCE)
    assert closing.result(PATIENCE) == []
    assert factory.alive == 0
    assert pool.stats().size == 0


def test_close_under_load_leaves_nothing_open() -> None:
    for _ in range(10):
        factory = Factory()
        pool = Pool(factory, max_size=3, close=factory.close)
        barrier = threading.Barrier(9)

        def borrow(pool: Pool[Item] = pool, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(PATIENCE)
            while True:
                with pool.connection() as item:
                    assert not item.closed

        threads = [start(borrow) for _ in range(8)]
        barrier.wait(PATIENCE)
        assert pool.close(timeout=PATIENCE) == []
        for thread in threads:
            with pytest.raises(PoolClosed):
                thread.result(PATIENCE)
        assert factory.alive == 0
        assert pool.stats().size == 0


# -- drain


def test_drain_replaces_the_idle_now_and_the_lent_on_their_return() -> None:
    factory = Factory()
    pool = Pool(factory, close=factory.close)
    a, b, c = [pool.acquire() for _ in range(3)]
    pool.release(c)
    pool.drain()
    assert (a.closed, b.closed, c.closed) == (False, False, True)
    pool.release(a)
    pool.release(b)
    assert (a.closed, b.closed) == (True, True)
    stats = pool.stats()
    assert (stats.size, stats.closed, stats.discarded) == (0, 3, 0)
    with pool.connection() as fresh:
        assert fresh not in (a, b, c)
    with pool.connection() as again:
        assert again is fresh


def test_what_is_opened_after_a_drain_stays() -> None:
    pool = Pool(Factory())
    old = pool.acquire()
    pool.drain()
    new = pool.acquire()
    pool.release(old)
    pool.release(new)
    assert pool.acquire() is new
    pool.release(new)


def test_an_item_that_was_being_opened_when_drain_was_called_is_replaced() -> None:
    """Its factory may have run before the change that the drain is for."""
    opening, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        if number == 1:
            opening.set()
            assert go.wait(PATIENCE)

    factory = Factory(slow)
    pool = Pool(factory, close=factory.close)
    borrower = start(lambda: pool.release(pool.acquire()))
    assert opening.wait(PATIENCE)
    pool.drain()
    go.set()
    borrower.result(PATIENCE)
    with pool.connection() as item:
        assert item.number > 1
    assert factory.made[0].closed


# -- discard


@pytest.mark.parametrize("then_release", [False, True])
def test_discard_returns_an_acquired_item_and_closes_it(then_release: bool) -> None:
    pool = Pool(Factory(), max_size=1)
    item = pool.acquire()
    pool.discard(item)
    if then_release:  # as a `finally` would
        pool.release(item)
    assert item.closed
    assert (pool.stats().size, pool.stats().discarded, pool.stats().in_use) == (0, 1, 0)
    with pool.connection() as other:
        assert other is not item
    if then_release:
        with pytest.raises(ForeignItem):
            pool.release(item)


def test_an_item_discarded_in_a_block_is_closed_when_the_block_ends() -> None:
    pool = Pool(Factory(), max_size=1)
    with pool.connection() as item:
        pool.discard(item)
        assert not item.closed
        pool.discard(item)
        with pytest.raises(PoolTimeout):
            pool.acquire(timeout=0)
    assert item.closed
    assert pool.stats().discarded == 1


def test_a_discard_lets_the_next_waiter_open() -> None:
    pool = Pool(Factory(), max_size=1)
    item = pool.acquire()
    waiter = start(pool.acquire)
    eventually(lambda: pool.stats().waiting == 1)
    pool.discard(item)
    other = waiter.result(PATIENCE)
    assert other is not item
    pool.release(other)


# -- resize


def test_resize_up_serves_those_who_wait_at_once() -> None:
    factory = Factory()
    pool = Pool(factory, max_size=1)
    with held(pool):
        waiters = [start(pool.acquire) for _ in range(3)]
        eventually(lambda: pool.stats().waiting == 3)
        pool.resize(4)
        items = [waiter.result(PATIENCE) for waiter in waiters]
        assert len(set(items)) == 3
        assert pool.stats().size == 4
        for item in items:
            pool.release(item)


def test_resize_down_closes_the_free_now_and_the_lent_on_their_return() -> None:
    factory = Factory()
    pool = Pool(factory, max_size=6, close=factory.close)
    items = [pool.acquire() for _ in range(6)]
    for item in items[4:]:
        pool.release(item)
    pool.resize(2)
    assert [item.closed for item in items] == [False] * 4 + [True] * 2
    for number, item in enumerate(items[:4]):
        pool.release(item)
        assert pool.stats().size == max(2, 3 - number)
    assert factory.alive == 2
    assert (pool.stats().max_size, pool.stats().size) == (2, 2)


@pytest.mark.parametrize("fairness", [0, 60])
def test_resize_down_holds_for_waiters_too(fairness: float) -> None:
    """An item too many is closed on its return, however many wait for it."""
    pool = Pool(Factory(), max_size=3, fairness=fairness)
    a, b, c = [pool.acquire() for _ in range(3)]
    waiter = start(pool.acquire)
    eventually(lambda: pool.stats().waiting == 1)
    pool.resize(1)
    pool.release(a)
    pool.release(b)
    assert pool.stats().size == 1
    assert (a.closed, b.closed) == (True, True)
    assert not waiter.done()
    pool.release(c)
    assert waiter.result(PATIENCE) is c
    pool.release(c)


def test_resize_moves_min_size() -> None:
    factory = Factory()
    pool = Pool(factory, max_size=4)
    pool.resize(4, 3)
    assert (factory.calls, pool.stats().min_size, pool.stats().idle) == (3, 3, 3)
    pool.resize(2)
    assert (pool.stats().min_size, pool.stats().size) == (2, 2)


def test_resize_up_and_down_under_load_ends_at_the_last_bound() -> None:
    factory = Factory()
    pool = Pool(factory, max_size=4, close=factory.close)
    stop = threading.Event()

    counts = [0] * 8

    def borrow(number: int) -> None:
        while not stop.is_set():
            with pool.connection():
                counts[number] += 1

    threads = [start(borrow, number) for number in range(8)]
    for size in (1, 6, 2, 5, 3) * 6:
        pool.resize(size)
    before = pool.stats().checkouts
    eventually(lambda: pool.stats().size <= 3)
    eventually(lambda: pool.stats().checkouts > before + 100 and all(counts))
    assert pool.stats().size <= 3
    stop.set()
    for thread in threads:
        thread.result(PATIENCE)
    assert factory.most <= 6 + 6
    assert pool.stats().size == factory.alive <= 3
