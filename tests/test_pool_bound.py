"""Promises 1, 2, 5 and 9: the bound, one deadline, hooks without the lock, reuse and age."""

from __future__ import annotations

import logging
import random
import threading
from time import monotonic

import pytest
from pool_support import PATIENCE, Clock, Factory, Item, eventually, held, start

from sqlitepool import Pool, PoolClosed, PoolFull, PoolTimeout


@pytest.fixture(autouse=True)
def only_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who waits looks around by itself: what is not handed out or notified is not seen."""
    monkeypatch.setattr("sqlitepool.lending._PATIENCE", 3600.0)


def empty(pool: Pool[Item]) -> bool:
    """Tell whether nothing is lent, opening or waiting."""
    stats = pool.stats()
    return (stats.in_use, stats.opening, stats.waiting) == (0, 0, 0)


# -- 1. bound


@pytest.mark.parametrize("fairness", [0, 0.005])
def test_never_more_than_max_size_items_are_alive_the_opening_ones_included(fairness: float) -> None:
    """32 threads; items fail to open, are discarded and resized away meanwhile. The factory itself counts."""

    def unreliable(number: int) -> None:
        pause.wait(0.0005)
        if number % 7 == 0:
            raise OSError("cannot open")

    pause = threading.Event()
    factory = Factory(unreliable)
    pool = Pool(factory, max_size=5, fairness=fairness, close=factory.close, timeout=PATIENCE)
    barrier = threading.Barrier(32)

    def borrow(seed: int) -> int:
        choose = random.Random(seed)
        barrier.wait(PATIENCE)
        served = 0
        while served < 25:
            try:
                if choose.random() < 0.5:
                    with pool.connection() as item:
                        assert not item.closed
                        if choose.random() < 0.2:
                            pool.discard(item)
                else:
                    item = pool.acquire()
                    assert not item.closed
                    (pool.discard if choose.random() < 0.2 else pool.release)(item)
                served += 1
            except OSError:
                pass
            if choose.random() < 0.02:
                pool.drain()
        return served

    threads = [start(borrow, seed) for seed in range(32)]
    assert sum(thread.result(60) for thread in threads) == 800
    assert factory.most <= 5
    assert empty(pool)
    assert pool.stats().size == factory.alive
    pool.close()
    assert factory.alive == 0
    assert pool.stats().opened == pool.stats().closed == len(factory.made)


def test_an_item_that_is_being_opened_counts() -> None:
    opening, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        opening.set()
        assert go.wait(PATIENCE)

    pool = Pool(Factory(slow), max_size=1)
    thread = start(pool.acquire)
    assert opening.wait(PATIENCE)
    stats = pool.stats()
    assert (stats.size, stats.opening, stats.in_use, stats.idle) == (1, 1, 0, 0)
    with pytest.raises(PoolTimeout):
        pool.acquire(timeout=0)
    go.set()
    pool.release(thread.result(PATIENCE))


def test_an_item_that_is_being_closed_counts() -> None:
    closing, go = threading.Event(), threading.Event()
    factory = Factory()

    def slow(item: Item) -> None:
        closing.set()
        assert go.wait(PATIENCE)
        factory.close(item)

    pool = Pool(factory, max_size=1, close=slow)
    thread = start(lambda: pool.discard(pool.acquire()))
    assert closing.wait(PATIENCE)
    with pytest.raises(PoolTimeout):
        pool.acquire(timeout=0)
    go.set()
    thread.result(PATIENCE)
    pool.release(pool.acquire())
    assert factory.most == 1


# -- 2. one deadline


def test_timeout_0_tries_once() -> None:
    pool = Pool(Factory(), max_size=1, timeout=0)
    with pool.connection():  # opening is no waiting
        began = monotonic()
        with pytest.raises(PoolTimeout):
            pool.acquire()
        assert monotonic() - began < 1
    pool.release(pool.acquire())
    assert pool.stats().waiting == 0


def test_timeout_none_waits_until_something_comes() -> None:
    pool = Pool(Factory(), max_size=1, timeout=0)
    with held(pool) as go:
        waiter = start(lambda: pool.release(pool.acquire(timeout=None)))
        eventually(lambda: pool.stats().waiting == 1)
        assert not waiter.done()
        go.set()
        waiter.result(PATIENCE)


def test_the_pools_own_timeout_is_used_unless_another_is_given() -> None:
    pool = Pool(Factory(), max_size=1, timeout=0.02)
    with held(pool):
        for timeout, expected in ((..., 0.02), (0.1, 0.1), (0, 0)):
            began = monotonic()
            with pytest.raises(PoolTimeout):
                pool.connection(timeout=timeout).__enter__()
            assert expected <= monotonic() - began < expected + 2


def test_the_deadline_is_for_waiting_and_all_retries_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight idle items, each found bad after a check of a second: the caller does not pay for all of them."""
    clock = Clock(monkeypatch)
    checks = 0

    def check(item: Item) -> bool:
        nonlocal checks
        checks += 1
        clock.now += 1
        return False

    pool = Pool(Factory(), max_size=8, check=check)
    items = [pool.acquire() for _ in range(8)]
    for item in items:
        pool.release(item)
    clock.now += 60
    began = clock.now
    try:
        pool.release(pool.acquire(timeout=2.5))
    except PoolTimeout:
        pass
    assert clock.now - began <= 3.5
    assert checks <= 3
    assert empty(pool)


def test_a_check_that_always_fails_ends_with_a_new_item(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    factory = Factory()
    pool = Pool(factory, max_size=3, check=lambda item: False, close=factory.close)
    for _ in range(3):
        items = [pool.acquire() for _ in range(3)]
        assert all(not item.closed for item in items)
        for item in items:
            pool.release(item)
        clock.now += 60
    assert factory.calls == 9
    assert factory.most == 3
    assert pool.stats().discarded == 6


def test_a_check_that_raises_replaces_the_item(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)

    def check(item: Item) -> bool:
        raise OSError("the line is dead")

    pool = Pool(Factory(), check=check, name="shop")
    first = pool.acquire()
    pool.release(first)
    clock.now += 60
    second = pool.acquire()
    assert second is not first
    assert first.closed
    pool.release(second)
    assert "'shop'" in caplog.text
    assert "the line is dead" in caplog.text


def test_max_waiting_sends_one_more_away_at_once() -> None:
    pool = Pool(Factory(), max_size=1, max_waiting=2)
    with held(pool) as go:
        waiters = [start(lambda: pool.release(pool.acquire())) for _ in range(2)]
        eventually(lambda: pool.stats().waiting == 2)
        with pytest.raises(PoolFull, match="max_waiting"):
            pool.acquire()
        go.set()
        for waiter in waiters:
            waiter.result(PATIENCE)
    pool.release(pool.acquire())
    assert empty(pool)


def test_max_waiting_0_lends_but_never_waits() -> None:
    pool = Pool(Factory(), max_size=1, max_waiting=0)
    with pool.connection(), pytest.raises(PoolFull):
        pool.acquire()
    pool.release(pool.acquire())


# -- 5. hooks run without the lock


@pytest.mark.parametrize("hook", ["factory", "reset", "check", "close"])
def test_while_a_hook_runs_the_pool_works_for_others(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    inside, go, slow = threading.Event(), threading.Event(), threading.Event()

    def maybe(name: str) -> bool:
        if name == hook and slow.is_set():
            slow.clear()
            inside.set()
            assert go.wait(PATIENCE)
        return True

    def factory() -> Item:
        maybe("factory")
        return Item(0)

    pool = Pool(
        factory,
        max_size=2,
        reset=lambda item: maybe("reset"),
        check=lambda item: maybe("check"),
        close=lambda item: maybe("close"),
    )
    other = pool.acquire()
    if hook != "factory":
        pool.release(pool.acquire())
    clock.now += 60  # time for a check
    slow.set()
    blocked = start(lambda: (pool.discard if hook == "close" else pool.release)(pool.acquire()))
    assert inside.wait(PATIENCE)
    for _ in range(3):  # the second item goes round, statistics are told
        start(pool.release, other).result(PATIENCE)
        other = start(pool.acquire).result(PATIENCE)
        assert pool.stats().in_use + pool.stats().opening == 2
        assert start(repr, pool).result(PATIENCE)
        assert len(start(pool.leases).result(PATIENCE)) >= 1
    assert not blocked.done()
    go.set()
    blocked.result(PATIENCE)
    pool.release(other)
    assert empty(pool)


def test_a_slow_open_delays_nobody_else() -> None:
    """A waits for its slow open; B, who waits in the line, gets the item that comes back meanwhile."""
    opening, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        if number == 2:
            opening.set()
            assert go.wait(PATIENCE)

    pool = Pool(Factory(slow), max_size=2)
    first = pool.acquire()
    a = start(pool.acquire)
    assert opening.wait(PATIENCE)
    b = start(pool.acquire)
    eventually(lambda: pool.stats().waiting == 1)
    pool.release(first)
    assert b.result(PATIENCE) is first
    assert not a.done()
    go.set()
    pool.release(a.result(PATIENCE))
    pool.release(first)


def test_a_failed_open_wakes_the_next_waiter() -> None:
    opening, go = threading.Event(), threading.Event()

    def first_fails(number: int) -> None:
        if number == 1:
            opening.set()
            assert go.wait(PATIENCE)
            raise OSError("cannot open")

    pool = Pool(Factory(first_fails), max_size=1)
    a = start(pool.acquire)
    assert opening.wait(PATIENCE)
    b = start(pool.acquire)
    eventually(lambda: pool.stats().waiting == 1)
    go.set()
    with pytest.raises(OSError, match="cannot open"):
        a.result(PATIENCE)
    pool.release(b.result(PATIENCE))
    assert empty(pool)
    assert pool.stats().size == 1


def test_when_every_open_fails_every_caller_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def fails(number: int) -> None:
        raise OSError("cannot open")

    pool = Pool(Factory(fails), max_size=2)
    barrier = threading.Barrier(12)

    def borrow() -> None:
        barrier.wait(PATIENCE)
        pool.acquire()

    for thread in [start(borrow) for _ in range(12)]:
        with pytest.raises(OSError, match="cannot open"):
            thread.result(PATIENCE)
    assert empty(pool)
    assert pool.stats().size == 0


@pytest.mark.parametrize("way", ["with", "release"])
def test_an_item_whose_reset_fails_is_replaced(way: str, caplog: pytest.LogCaptureFixture) -> None:
    def reset(item: Item) -> None:
        raise OSError("cannot reset")

    factory = Factory()
    pool = Pool(factory, reset=reset, close=factory.close, name="shop")
    if way == "with":
        with pool.connection() as first:
            pass
    else:
        first = pool.acquire()
        pool.release(first)
    assert first.closed
    assert "cannot reset" in caplog.text
    assert (pool.stats().discarded, pool.stats().size, factory.alive) == (1, 0, 0)


def test_a_close_that_fails_costs_no_slot(caplog: pytest.LogCaptureFixture) -> None:
    def close(item: Item) -> None:
        raise OSError("cannot close")

    with caplog.at_level(logging.WARNING):
        pool = Pool(Factory(), max_size=1, close=close)
        for _ in range(3):
            pool.discard(pool.acquire())
        pool.close()
    assert caplog.text.count("OSError: cannot close") == 3
    assert pool.stats().closed == 3
    with pytest.raises(PoolClosed):
        pool.acquire()
