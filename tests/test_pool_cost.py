"""What a checkout costs, counted and not timed: no scan that grows with idle items, loans or waiters is on its way.

Four measures, since each is blind to something: function calls, of Python and of C (blind to a loop in one function);
the interpreter's instructions (blind to `list(waiters)`, which is one); how often the pool's own containers are looked
through, told by stand-ins for them (blind to `set(slots)`, and to what is kept elsewhere); memory (sees copies only).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cost import Cost, assert_no_growth, measure, peak, watch_containers
from pool_support import PATIENCE, Clock, eventually, start

from sqlitepool import ConnectionPool, Pool


class Thing:
    """An item that nobody else keeps: it can be lost."""


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """It would strike some measurement with what others have asked it to call (`gc.callbacks`, finalizers)."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# -- what there may be many of


def idle_items(pool: Pool[Any], count: int) -> object:
    for item in [pool.acquire() for _ in range(count)]:
        pool.release(item)
    return None


def loans(pool: Pool[Any], count: int) -> object:
    return [pool.acquire() for _ in range(count)]


def lost_items(pool: Pool[Any], count: int) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        while pool.stats().reclaimed < count:
            pool.acquire()
    return None


def discarded_items(pool: Pool[Any], count: int) -> object:
    items = [pool.acquire() for _ in range(count)]
    for item in items:
        pool.discard(item)
    return items


def other_pools(pool: Pool[Any], count: int) -> object:
    return [Pool(Thing) for _ in range(count)]


# -- how to borrow


def in_a_block(pool: Pool[Any]) -> None:
    with pool.connection():
        pass


def by_acquire(pool: Pool[Any]) -> None:
    pool.release(pool.acquire())


def of_any(folder: Path) -> Pool[Any]:
    return Pool(Thing, max_size=2000)


def of_memory(folder: Path) -> Pool[Any]:
    return ConnectionPool(":memory:", max_size=2000)


def of_a_file(folder: Path) -> Pool[Any]:
    return ConnectionPool(folder / "app.db", max_size=2000)


BORROW = pytest.mark.parametrize("borrow", [in_a_block, by_acquire])
MANY = pytest.mark.parametrize(
    ("make_pool", "many", "count"),
    [
        (of_any, idle_items, 1000),
        (of_any, loans, 500),
        (of_any, lost_items, 900),
        (of_any, discarded_items, 300),
        (of_any, other_pools, 300),
        (of_memory, idle_items, 300),
        (of_memory, loans, 300),
        (of_a_file, idle_items, 60),
        (of_a_file, loans, 60),
    ],
)


@MANY
@BORROW
@pytest.mark.parametrize("pause", [0.0, 10.0], ids=["at once", "after a pause"])
def test_a_checkout_costs_the_same_however_many_there_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_pool: Callable[[Path], Pool[Any]],
    many: Callable[[Pool[Any], int], object],
    count: int,
    borrow: Callable[[Pool[Any]], None],
    pause: float,
) -> None:
    """After a pause a connection to a file is looked at more closely, which must not cost more either."""
    clock = Clock(monkeypatch)
    costs, memory = [], []
    for number in (4, count):
        with make_pool(tmp_path) as pool:
            kept = many(pool, number)
            for _ in range(3):
                borrow(pool)
            clock.now += pause
            costs.append(measure(borrow, pool))
            memory.append(peak(borrow, pool))
            for item in kept if many is loans and isinstance(kept, list) else ():
                pool.release(item)
    assert_no_growth(costs[0], costs[1], count - 4)
    assert memory[1] < memory[0] + 4 * (count - 4), "something was copied"


@MANY
@BORROW
def test_a_checkout_looks_through_nothing(
    tmp_path: Path,
    make_pool: Callable[[Path], Pool[Any]],
    many: Callable[[Pool[Any], int], object],
    count: int,
    borrow: Callable[[Pool[Any]], None],
) -> None:
    scans: list[str] = []
    with make_pool(tmp_path) as pool:
        kept = many(pool, count)
        borrow(pool)
        sizes = watch_containers(pool, scans)
        assert many is other_pools or max(sizes) >= count  # else it is kept where nobody watches
        borrow(pool)
        assert scans == []
        for item in kept if many is loans and isinstance(kept, list) else ():
            pool.release(item)


# -- waiting


def wait_and_measure(pool: Pool[Any]) -> Cost:
    items: list[object] = []
    cost = measure(lambda: items.append(pool.acquire(timeout=None)))
    pool.release(items.pop())
    return cost


def hand_over(pool: Pool[Any], others: int, before_the_last: Callable[[], object]) -> dict[str, Cost]:
    """Have callers wait for the only item, then return it to them; they pass it on, one to the next.

    Returns what it cost the first of them, who leaves the others behind, the last, who finds them before it, and the
    one who returned the item.
    """

    def wait_for_line(length: int) -> None:
        eventually(lambda: f" {length} waiting" in repr(pool))  # `stats()` would look through the line

    item = pool.acquire()
    first = start(wait_and_measure, pool)
    wait_for_line(1)
    between = [start(in_a_block, pool) for _ in range(others)]
    wait_for_line(others + 1)
    before_the_last()
    last = start(wait_and_measure, pool)
    wait_for_line(others + 2)
    returning = measure(pool.release, item)
    costs = {"first": first.result(PATIENCE), "last": last.result(PATIENCE), "returning": returning}
    for thread in between:
        thread.result(PATIENCE)
    return costs


@pytest.fixture
def _nobody_looks_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has waited for long looks for lost items and deadlocks. That is a scan, and the only one."""
    monkeypatch.setattr("sqlitepool.lending._PATIENCE", 3600.0)


@pytest.mark.parametrize("fairness", [0, 3600])
@pytest.mark.usefixtures("_nobody_looks_around")
def test_to_wait_and_to_be_served_costs_the_same_however_many_wait(fairness: float) -> None:
    costs = {}
    for others in (4, 64, 200):
        with Pool(Thing, max_size=1, timeout=None, fairness=fairness) as pool:
            costs[others] = hand_over(pool, others, lambda: None)
    for few, many in ((4, 64), (64, 200)):
        for role, cost in costs[few].items():
            assert_no_growth(cost, costs[many][role], many - few)


@pytest.mark.parametrize("fairness", [0, 3600])
@pytest.mark.usefixtures("_nobody_looks_around")
def test_waiters_are_served_without_a_look_through_the_line(fairness: float) -> None:
    scans: list[str] = []
    sizes: set[int] = set()
    with Pool(Thing, max_size=1, timeout=None, fairness=fairness) as pool:
        hand_over(pool, 20, lambda: sizes.update(watch_containers(pool, scans)))
        assert 21 in sizes  # the line
        assert scans == []
        pool.stats()  # looks through everything, which shows that scans are seen
        assert scans


# -- the quick way


@pytest.mark.parametrize(
    ("make_pool", "borrow", "most"),
    [
        (of_any, in_a_block, 20),
        (of_any, by_acquire, 26),
        (of_memory, in_a_block, 19),
        (of_memory, by_acquire, 26),
        (of_a_file, in_a_block, 19),
        (of_a_file, by_acquire, 26),
    ],
)
def test_the_quick_way_makes_no_more_calls_than_it_did(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_pool: Callable[[Path], Pool[Any]],
    borrow: Callable[[Pool[Any]], None],
    most: int,
) -> None:
    """Checkout and return, all calls of Python and C, two of which are `borrow` itself and the clock's.

    A call takes 30 to 100 ns, of some 1,000 for the whole. Whoever adds one here should know; whoever saves one may
    lower the figure.
    """
    Clock(monkeypatch)
    with make_pool(tmp_path) as pool:
        for _ in range(3):
            borrow(pool)
        cost = measure(borrow, pool)
    assert cost.calls.total() <= most, dict(cost.calls)
