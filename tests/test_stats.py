"""Statistics are exact under threads; `leases`, `repr` and promise 7: errors explain."""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from pool_support import PATIENCE, Clock, Factory, Item, eventually, held, start

from sqlitepool import Durations, Pool, PoolError, PoolStats, PoolTimeout
from sqlitepool.stats import Tally

HERE = re.escape(Path(__file__).name)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads are switched all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def check_consistency(stats: PoolStats) -> None:
    parts = (stats.idle, stats.in_use, stats.opening)
    assert min(parts) >= 0
    assert sum(parts) == stats.size == stats.opened + stats.opening - stats.closed
    assert stats.size <= stats.max_size


def test_at_every_moment_idle_and_in_use_and_opening_make_up_the_size(restless: None) -> None:
    """Sixteen threads hammer while one looks; counters never go back; in the end all are what the threads counted."""
    factory = Factory()
    pool = Pool(factory, max_size=4, max_waiting=10, close=factory.close)
    stop = threading.Event()

    def borrow(seed: int) -> tuple[int, int, int]:
        choose = random.Random(seed)
        served = timeouts = discarded = 0
        while not stop.is_set():
            try:
                with pool.connection(timeout=choose.choice((0, 0.0005, None))) as item:
                    served += 1
                    if choose.random() < 0.1:
                        pool.discard(item)
                        discarded += 1
            except PoolTimeout:
                timeouts += 1
            except PoolError:  # PoolFull
                pass
        return served, timeouts, discarded

    threads = [start(borrow, seed) for seed in range(16)]
    end = time.monotonic() + 1.5
    last = pool.stats()
    looks = 0
    while time.monotonic() < end or looks < 20:  # those who hammer may leave it little time
        stats = pool.stats()
        check_consistency(stats)
        for counter in ("timeouts", "opened", "closed", "discarded"):
            assert getattr(stats, counter) >= getattr(last, counter), counter
        last = stats
        looks += 1
    stop.set()
    counts = [thread.result(PATIENCE) for thread in threads]
    stats = pool.stats()
    assert (stats.checkouts, stats.timeouts, stats.discarded) == tuple(map(sum, zip(*counts, strict=True)))
    assert (stats.opened, stats.closed) == (factory.calls, factory.calls - factory.alive)
    assert stats.held_seconds.count == stats.checkouts
    assert (stats.in_use, stats.opening, stats.waiting, stats.reclaimed) == (0, 0, 0, 0)


@pytest.mark.parametrize("fairness", [0, 0.005])
def test_checkouts_equal_what_the_threads_counted(fairness: float) -> None:
    pool = Pool(Factory(), max_size=3, fairness=fairness)
    barrier = threading.Barrier(16)

    def borrow() -> None:
        barrier.wait(PATIENCE)
        for _ in range(150):
            with pool.connection():
                pass
            pool.release(pool.acquire())

    for thread in [start(borrow) for _ in range(16)]:
        thread.result(60)
    stats = pool.stats()
    assert stats.checkouts == stats.held_seconds.count == 16 * 300
    assert stats.wait_seconds.count <= stats.checkouts
    assert sum(stats.held_seconds.buckets) == stats.checkouts


def test_what_failed_is_no_checkout() -> None:
    def fails(number: int) -> None:
        raise OSError("cannot open")

    pool = Pool(Factory(fails))
    with pytest.raises(OSError, match="cannot open"):
        pool.acquire()
    stats = pool.stats()
    assert (stats.checkouts, stats.opened, stats.closed, stats.size) == (0, 0, 0, 0)


def test_the_times_of_waits_and_loans_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pool = Pool(Factory(), max_size=1)
    item = pool.acquire()
    assert pool.stats().checkouts == 1
    assert pool.stats().held_seconds.count == 0
    waiter = start(pool.acquire)
    eventually(lambda: pool.stats().waiting == 1)
    clock.now += 3
    pool.release(item)
    item = waiter.result(PATIENCE)
    clock.now += 5
    pool.release(item)
    stats = pool.stats()
    assert (stats.wait_seconds.count, stats.wait_seconds.total) == (1, 3.0)
    assert (stats.held_seconds.count, stats.held_seconds.total, stats.held_seconds.max) == (2, 8.0, 5.0)
    assert stats.held_seconds.mean == 4.0


def test_statistics_outlive_the_items() -> None:
    pool = Pool(Factory())
    for _ in range(5):
        pool.discard(pool.acquire())
    pool.close()
    assert (pool.stats().checkouts, pool.stats().held_seconds.count) == (5, 5)


def test_stats_cannot_be_changed_and_do_not_change() -> None:
    pool = Pool(Factory(), name="shop", max_size=3, min_size=1)
    before = pool.stats()
    with pool.connection():
        assert (before.checkouts, before.in_use, before.idle) == (0, 0, 1)
    assert (before.name, before.max_size, before.min_size) == ("shop", 3, 1)
    with pytest.raises(FrozenInstanceError):
        before.size = 7  # type: ignore[misc]
    assert not hasattr(before, "__dict__")


# -- durations


@pytest.mark.parametrize(
    "times",
    [
        [0.001] * 1000,
        [2.0**-e for e in range(30)],
        [0.0] * 50 + [0.001] * 50,
        [0.0],
        [1e-12, 0.25],
        [0.5, 1.0, 1.0, 2.0, 86400.0],
        [random.Random(1).expovariate(100) for _ in range(2000)],
    ],
    ids=str,
)
@pytest.mark.parametrize("folded", [False, True])
def test_a_quantile_is_at_least_the_true_value_and_at_most_twice(times: list[float], folded: bool) -> None:
    tally = Tally()
    for seconds in times:
        tally.append(seconds)
        if folded and len(tally) > 10:
            tally = tally.folded()
    durations = tally.durations()
    assert durations.count == sum(durations.buckets) == len(times)
    assert durations.total == pytest.approx(sum(times))
    assert durations.max == max(times)
    for q in (0.01, 0.1, 0.5, 0.9, 0.99, 1.0):
        true = sorted(times)[max(0, -int(-q * len(times) // 1) - 1)]
        assert true <= durations.quantile(q) <= max(2 * true, 1e-9), q
    assert durations.p50 == durations.quantile(0.5)
    assert durations.p99 == durations.quantile(0.99)


def test_durations_of_nothing_are_zero() -> None:
    durations = Tally().durations()
    assert (durations.count, durations.mean, durations.p50, durations.quantile(1.0)) == (0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_outside_0_to_1_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        Tally().durations().quantile(q)


def test_durations_add_up() -> None:
    one = Tally()
    one.extend([0.1, 0.2])
    other = Tally()
    other.extend([0.4])
    both: Durations = one.durations() + other.durations()
    assert (both.count, both.max) == (3, 0.4)
    assert both.total == pytest.approx(0.7)


# -- leases, repr, errors


def test_leases_name_thread_age_and_line_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pool = Pool(Factory())
    item = pool.acquire()
    clock.now += 10
    with held(pool):
        clock.now += 5
        with pool.connection():
            first, second, third = pool.leases()
    assert (first.thread_name, first.age) == (threading.current_thread().name, 15.0)
    assert first.thread_id == threading.get_ident()
    assert re.search(rf"{HERE}:\d+ in test_leases_name_thread", first.where)
    assert abs(time.time() - 15 - first.since) < 5
    assert (second.thread_name, second.age) == ("holder-0", 5.0)
    assert "in hold" in second.where
    assert third.age == 0.0
    lines = Path(__file__).read_text().splitlines()
    assert "pool.acquire()" in lines[line_of(first.where) - 1]
    assert "with pool.connection():" in lines[line_of(third.where) - 1]
    pool.release(item)
    assert pool.leases() == []


def line_of(where: str) -> int:
    found = re.search(r":(\d+) in", where)
    assert found is not None
    return int(found[1])


def test_a_timeout_says_size_use_waiting_and_the_longest_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pool = Pool(Factory(), max_size=5, name="shop")
    with held(pool):
        clock.now += 1000
        items = []
        for _ in range(4):
            items.append(pool.acquire())
            clock.now += 1
        waiter = start(pool.acquire, None)
        eventually(lambda: pool.stats().waiting == 1)
        with pytest.raises(PoolTimeout) as caught:
            pool.acquire(timeout=0)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, PoolError)
        text = str(caught.value)
        for part in ("'shop'", "size 5 of at most 5", "5 in use", "1 waiting"):
            assert part in text
        holders = re.findall(r"thread '([^']+)' for ([\d.]+) s, taken at \S*?([^/\s]+):(\d+) in (\S+?)(?:;|$)", text)
        assert [(name, float(age)) for name, age, *_ in holders] == [
            ("holder-0", 1004.0),
            (threading.current_thread().name, 4.0),
            (threading.current_thread().name, 3.0),
        ]
        assert holders[0][2] == "pool_support.py"
        assert holders[1][2] == Path(__file__).name
        for item in items:
            pool.release(item)
        pool.release(waiter.result(PATIENCE))
    assert pool.stats().timeouts == 1


def test_a_timeout_while_all_items_are_being_opened_blames_nobody() -> None:
    opening, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        opening.set()
        assert go.wait(PATIENCE)

    pool = Pool(Factory(slow), max_size=1)
    opener = start(pool.acquire)
    assert opening.wait(PATIENCE)
    with pytest.raises(PoolTimeout, match=r"Held longest by: nobody|opening"):
        pool.acquire(timeout=0.01)
    go.set()
    pool.release(opener.result(PATIENCE))


def test_repr_says_what_goes_on() -> None:
    pool: Pool[Item] = Pool(Factory(), name="shop", max_size=3)
    lease = pool.connection()
    assert "not lent" in repr(lease)
    with lease:
        assert repr(pool) == "<Pool 'shop': size 1 of at most 3, 0 idle, 0 waiting>"
        assert "not lent" not in repr(lease)
    assert repr(pool) == "<Pool 'shop': size 1 of at most 3, 1 idle, 0 waiting>"
    pool.close()
    assert "closed" in repr(pool)


def test_pools_without_a_name_get_one_each() -> None:
    names = {Pool(Factory()).name for _ in range(3)}
    assert len(names) == 3
