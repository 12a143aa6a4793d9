"""Promise 4: what nobody can be using any more comes back; what somebody may still hold is never lent twice."""

from __future__ import annotations

import functools
import gc
import logging
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, eventually, held, start

from sqlitepool import ConnectionPool, ForeignItem, Pool, PoolTimeout
from sqlitepool.lease import Lease

AnyPool = Pool[Any]
FOUND = pytest.mark.filterwarnings("ignore:.*took back:ResourceWarning")


class Thing:
    """An item without ties."""


def is_lent(pool: AnyPool) -> bool:
    return bool(pool.stats().in_use)


def all_come_back(pool: AnyPool, count: int = 1) -> bool:
    """Tell whether `count` items can be had without waiting, and nothing is in use then."""
    items = [pool.acquire(timeout=0) for _ in range(count)]
    different = len(set(map(id, items))) == count
    while items:
        pool.release(items.pop())
    return different and not is_lent(pool)


# -- what is lost


def enter_and_drop(pool: AnyPool) -> None:
    pool.connection().__enter__()


def acquire_and_drop(pool: AnyPool) -> None:
    pool.acquire()


def acquire_in_a_thread_that_ends(pool: AnyPool) -> None:
    start(acquire_and_drop, pool).result(PATIENCE)


def keep_the_lease_of_a_thread_that_ended(pool: AnyPool) -> None:
    lease = pool.connection()
    start(lambda: lease.__enter__() and None).result(PATIENCE)
    kept_leases.append(lease)


def fail_with_a_traceback_that_is_dropped(pool: AnyPool) -> None:
    with pytest.raises(ZeroDivisionError):
        lose_by_an_error(pool)


def lose_by_an_error(pool: AnyPool) -> None:
    item = pool.acquire()
    assert item
    raise ZeroDivisionError


def put_it_into_a_cycle(pool: AnyPool) -> None:
    cycle: list[Any] = [pool.acquire()]
    cycle.append(cycle)
    del cycle
    gc.collect()


kept_leases: list[object] = []
LOSSES = [
    enter_and_drop,
    acquire_and_drop,
    acquire_in_a_thread_that_ends,
    keep_the_lease_of_a_thread_that_ended,
    fail_with_a_traceback_that_is_dropped,
    put_it_into_a_cycle,
]


@pytest.mark.parametrize("lose", LOSSES)
def test_what_is_lost_comes_back_with_a_warning_that_names_the_line(lose: Callable[[AnyPool], None]) -> None:
    pool = Pool(Thing, max_size=1, timeout=0)
    lose(pool)
    with pytest.warns(ResourceWarning, match=r"test_reclaim\.py:\d+ in ") as caught:
        assert all_come_back(pool)
    assert len(caught) == 1
    assert pool.stats().reclaimed == 1
    kept_leases.clear()


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("wrap", [None, lambda conn: Wrapper(conn)], ids=["connection", "wrapper"])
@FOUND
@pytest.mark.filterwarnings("ignore:.*rolled back:RuntimeWarning")
def test_a_lost_connection_comes_back_clean(lose: Callable[[AnyPool], None], wrap: Any, tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db", max_size=1, timeout=0, wrap=wrap) as pool:
        lose(pool)
        lent: Any = pool.acquire()
        assert not getattr(lent, "conn", lent).in_transaction
        pool.release(lent)
        del lent
        assert pool.stats().reclaimed == 1
        kept_leases.clear()


class Wrapper:
    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn


@FOUND
def test_a_generator_that_is_dropped_half_way_returns_its_item() -> None:
    def borrow() -> Iterator[object]:
        with pool.connection() as item:
            yield item

    pool = Pool(Thing, max_size=1, timeout=0)
    generator = borrow()
    next(generator)
    assert is_lent(pool)
    del generator
    assert all_come_back(pool)


@FOUND
def test_what_is_lost_comes_back_when_somebody_waits_already() -> None:
    pool = Pool(Thing, max_size=1, timeout=PATIENCE)
    item: Any = pool.acquire()
    wait = start(pool.acquire)
    eventually(lambda: pool.stats().waiting)
    del item
    pool.release(wait.result(3))
    assert pool.stats().reclaimed == 1


@FOUND
def test_what_is_lost_comes_back_when_its_thread_ends_while_somebody_waits() -> None:
    pool = Pool(Thing, max_size=2, timeout=PATIENCE)
    with held(pool, 1):
        go = threading.Event()
        taken = threading.Event()

        def lose() -> None:
            item = pool.acquire()
            taken.set()
            assert go.wait(PATIENCE)
            assert item

        loser = start(lose)
        assert taken.wait(PATIENCE)
        wait = start(pool.acquire)
        eventually(lambda: pool.stats().waiting)
        go.set()
        loser.result(PATIENCE)
        pool.release(wait.result(3))


@FOUND
def test_every_item_can_be_lost_at_once_though_they_share_parts() -> None:
    """A logger, a lock, a configuration: each new item adds a reference to what all of them share."""

    class Database:
        def __init__(self) -> None:
            self.log = logging.getLogger("test_reclaim")
            self.settings = settings
            self.lock = lock

    settings: dict[str, Any] = {"path": "app.db", "pragmas": []}
    lock = threading.Lock()
    pool = Pool(Database, max_size=4, timeout=0)
    items = [pool.acquire() for _ in range(4)]
    del items
    also = [logging.getLogger("test_reclaim"), settings, lock]
    assert all_come_back(pool, 4)
    assert len(also) == 3


@FOUND
def test_a_warning_that_is_an_error_loses_nothing() -> None:
    pool = Pool(Thing, max_size=3, timeout=0)
    items = [pool.acquire() for _ in range(3)]
    del items
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ResourceWarning):
            pool.stats()
    assert all_come_back(pool, 3)


# -- what somebody holds


class Database:
    """Like most wrappers: a connection and what belongs to it."""

    def __init__(self) -> None:
        self.conn = sqlite3.connect(":memory:", check_same_thread=False)
        self.execute = self.conn.execute
        self.count = functools.partial(self.conn.execute, "SELECT count(*) FROM sqlite_master")
        self.run = lambda sql: self.conn.execute(sql)
        self.parts = [Part(self)]
        self.buffer = bytearray(10)
        self.cache: dict[str, str] = {}

    def close(self) -> None:
        self.conn.close()


class Part:
    def __init__(self, owner: Database) -> None:
        self.conn = owner.conn

    def method(self) -> None:
        pass


def rows_of(database: Database) -> Iterator[Any]:
    yield from database.conn.execute("SELECT 1 UNION SELECT 2")


def started(iterator: Iterator[Any]) -> Iterator[Any]:
    next(iterator)
    return iterator


KEPT: dict[str, Callable[[Database], object]] = {
    "itself": lambda database: database,
    "a list with it": lambda database: [database],
    "a closure": lambda database: lambda: database,
    "a method": lambda database: database.close,
    "its connection": lambda database: database.conn,
    "a cursor": lambda database: database.conn.execute("SELECT 1"),
    "a bound C method": lambda database: database.execute,
    "a new bound C method": lambda database: database.conn.execute,
    "a partial": lambda database: database.count,
    "its own lambda": lambda database: database.run,
    "a part": lambda database: database.parts[0],
    "a method of a part": lambda database: database.parts[0].method,
    "a list of parts": lambda database: database.parts,
    "its attributes": lambda database: vars(database),
    "a generator": lambda database: started(rows_of(database)),
    "a buffer": lambda database: database.buffer,
    "a dictionary": lambda database: database.cache,
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("way", ["acquire", "__enter__", "a thread that ended"])
@FOUND
def test_what_somebody_keeps_is_never_lent_twice(keep: Callable[[Database], object], way: str) -> None:
    def take() -> object:
        return keep(pool.connection().__enter__() if way == "__enter__" else pool.acquire())

    pool = Pool(Database, max_size=1, timeout=0)
    kept = start(take).result(PATIENCE) if way == "a thread that ended" else take()
    for _ in range(2):
        with pytest.raises(PoolTimeout):
            pool.acquire()
    assert is_lent(pool)
    del kept
    gc.collect()
    assert all_come_back(pool)
    pool.close()


@pytest.mark.parametrize("keep", ["conn", "cursor", "execute", "wrapper"])
@FOUND
def test_a_connection_that_somebody_keeps_is_never_lent_twice(keep: str, tmp_path: Path) -> None:
    def take() -> object:
        wrapper = pool.acquire()
        conn = wrapper.conn
        return {"wrapper": wrapper, "conn": conn, "execute": conn.execute, "cursor": conn.execute("SELECT 1")}[keep]

    with ConnectionPool(tmp_path / "app.db", max_size=1, timeout=0, wrap=Wrapper) as pool:
        kept = take()
        with pytest.raises(PoolTimeout):
            pool.acquire()
        del kept
        assert all_come_back(pool)


@FOUND
def test_an_item_passed_on_by_a_thread_that_ended_stays_with_its_new_holder() -> None:
    pool = Pool(Thing, max_size=1, timeout=0)
    item = start(pool.acquire).result(PATIENCE)
    with pytest.raises(PoolTimeout):
        pool.acquire()
    pool.release(item)
    with pytest.raises(ForeignItem):
        pool.release(item)
    del item
    assert all_come_back(pool)
    assert pool.stats().reclaimed == 0


def test_a_traceback_that_is_kept_keeps_the_item() -> None:
    pool = Pool(Thing, max_size=1, timeout=0)
    with pytest.raises(ZeroDivisionError) as caught:
        lose_by_an_error(pool)
    with pytest.raises(PoolTimeout):
        pool.acquire()
    assert caught.traceback


@FOUND
def test_a_lease_that_ends_after_its_item_was_taken_back_does_nothing() -> None:
    pool = Pool(Thing, max_size=1, timeout=0)
    lease = pool.connection()
    start(lambda: lease.__enter__() and None).result(PATIENCE)
    item = pool.acquire()
    lease.__exit__(None, None, None)
    with pytest.raises(PoolTimeout):
        pool.acquire()
    pool.release(item)
    assert all_come_back(pool)


@FOUND
def test_audits_at_the_same_time_take_an_item_back_once() -> None:
    """Borrowers end without returning their items; several audits find each, while others borrow it again."""

    class Closable:
        closed = False

        def close(self) -> None:
            self.closed = True

    def audit() -> None:
        while not stop.is_set():
            pool.stats()

    def borrow() -> None:
        while not stop.is_set():
            with pool.connection() as item:
                assert item not in lent
                assert not item.closed
                lent.add(item)
                lent.remove(item)
            del item

    lent: set[object] = set()
    stop = threading.Event()
    pool = Pool(Closable, max_size=2, timeout=PATIENCE)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        others = [start(audit) for _ in range(2)] + [start(borrow) for _ in range(2)]
        for _ in range(300):
            acquire_in_a_thread_that_ends(pool)
        stop.set()
        for other in others:
            other.result(PATIENCE)
    finally:
        stop.set()
        sys.setswitchinterval(before)
    assert all_come_back(pool, 2)
    stats = pool.stats()
    assert (stats.reclaimed, stats.opened, stats.closed) == (300, 2, 0)


@FOUND
def test_audits_without_end_harm_nobody_who_borrows() -> None:
    stop = threading.Event()

    def audit() -> None:
        while not stop.is_set():
            pool.stats()

    def borrow() -> None:
        for _ in range(500):
            with pool.connection() as item:
                assert item not in lent
                lent.add(item)
                lent.remove(item)

    lent: set[object] = set()
    pool = Pool(Thing, max_size=2, timeout=PATIENCE)
    auditor = start(audit)
    for borrower in [start(borrow) for _ in range(4)]:
        borrower.result(PATIENCE)
    stop.set()
    auditor.result(PATIENCE)
    assert all_come_back(pool, 2)
    assert pool.stats().reclaimed == 0


def test_a_block_whose_end_was_interrupted_gives_its_item_up_though_a_variable_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a signal does that strikes before the first step of `__exit__`. The old item is closed, not shared."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    pool = Pool(Thing, max_size=1, timeout=0)
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "__exit__", interrupted)
        try:
            with pool.connection() as item:
                pass
        except KeyboardInterrupt:
            pass
    with pytest.warns(ResourceWarning, match="lost without being returned"):
        fresh = pool.acquire()
    assert fresh is not item
    pool.release(fresh)
    assert pool.stats().size == 1
