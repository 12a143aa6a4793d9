"""What a pool says when it has nothing to give, how long it takes to say so, and misuse that it refuses."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import sqlite3
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, Clock, Factory, Item, eventually, held, start

from sqlitepool import ConnectionPool, Pool, PoolClosed, PoolDeadlock, PoolFull, PoolTimeout
from sqlitepool.connection import check_path, check_pragmas, normalise_path

# -- who has what


def test_a_timeout_says_that_an_item_is_being_opened() -> None:
    opening, go = threading.Event(), threading.Event()

    def factory() -> Item:
        opening.set()
        assert go.wait(PATIENCE)
        return Item(1)

    pool = Pool(factory, max_size=1)
    other = start(pool.acquire)
    assert opening.wait(PATIENCE)
    with pytest.raises(PoolTimeout, match=r"0 in use, 1 being opened, 0 waiting.*nobody at this moment"):
        pool.acquire(timeout=0)
    go.set()
    other.result(PATIENCE)


def test_a_timeout_says_that_an_item_is_being_reset() -> None:
    resetting, go = threading.Event(), threading.Event()

    def reset(item: Item) -> None:
        resetting.set()
        assert go.wait(PATIENCE)

    pool = Pool(Factory(), max_size=1, reset=reset)
    other = start(pool.release, pool.acquire())
    assert resetting.wait(PATIENCE)
    with pytest.raises(PoolTimeout, match=r"1 in use \(1 of them being reset, checked or closed\), 0 waiting"):
        pool.acquire(timeout=0)
    go.set()
    other.result(PATIENCE)


def enter_in_a_stack(pool: Pool[Any], stack: ExitStack, way: str) -> None:
    stack.enter_context(getattr(pool, way)())


@pytest.mark.parametrize("way", ["connection", "transaction"])
def test_a_block_of_an_exit_stack_is_named_by_the_line_that_entered_it(tmp_path: Path, way: str) -> None:
    with ConnectionPool(tmp_path / "app.db", max_size=1) as pool, ExitStack() as stack:
        enter_in_a_stack(pool, stack, way)
        assert f"{Path(__file__).name}:" in pool.leases()[0].where
        assert "in enter_in_a_stack" in pool.leases()[0].where
        with pytest.raises(PoolTimeout, match="enter_in_a_stack"):
            pool.acquire(timeout=0.05)


# -- the deadline


def test_no_open_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def check(item: Item) -> bool:
        clock.now += 0.5
        return False

    factory = Factory()
    pool = Pool(factory, max_size=1, check=check)
    pool.release(pool.acquire())
    clock.now += 60
    with pytest.raises(PoolTimeout, match=r"0\.500 s"):
        pool.acquire(timeout=0.3)
    assert (factory.calls, pool.stats().size, pool.stats().timeouts) == (1, 0, 1)
    pool.release(pool.acquire(timeout=0.3))  # the bad one is gone
    clock.now += 60
    pool.acquire(timeout=0)  # tries once: one check, one open
    assert factory.calls == 3


def test_a_caller_without_time_closes_few_of_those_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def close(item: Item) -> None:
        clock.now += 0.3
        item.close()

    factory = Factory()
    pool = Pool(factory, max_lifetime=10, close=close)
    for item in [pool.acquire() for _ in range(8)]:
        pool.release(item)
    clock.now += 60
    began = clock.now
    pool.release(pool.acquire(timeout=0))
    assert clock.now - began <= 0.61
    assert not factory.made[8].closed
    began = clock.now
    with pool.connection(timeout=1):
        assert clock.now - began <= 1.3
    while clock.now - began < 5:
        with pool.connection():
            clock.now += 0.1
    assert all(item.closed for item in factory.made[:8]), "with time, the others are closed too"


def test_who_would_not_wait_is_not_told_that_too_many_wait() -> None:
    pool = Pool(Factory(), max_size=1, max_waiting=0)
    with held(pool):
        with pytest.raises(PoolTimeout):
            pool.acquire(timeout=0)
        with pytest.raises(PoolFull):
            pool.acquire(timeout=1)


# -- closing


@pytest.mark.parametrize("in_memory", [False, True])
def test_to_wait_for_ones_own_block_is_a_deadlock(in_memory: bool) -> None:
    pool: Pool[Any] = ConnectionPool(":memory:") if in_memory else Pool(Factory())
    with pool.connection():
        with pytest.raises(PoolDeadlock, match="test_to_wait_for_ones_own_block"):
            pool.close(timeout=None)
        with pytest.raises(PoolClosed):
            pool.acquire()
        assert len(pool.close(timeout=0.01)) == 1
    assert pool.close(timeout=None) == []


def test_to_wait_for_the_block_of_another_thread_is_none() -> None:
    pool = Pool(Factory())
    with held(pool) as go:
        closing = start(pool.close, None)
        eventually(lambda: "closed" in repr(pool))
        go.set()
        assert closing.result(PATIENCE) == []


def test_a_closed_pool_has_no_block() -> None:
    pool = Pool(Factory())
    pool.close()
    with pytest.raises(PoolClosed, match=pool.name), pool:
        pass
    pool.drain()  # there is nothing to replace


# -- misuse


def test_neither_pools_nor_leases_can_be_copied(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db") as pool, Pool(Factory()) as other:
        for thing in (pool, other, pool.connection(), pool.transaction(), other.connection()):
            for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be copied or pickled"):
                    duplicate(thing)


@pytest.mark.parametrize("name", [1, b"app", ["app"]])
def test_a_name_is_a_text(name: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="name must be a text"):
        Pool(Factory(), name=name)
    with pytest.raises(TypeError, match="name must be a text"):
        ConnectionPool(tmp_path / "app.db", name=name)


@pytest.mark.parametrize("option", ["timeout", "max_idle", "max_lifetime", "fairness"])
def test_a_number_beyond_all_bounds(option: str) -> None:
    options: dict[str, Any] = {option: 10**400}
    with pytest.raises(ValueError, match=option):
        Pool(Factory(), **options)
    with pytest.raises(ValueError, match="timeout"):
        Pool(Factory()).acquire(timeout=10**400)


# -- what a connection is opened with


@pytest.mark.parametrize(
    ("pragmas", "error", "match"),
    [
        ([("synchronous", 1)], TypeError, "mapping"),
        ("foreign_keys", TypeError, "mapping"),
        ({1: 2}, ValueError, "no PRAGMA 1"),
        ({"foreign_keys": "onn"}, ValueError, "one of on, off"),
        ({"synchronous": "NORMEL"}, ValueError, "normal, full, extra"),
        ({"Temp_Store": "memry"}, ValueError, "default, file, memory"),
        ({"busy_timeout": "long"}, ValueError, "number"),
    ],
)
def test_a_pragma_that_sqlite_would_misunderstand(
    tmp_path: Path, pragmas: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ConnectionPool(tmp_path / "app.db", pragmas=pragmas)
    assert list(tmp_path.iterdir()) == []


def test_pragmas_are_understood_as_sqlite_does() -> None:
    check_pragmas({"synchronous": "Off", "SYNCHRONOUS": "2", "secure_delete": "FAST", "temp_store": "MEMORY"})
    check_pragmas({"foreign_keys": "TRUE", "mmap_size": "0", "cache_size": "-2000", "auto_vacuum": "Incremental"})
    check_pragmas({"locking_mode": "exclusive", "journal_mode": "truncate"})


def test_names_may_be_in_capitals(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pragmas": {"SYNCHRONOUS": "FULL", "Foreign_Keys": 0}, "isolation_level": "immediate"}
    with ConnectionPool(tmp_path / "app.db", **options) as pool:
        with pool.connection() as conn:
            assert [conn.read_pragma(name) for name in ("synchronous", "foreign_keys")] == [2, 0]
            conn.execute("CREATE TABLE t (x)")
        with pool.transaction("IMMEDIATE") as conn:  # type: ignore[arg-type]
            conn.execute("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_a_missing_file_that_the_uri_does_not_create(tmp_path: Path, mode: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not create"):
        ConnectionPool(f"file:{tmp_path}/no.db?mode={mode}")
    with ConnectionPool(f"file:{tmp_path}/new.db?mode=rwc") as pool:
        pool.release(pool.acquire())


def test_a_device_is_no_database() -> None:
    with pytest.raises(sqlite3.OperationalError, match="regular file"):
        ConnectionPool(os.devnull)


def test_a_null_character_in_a_uri(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the path of a database"):
        ConnectionPool(f"file:{tmp_path}/x%00y")
    assert list(tmp_path.iterdir()) == []


def test_who_only_reads_is_not_told_to_only_read(tmp_path: Path) -> None:
    from sqlitepool import connection

    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY_DIRECTORY
    path = tmp_path / "app.db"
    path.touch()
    target = normalise_path(path, read_only=True)
    with contextlib.suppress(FileNotFoundError):
        check_path(target, read_only=True)
    connection._explain(error, target.database, target.uri, True)
    assert "two files beside a database in WAL mode" in str(error)
    assert "read_only=True" not in str(error)
