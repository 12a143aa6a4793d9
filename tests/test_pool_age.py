"""Promise 9: the item used last is lent first, so that the rest grows old: `max_idle`, `max_lifetime`, `min_size`."""

from __future__ import annotations

import pytest
from pool_support import Clock, Factory, Item

from sqlitepool import Pool


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def borrow(pool: Pool[Item], count: int) -> list[Item]:
    """Borrow so many at once, and return them in the order in which they were taken."""
    items = [pool.acquire() for _ in range(count)]
    for item in items:
        pool.release(item)
    return items


def open_ones(items: list[Item]) -> list[Item]:
    return [item for item in items if not item.closed]


@pytest.mark.parametrize("fairness", [0, 0.005])
def test_the_item_used_last_is_lent_first(fairness: float) -> None:
    pool = Pool(Factory(), fairness=fairness)
    a, b, c = borrow(pool, 3)
    assert borrow(pool, 3) == [c, b, a]
    for _ in range(5):
        with pool.connection() as item:
            assert item is a


def test_an_item_idle_for_max_idle_is_closed_when_items_are_asked_for(clock: Clock) -> None:
    factory = Factory()
    pool = Pool(factory, max_idle=60)
    a, b, c = borrow(pool, 3)
    for _ in range(6):  # c alone stays in use
        clock.now += 25
        assert borrow(pool, 1) == [c]
    assert (a.closed, b.closed, c.closed) == (True, True, False)
    assert (pool.stats().size, pool.stats().closed, pool.stats().discarded) == (1, 2, 0)


def test_an_item_idle_for_max_idle_is_never_lent(clock: Clock) -> None:
    pool = Pool(Factory(), max_idle=60)
    a, b = borrow(pool, 2)
    clock.now += 60
    assert borrow(pool, 1) not in ([a], [b])
    assert a.closed
    assert b.closed


def test_an_item_idle_for_less_than_max_idle_is_kept(clock: Clock) -> None:
    pool = Pool(Factory(), max_idle=60)
    items = borrow(pool, 3)
    for _ in range(4):
        clock.now += 59
        assert set(borrow(pool, 3)) == set(items)
    assert pool.stats().opened == 3


def test_min_size_items_stay_however_long_they_are_idle(clock: Clock) -> None:
    factory = Factory()
    pool = Pool(factory, min_size=2, max_idle=60)
    assert factory.calls == 2
    borrow(pool, 5)
    clock.now += 3600
    borrow(pool, 1)
    assert pool.stats().size == 2
    assert len(open_ones(factory.made)) == 2
    assert factory.calls == 5


def test_items_opened_for_min_size_are_not_older_than_the_pool(clock: Clock) -> None:
    """With more items than min_size, the first ones are spare too: they must have been idle for max_idle to go."""
    pool = Pool(Factory(), min_size=2, max_idle=60)
    items = [pool.acquire()]
    clock.now += 20
    items += [pool.acquire()]
    clock.now += 20
    items += [pool.acquire()]
    assert not any(item.closed for item in items)
    assert pool.stats().size == 3
    for item in items:
        pool.release(item)


def test_min_size_items_idle_since_the_start_are_checked_before_they_are_lent(clock: Clock) -> None:
    checked: list[Item] = []

    def note(item: Item) -> bool:
        checked.append(item)
        return True

    pool = Pool(Factory(), min_size=2, check=note)
    clock.now += 60
    with pool.connection() as item:
        assert checked == [item]


def test_check_looks_at_items_that_were_idle_for_long_and_at_no_others(clock: Clock) -> None:
    checked: list[Item] = []

    def note(item: Item) -> bool:
        checked.append(item)
        return True

    pool = Pool(Factory(), check=note)
    a, b = borrow(pool, 2)
    assert checked == []
    borrow(pool, 2)
    assert checked == []
    clock.now += 60
    borrow(pool, 1)
    assert checked == [a]
    borrow(pool, 1)
    assert checked == [a]
    borrow(pool, 2)
    assert checked == [a, b]


def test_an_item_as_old_as_max_lifetime_is_replaced(clock: Clock) -> None:
    pool = Pool(Factory(), max_lifetime=100)
    a = borrow(pool, 1)[0]
    clock.now += 89
    assert borrow(pool, 1) == [a]
    clock.now += 11
    b = borrow(pool, 1)[0]
    assert b is not a
    assert a.closed
    assert (pool.stats().closed, pool.stats().discarded) == (1, 0)


def test_an_item_that_grows_too_old_while_it_is_lent_is_closed_on_return(clock: Clock) -> None:
    pool = Pool(Factory(), max_lifetime=100)
    with pool.connection() as item:
        clock.now += 101
        assert not item.closed
    assert item.closed
    stats = pool.stats()
    assert (stats.size, stats.closed, stats.discarded) == (0, 1, 0)


def test_min_size_items_too_are_replaced_at_max_lifetime(clock: Clock) -> None:
    factory = Factory()
    pool = Pool(factory, min_size=2, max_lifetime=100)
    first = list(factory.made)
    clock.now += 101
    assert not set(borrow(pool, 2)) & set(first)
    assert all(item.closed for item in first)


def test_items_opened_together_do_not_all_grow_too_old_together(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jitter takes up to a tenth away from a lifetime, never more, and never adds to it."""
    shares = iter([0.0, 0.5, 0.999])
    monkeypatch.setattr("random.random", lambda: next(shares))
    pool = Pool(Factory(), max_size=3, max_lifetime=100)
    a, b, c = [pool.acquire() for _ in range(3)]
    for item in (a, b, c):
        pool.release(item)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        again = Clock(patch)
        alive = {}
        for age in (89, 91, 94, 96, 99, 101):
            again.now = 1000.0 + age
            pool.drain() if age == 101 else pool.release(pool.acquire())
            alive[age] = len(open_ones([a, b, c]))
    assert alive[89] == 3
    assert alive[101] == 0
    assert alive[94] == 2
    assert alive[99] == 1


def test_without_limits_nothing_grows_old(clock: Clock) -> None:
    pool = Pool(Factory())
    items = borrow(pool, 3)
    clock.now += 1e9
    assert set(borrow(pool, 3)) == set(items)
