"""How blocks of `ConnectionPool` end: as `with conn:` does, whatever happens; and what threads write is written."""

from __future__ import annotations

import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import pytest
from pool_support import PATIENCE, eventually, open_files, rows, start

from sqlitepool import Connection, ConnectionPool, PoolTimeout

needs_autocommit = pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit came with Python 3.12")

Mode = Literal["deferred", "immediate", "exclusive"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    with ConnectionPool(path) as pool, pool.connection() as conn:
        conn.execute("CREATE TABLE t (x)")
        conn.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        conn.execute("CREATE TABLE child (parent REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    return path


@pytest.fixture
def pool(path: Path) -> Iterator[ConnectionPool[Connection]]:
    with ConnectionPool(path, max_size=2, pragmas={"busy_timeout": 0}) as pool:
        yield pool
        assert pool.stats().in_use == 0
    assert open_files(path.parent) == []


def count(pool: ConnectionPool[Any], table: str = "t") -> int:
    with pool.connection() as conn:
        return int(rows(conn, f"SELECT count(*) FROM {table}")[0][0])


def insert_and_raise(lease: AbstractContextManager[Connection], error: BaseException) -> None:
    with lease as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        raise error


def test_what_is_lent_is_a_real_sqlite3_connection(pool: ConnectionPool[Connection]) -> None:
    with pool.connection() as conn:
        assert isinstance(conn, sqlite3.Connection)
        with conn:
            conn.execute("INSERT INTO t VALUES (1)")
        assert not conn.in_transaction


def test_a_block_that_succeeds_is_committed(pool: ConnectionPool[Connection]) -> None:
    with pool.connection() as conn:
        conn.execute("INSERT INTO t VALUES (1)")
    assert count(pool) == 1

    def leaves_early() -> str:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (2)")
            return "early"

    assert leaves_early() == "early"
    assert count(pool) == 2


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_block_that_raises_is_rolled_back(pool: ConnectionPool[Connection], error: type[BaseException]) -> None:
    with pytest.raises(error, match="here"):
        insert_and_raise(pool.connection(), error("here"))
    assert count(pool) == 0
    assert pool.stats().opened == 1, "the connection is fit for use"


def test_a_generator_that_is_closed_is_rolled_back(pool: ConnectionPool[Connection]) -> None:
    def generate() -> Iterator[int]:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (1)")
            yield 1

    generator = generate()
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert count(pool) == 0


@pytest.mark.parametrize("isolation_level", ["IMMEDIATE", "DEFERRED", "EXCLUSIVE", None])
def test_a_half_read_query_does_not_keep_a_block_from_ending(path: Path, isolation_level: Any) -> None:
    with ConnectionPool(path, isolation_level=isolation_level) as pool:
        with pool.connection() as conn:
            conn.executemany("INSERT INTO t VALUES (?)", [(1,), (2,), (3,)])
            assert conn.execute("SELECT x FROM t").fetchone() == (1,)
        with pool.connection() as conn:
            assert conn.execute("INSERT INTO t VALUES (4), (5) RETURNING x").fetchone() == (4,)
        assert count(pool) == 5


@pytest.mark.parametrize("way", ["with", "transaction", "release", "discard"])
def test_isolation_level_none_is_autocommit_with_explicit_transactions(path: Path, way: str) -> None:
    with ConnectionPool(path, isolation_level=None, max_size=1) as pool:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (1)")
            assert not conn.in_transaction
        if way == "with":
            with pool.connection() as conn:
                conn.execute("BEGIN")
                conn.execute("INSERT INTO t VALUES (2)")
        elif way == "transaction":
            with pool.transaction() as conn:
                conn.execute("INSERT INTO t VALUES (2)")
        else:
            conn = pool.acquire()
            conn.execute("BEGIN")
            conn.execute("INSERT INTO t VALUES (2)")
            with pytest.warns(RuntimeWarning, match="rolled back"):
                getattr(pool, way)(conn)
        assert count(pool) == (2 if way in ("with", "transaction") else 1)


# -- release


def test_release_rolls_back_what_is_open_and_names_the_line(pool: ConnectionPool[Connection]) -> None:
    conn = pool.acquire()
    conn.execute("INSERT INTO t VALUES (1)")
    with pytest.warns(RuntimeWarning, match="rolled back") as caught:
        pool.release(conn)
    assert caught[0].filename == __file__, "the warning points at the release"
    found = re.search(rf"{re.escape(Path(__file__).name)}:(\d+) in test_release_rolls_back", str(caught[0].message))
    assert found is not None
    assert "pool.acquire()" in Path(__file__).read_text().splitlines()[int(found[1]) - 1]
    assert count(pool) == 0
    assert pool.stats().opened == 1


def test_release_after_a_commit_says_nothing(pool: ConnectionPool[Connection]) -> None:
    conn = pool.acquire()
    conn.execute("INSERT INTO t VALUES (1)")
    conn.commit()
    pool.release(conn)
    assert count(pool) == 1


def test_a_warning_that_is_an_error_costs_nothing(pool: ConnectionPool[Connection]) -> None:
    conn = pool.acquire()
    conn.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(RuntimeWarning):  # this project's settings make errors of warnings
        pool.release(conn)
    assert pool.stats().in_use == 0
    assert count(pool) == 0


# -- transaction()


@pytest.mark.parametrize("mode", ["deferred", "immediate", "exclusive"])
@pytest.mark.parametrize("isolation_level", ["IMMEDIATE", "DEFERRED", None])
def test_a_transaction_begins_at_once_and_is_committed(path: Path, mode: Mode, isolation_level: Any) -> None:
    with ConnectionPool(path, isolation_level=isolation_level, pragmas={"busy_timeout": 0}) as pool:
        with pool.transaction(mode) as conn:
            assert conn.in_transaction
            with pool.connection() as other:  # who writes now?
                if mode == "deferred":
                    other.execute("INSERT INTO t VALUES (1)")
                    other.commit()
                else:
                    with pytest.raises(sqlite3.OperationalError, match="locked"):
                        other.execute("INSERT INTO t VALUES (1)")
            conn.execute("INSERT INTO t VALUES (2)")
        assert count(pool) == (2 if mode == "deferred" else 1)


@pytest.mark.parametrize("mode", ["deferred", "immediate", "exclusive"])
def test_a_transaction_that_raises_is_rolled_back(pool: ConnectionPool[Connection], mode: Mode) -> None:
    with pytest.raises(KeyboardInterrupt):
        insert_and_raise(pool.transaction(mode), KeyboardInterrupt())
    assert count(pool) == 0


def test_a_locked_database_leaves_the_connection_in_the_pool(pool: ConnectionPool[Connection]) -> None:
    with pool.transaction() as conn:
        for _ in range(3):
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                pool.transaction().__enter__()
        conn.execute("INSERT INTO t VALUES (1)")
    assert (pool.stats().opened, pool.stats().idle, pool.stats().closed) == (2, 2, 0)
    assert count(pool) == 1


def test_a_transaction_waits_for_a_connection_as_long_as_it_is_told(pool: ConnectionPool[Connection]) -> None:
    with pool.connection(), pool.connection(), pytest.raises(PoolTimeout, match="test_connection_pool"):
        pool.transaction(timeout=0).__enter__()


def test_the_line_of_a_transaction_is_told(pool: ConnectionPool[Connection]) -> None:
    with pool.transaction():
        assert f"{Path(__file__).name}:" in pool.leases()[0].where
        assert "in test_the_line_of_a_transaction_is_told" in pool.leases()[0].where


def test_a_transaction_that_its_block_ended_itself(pool: ConnectionPool[Connection]) -> None:
    with pool.transaction() as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        conn.commit()
    with pool.transaction() as conn:
        conn.execute("INSERT INTO t VALUES (2)")
        conn.rollback()
    assert count(pool) == 1


@pytest.mark.parametrize("way", ["connection", "transaction"])
def test_a_commit_that_fails_reaches_the_caller_and_costs_no_slot(pool: ConnectionPool[Connection], way: str) -> None:
    for _ in range(5):  # more often than there are connections
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), getattr(pool, way)() as conn:
            conn.execute("INSERT INTO child VALUES (99)")
    assert pool.stats().in_use == 0
    assert count(pool, "child") == 0
    with pool.transaction(timeout=0), pool.connection(timeout=0):  # both slots are there
        pass


@needs_autocommit
@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("way", ["connection", "transaction"])
def test_autocommit_options(path: Path, autocommit: bool, way: str) -> None:
    with ConnectionPool(path, autocommit=autocommit, max_size=1) as pool:
        for _ in range(2):
            with getattr(pool, way)() as conn:
                assert conn.autocommit is autocommit
                conn.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(LookupError):
            insert_and_raise(getattr(pool, way)(), LookupError())
        assert count(pool) == (3 if autocommit and way == "connection" else 2)
        pool.release(pool.acquire())  # without a warning
        assert pool.stats().opened == 1


def test_read_only(path: Path) -> None:
    with ConnectionPool(path, read_only=True) as pool:
        with pytest.raises(sqlite3.OperationalError, match="readonly"), pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (1)")
        with pool.connection() as conn:
            conn.execute("PRAGMA query_only = 0")
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                conn.execute("INSERT INTO t VALUES (1)")
        with pool.transaction("deferred") as conn:
            assert rows(conn, "SELECT count(*) FROM t") == [(0,)]
        assert pool.stats().size == 1


# -- threads that write


@pytest.mark.parametrize("way", ["connection", "transaction"])
def test_eight_threads_write_at_once_and_every_row_is_there(path: Path, way: str) -> None:
    """A read-modify-write of one number: lost updates would show, and so would "database is locked"."""
    with ConnectionPool(path, max_size=4, pragmas={"busy_timeout": 60_000}) as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE account (balance INTEGER)")
            conn.execute("INSERT INTO account VALUES (0)")
        barrier = threading.Barrier(8)

        def deposit() -> None:
            barrier.wait(PATIENCE)
            for number in range(100):
                with getattr(pool, way)() as conn:
                    conn.execute("INSERT INTO t VALUES (?)", (number,))  # takes the right to write
                    ((balance,),) = rows(conn, "SELECT balance FROM account")
                    conn.execute("UPDATE account SET balance = ?", (balance + 1,))

        for thread in [start(deposit) for _ in range(8)]:
            thread.result(100)
        with pool.connection() as conn:
            assert rows(conn, "SELECT balance FROM account") == [(800,)]
            assert rows(conn, "SELECT count(*), sum(x) FROM t") == [(800, 8 * 4950)]
            assert rows(conn, "PRAGMA integrity_check") == [("ok",)]
        assert pool.stats().opened <= 4
        assert pool.stats().checkouts == 802


def test_connections_move_between_threads(pool: ConnectionPool[Connection]) -> None:
    """Entered, used and left in three threads, as some web frameworks do."""
    lease = pool.connection()
    conn = start(lease.__enter__).result(PATIENCE)
    start(conn.execute, "INSERT INTO t VALUES (1)").result(PATIENCE)
    start(lease.__exit__, None, None, None).result(PATIENCE)
    eventually(lambda: pool.stats().in_use == 0)
    assert count(pool) == 1


@pytest.mark.parametrize("database", ["app.db", ":memory:"])
def test_close_leaves_no_file_and_no_descriptor_behind(tmp_path: Path, database: str) -> None:
    pool = ConnectionPool(tmp_path / database if database != ":memory:" else database)
    with pool.connection() as conn, pool.connection():
        conn.execute("CREATE TABLE t (x)")
    lent = pool.acquire()
    rows(lent, "SELECT * FROM t")
    pool.close()
    pool.release(lent)
    assert open_files(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ([database] if database != ":memory:" else [])
