"""Wrong use is a clear error at the earliest moment, and nothing is leaked by it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, Clock, Factory, Item, open_files, start

from sqlitepool import ConnectionPool, ForeignItem, Pool, PoolClosed, PoolError

NAN = float("nan")

WRONG_NUMBERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_size": 0}, ValueError, "max_size"),
    ({"max_size": -1}, ValueError, "max_size"),
    ({"max_size": 2.5}, TypeError, "max_size"),
    ({"max_size": "8"}, TypeError, "max_size"),
    ({"max_size": True}, TypeError, "max_size"),
    ({"max_size": None}, TypeError, "max_size"),
    ({"min_size": -1}, ValueError, "min_size"),
    ({"min_size": 9}, ValueError, "min_size"),
    ({"min_size": 3, "max_size": 2}, ValueError, "min_size"),
    ({"min_size": None}, TypeError, "min_size"),
    ({"timeout": -0.1}, ValueError, "timeout"),
    ({"timeout": NAN}, ValueError, "timeout"),
    ({"timeout": "30"}, TypeError, "timeout"),
    ({"timeout": False}, TypeError, "timeout"),
    ({"max_waiting": -1}, ValueError, "max_waiting"),
    ({"max_waiting": 1.0}, TypeError, "max_waiting"),
    ({"max_idle": 0}, ValueError, "max_idle"),
    ({"max_idle": -1}, ValueError, "max_idle"),
    ({"max_idle": "1h"}, TypeError, "max_idle"),
    ({"max_lifetime": 0}, ValueError, "max_lifetime"),
    ({"max_lifetime": NAN}, ValueError, "max_lifetime"),
    ({"fairness": -1}, ValueError, "fairness"),
    ({"fairness": None}, TypeError, "fairness"),
    ({"reset": 1}, TypeError, "reset"),
    ({"check": "yes"}, TypeError, "check"),
    ({"close": []}, TypeError, "close"),
    ({"size": 8}, TypeError, "size"),
]


@pytest.mark.parametrize(("options", "error", "match"), WRONG_NUMBERS, ids=str)
def test_a_wrong_option_is_refused_before_anything_is_opened(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    factory = Factory()
    with pytest.raises(error, match=match):
        Pool(factory, **options)
    assert factory.calls == 0


@pytest.mark.parametrize(("options", "error", "match"), WRONG_NUMBERS, ids=str)
def test_a_wrong_option_of_a_connection_pool_too(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ConnectionPool(tmp_path / "app.db", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factory", [None, 8, "app.db", Item(1)])
def test_a_factory_that_is_not_callable(factory: Any) -> None:
    with pytest.raises(TypeError, match="factory must be callable"):
        Pool(factory)


@pytest.mark.parametrize("min_size", [0, 1])
def test_a_factory_that_returns_none(min_size: int) -> None:
    if min_size:
        with pytest.raises(TypeError, match="returned None"):
            Pool(lambda: None, min_size=min_size)
        return
    pool = Pool(lambda: None, max_size=1)
    for _ in range(3):
        with pytest.raises(TypeError, match="returned None"):
            pool.acquire()
    assert pool.stats().size == 0


def test_a_factory_that_returns_the_same_object_twice() -> None:
    shared = Item(1)
    pool = Pool(lambda: shared, max_size=2)
    item = pool.acquire()
    for _ in range(3):
        with pytest.raises(ValueError, match="same object twice"):
            pool.acquire()
    assert not shared.closed, "its borrower is using it"
    assert pool.stats().size == 1
    pool.release(item)
    with pool.connection() as again:
        assert again is shared


def test_min_size_items_that_fail_to_open_close_those_before_them() -> None:
    def third_fails(number: int) -> None:
        if number == 3:
            raise OSError("no more")

    factory = Factory(third_fails)
    with pytest.raises(OSError, match="no more"):
        Pool(factory, min_size=4, close=factory.close)
    assert factory.alive == 0
    assert factory.calls == 3


def test_equal_items_are_told_apart() -> None:
    pool: Pool[list[int]] = Pool(lambda: [0])
    a, b = pool.acquire(), pool.acquire()
    pool.release(b)
    with pytest.raises(ForeignItem):
        pool.release(b)
    with pytest.raises(ForeignItem):
        pool.release([0])
    assert pool.stats().in_use == 1
    pool.release(a)


# -- releasing what is not lent


@pytest.mark.parametrize("verb", ["release", "discard"])
def test_an_item_returned_twice(verb: str) -> None:
    pool = Pool(Factory())
    item = pool.acquire()
    pool.release(item)
    with pytest.raises(ForeignItem, match=verb) as caught:
        getattr(pool, verb)(item)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PoolError)
    assert pool.name in str(caught.value)
    assert (pool.stats().idle, pool.stats().size) == (1, 1)
    assert not item.closed


@pytest.mark.parametrize("verb", ["release", "discard"])
@pytest.mark.parametrize("thing", [None, 1, "item", Item(7)], ids=str)
def test_a_thing_that_was_never_lent(verb: str, thing: Any) -> None:
    pool = Pool(Factory(), min_size=1)
    with pytest.raises(ForeignItem):
        getattr(pool, verb)(thing)
    assert (pool.stats().idle, pool.stats().size) == (1, 1)


@pytest.mark.parametrize("verb", ["release", "discard"])
def test_an_item_of_another_pool(verb: str) -> None:
    one, other = Pool(Factory()), Pool(Factory())
    item = one.acquire()
    with pytest.raises(ForeignItem):
        getattr(other, verb)(item)
    assert one.stats().in_use == 1
    one.release(item)
    assert (one.stats().idle, other.stats().size) == (1, 0)


def test_an_item_returned_within_its_block() -> None:
    pool = Pool(Factory())
    with pytest.raises(ForeignItem, match="before the block"), pool.connection() as item:
        pool.release(item)
    assert (pool.stats().idle, pool.stats().in_use, pool.stats().size) == (1, 0, 1)
    with pool.connection() as again:
        assert again is item


def test_an_item_returned_within_its_block_and_lent_again_stays_with_its_borrower() -> None:
    pool = Pool(Factory())
    lease = pool.connection()
    item = lease.__enter__()
    pool.release(item)
    assert pool.acquire() is item
    with pytest.raises(ForeignItem):
        lease.__exit__(None, None, None)
    assert pool.stats().in_use == 1
    pool.release(item)
    assert pool.stats().in_use == 0


def test_two_threads_that_return_the_same_item_at_once() -> None:
    """One of them is told; the item is free once."""
    pool = Pool(Factory())
    for _ in range(200):
        item = pool.acquire()
        barrier = threading.Barrier(2)

        def give_back(item: Item = item, barrier: threading.Barrier = barrier) -> int:
            barrier.wait(PATIENCE)
            try:
                pool.release(item)
            except ForeignItem:
                return 0
            return 1

        other = start(give_back)
        assert give_back() + other.result(PATIENCE) == 1
        assert (pool.stats().idle, pool.stats().size) == (1, 1)


def test_a_lease_entered_twice_at_once() -> None:
    pool = Pool(Factory())
    lease = pool.connection()
    with lease:
        with pytest.raises(RuntimeError, match="once for each"):
            lease.__enter__()
        assert pool.stats().in_use == 1
    with lease:  # one after the other is fine
        assert pool.stats().in_use == 1
    assert pool.stats().in_use == 0


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (NAN, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_wrong_timeout_of_a_call(timeout: Any, error: type[Exception], tmp_path: Path) -> None:
    pool = Pool(Factory(), max_size=1)
    with ConnectionPool(tmp_path / "app.db") as connections:
        calls: list[Callable[..., object]] = [pool.connection, pool.acquire, pool.close, connections.transaction]
        for call in calls:
            with pytest.raises(error, match="timeout"):
                call(timeout=timeout)
    assert pool.stats().size == 0
    pool.release(pool.acquire())


@pytest.mark.parametrize(
    ("sizes", "error"),
    [((0,), ValueError), ((-2,), ValueError), ((2, 3), ValueError), ((2.0,), TypeError), ((2, -1), ValueError)],
)
def test_a_wrong_resize_changes_nothing(sizes: tuple[Any, ...], error: type[Exception]) -> None:
    pool = Pool(Factory(), max_size=4, min_size=2)
    with pytest.raises(error):
        pool.resize(*sizes)
    stats = pool.stats()
    assert (stats.max_size, stats.min_size, stats.size) == (4, 2, 2)


def test_use_after_close(tmp_path: Path) -> None:
    pool = ConnectionPool(tmp_path / "app.db", min_size=1)
    item = pool.acquire()
    pool.close()
    for call in (pool.acquire, pool.connection().__enter__, pool.transaction().__enter__):
        with pytest.raises(PoolClosed, match=r"app\.db"):
            call()
    pool.release(item)
    with pytest.raises(ForeignItem):
        pool.release(item)
    pool.drain()
    with pytest.raises(PoolClosed, match=r"app\.db"), pool:
        pass
    assert pool.close() == []
    assert pool.leases() == []
    assert pool.stats().size == 0
    assert open_files(tmp_path) == []


# -- connection pools


WRONG_CONNECTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("folder", {}, IsADirectoryError, "folder"),
    ("missing/app.db", {}, FileNotFoundError, "create it"),
    ("missing.db", {"read_only": True}, FileNotFoundError, "read_only"),
    ("new.db", {"pool_size": 5}, TypeError, "unknown option 'pool_size'"),
    ("new.db", {"check_same_thread": True}, TypeError, "check_same_thread"),
    ("new.db", {"isolation_level": "SOON"}, ValueError, "isolation_level"),
    ("new.db", {"pragmas": {"no_such_pragma": 1}}, ValueError, "no_such_pragma"),
    ("new.db", {"pragmas": {"cache_size": "1; DROP TABLE t"}}, ValueError, "cache_size"),
    ("new.db", {"setup": "CREATE TABLE t (x)"}, TypeError, "setup"),
    ("new.db", {"wrap": "UserDatabase"}, TypeError, "wrap"),
    ("new.db", {"if_replaced": "ignore"}, ValueError, "if_replaced"),
    ("new.db", {"factory": sqlite3.Connection}, TypeError, "factory"),
]


@pytest.mark.parametrize(("name", "options", "error", "match"), WRONG_CONNECTIONS, ids=str)
def test_a_wrong_database_or_option_is_refused_when_the_pool_is_made(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        ConnectionPool(tmp_path / name, **options)
    assert sorted(tmp_path.iterdir()) == before
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("min_size", [0, 2])
def test_a_file_that_is_no_database(tmp_path: Path, min_size: int) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("milk, bread, butter\n" * 100)
    with pytest.raises(sqlite3.DatabaseError, match=r"notes\.txt.*not a SQLite database"):
        ConnectionPool(path, min_size=min_size).acquire()
    assert open_files(tmp_path) == []
    assert path.read_text().startswith("milk")


def test_a_wrong_transaction_mode(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db") as pool:
        with pytest.raises(ValueError, match="deferred, immediate, exclusive"):
            pool.transaction("serializable")  # type: ignore[arg-type]
        assert pool.stats().size == 0


def test_a_clock_that_stands_still_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    pool = Pool(Factory(), max_size=2)
    for _ in range(50):
        with pool.connection() as one, pool.connection() as other:
            assert one is not other
    assert pool.stats().in_use == 0
