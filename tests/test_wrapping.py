"""Opening and wrapping: `wrap`, `setup`, `pragmas`, ":memory:", URIs, a connection that its borrower closes."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, eventually, open_files, rows, start

from sqlitepool import ConnectionPool, Pool, PoolClosed


class UserDatabase:
    """What applications have: queries around one connection."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn
        self.closes = 0
        conn.row_factory = sqlite3.Row
        conn.execute("CREATE TABLE IF NOT EXISTS users (name)")

    def add(self, name: str) -> None:
        self.conn.execute("INSERT INTO users VALUES (?)", (name,))

    def names(self) -> list[str]:
        return [row["name"] for row in self.conn.execute("SELECT name FROM users ORDER BY name")]

    def close(self) -> None:
        assert rows(self.conn, "SELECT 1"), "the connection is still open here"
        self.closes += 1


def test_a_wrapper_is_given_the_connection_and_lent_instead_of_it(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db", wrap=UserDatabase, max_size=1) as pool:
        with pool.connection() as users:
            users.add("ann")
        with contextlib.suppress(LookupError), pool.connection() as users:
            users.add("bob")
            raise LookupError
        with pool.transaction() as users:
            users.add("eve")
        users = pool.acquire()
        assert users.names() == ["ann", "eve"]
        users.conn.execute("DELETE FROM users")
        with pytest.warns(RuntimeWarning, match="rolled back"):
            pool.release(users)
        with pool.connection() as users:
            assert users.names() == ["ann", "eve"]
    assert users.closes == 1
    assert open_files(tmp_path) == []


def test_what_wrap_changed_stays_and_what_a_borrower_changed_goes(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db", wrap=UserDatabase, max_size=1) as pool:
        with pool.connection() as users:
            first = users
            users.conn.row_factory = None
            users.conn.execute("PRAGMA cache_size = 17")
            users.conn.execute("CREATE TEMP TABLE scratch (x)")
            users.conn.execute("ATTACH ':memory:' AS other") if not users.conn.in_transaction else None
        with pool.connection() as users:
            assert users is first
            assert users.conn.row_factory is sqlite3.Row
            assert rows(users.conn, "PRAGMA cache_size")[0][0] != 17
            assert rows(users.conn, "SELECT * FROM temp.sqlite_master") == []
            assert len(rows(users.conn, "PRAGMA database_list")) <= 2


@pytest.mark.parametrize(
    ("wrap", "error"),
    [
        (lambda conn: None, TypeError),
        (lambda conn: conn, TypeError),
        (lambda conn: conn.execute("SELECT * FROM no_such_table"), sqlite3.OperationalError),
        (lambda conn: conn.no_such_method(), AttributeError),
    ],
)
@pytest.mark.parametrize("min_size", [0, 1])
def test_a_wrapper_that_fails_leaves_nothing_open(
    tmp_path: Path, wrap: Callable[[sqlite3.Connection], Any], error: type[Exception], min_size: int
) -> None:
    if min_size:
        with pytest.raises(error):
            ConnectionPool(tmp_path / "app.db", wrap=wrap, min_size=1)
    else:
        with ConnectionPool(tmp_path / "app.db", wrap=wrap, max_size=1) as pool:
            for _ in range(3):
                with pytest.raises(error):
                    pool.acquire()
            assert pool.stats().size == 0
            assert open_files(tmp_path) == []
    assert open_files(tmp_path) == []


def test_a_wrapper_that_fails_on_the_second_connection(tmp_path: Path) -> None:
    calls = 0

    def wrap(conn: sqlite3.Connection) -> UserDatabase:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("no more")
        return UserDatabase(conn)

    with pytest.raises(OSError, match="no more"):
        ConnectionPool(tmp_path / "app.db", wrap=wrap, min_size=2)
    assert open_files(tmp_path) == []


def test_a_wrapper_whose_close_fails_leaves_nothing_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(UserDatabase):
        def close(self) -> None:
            raise OSError("I will not")

    with ConnectionPool(tmp_path / "app.db", wrap=Stubborn) as pool:
        pool.discard(pool.acquire())
        assert "I will not" in caplog.text
        assert open_files(tmp_path) == []


def test_a_wrapper_that_closes_its_connection_itself(tmp_path: Path) -> None:
    class Closes(UserDatabase):
        def close(self) -> None:
            self.conn.close()

    with ConnectionPool(tmp_path / "app.db", wrap=Closes) as pool:
        pool.discard(pool.acquire())
        pool.release(pool.acquire())
    assert open_files(tmp_path) == []


def test_a_pool_of_objects_that_open_their_own_connection(tmp_path: Path) -> None:
    """`Pool(lambda: UserDatabase(path))`: rolled back on return and closed at the end, by its own methods."""

    class Own(UserDatabase):
        def __init__(self, path: Path) -> None:
            super().__init__(sqlite3.connect(path, check_same_thread=False))

        def rollback(self) -> None:
            self.conn.rollback()

        def close(self) -> None:
            self.conn.close()

    with Pool(lambda: Own(tmp_path / "app.db"), max_size=1) as pool:
        with pool.connection() as users:
            users.add("ann")
        with pool.connection() as users:
            assert users.names() == []
    assert open_files(tmp_path) == []


# -- hooks of the pool


def test_reset_check_and_close_get_what_is_lent_while_it_is_open(tmp_path: Path) -> None:
    calls: list[tuple[str, object]] = []

    def note(name: str) -> Callable[[UserDatabase], bool]:
        def hook(users: UserDatabase) -> bool:
            calls.append((name, users))
            return bool(rows(users.conn, "SELECT 1"))

        return hook

    pool = ConnectionPool(tmp_path / "app.db", wrap=UserDatabase, reset=note("reset"), close=note("close"))
    with pool.connection() as users:
        users.add("ann")
    with pool.connection():
        assert users.names() == ["ann"]
    pool.close()
    assert calls == [("reset", users), ("reset", users), ("close", users)]
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("reset", [None, lambda conn: None])
@pytest.mark.parametrize("way", ["with", "raise", "transaction", "release", "discard"])
def test_a_connection_that_its_borrower_closed_is_replaced(tmp_path: Path, way: str, reset: Any) -> None:
    with ConnectionPool(tmp_path / "app.db", max_size=1, reset=reset) as pool:
        if way == "with":
            with pool.connection() as conn:
                conn.close()
        elif way == "raise":
            with contextlib.suppress(sqlite3.ProgrammingError), pool.connection() as conn:
                conn.close()
                conn.execute("SELECT 1")
        elif way == "transaction":
            with pytest.raises(sqlite3.ProgrammingError, match="lost"), pool.transaction() as conn:
                conn.close()
        else:
            conn = pool.acquire()
            conn.close()
            getattr(pool, way)(conn)
        assert (pool.stats().size, pool.stats().discarded) == (0, 1)
        with pool.connection(timeout=0) as other:
            assert other is not conn
            assert rows(other, "SELECT 1") == [(1,)]


# -- setup and pragmas


def test_a_new_function_reaches_every_connection_after_drain(tmp_path: Path) -> None:
    functions = {"one": 1}

    def setup(conn: sqlite3.Connection) -> None:
        for name, value in functions.items():
            conn.create_function(name, 0, lambda value=value: value)

    with ConnectionPool(tmp_path / "app.db", setup=setup, max_size=3) as pool:
        with pool.connection() as a, pool.connection():
            assert rows(a, "SELECT one()") == [(1,)]
            with pytest.raises(sqlite3.OperationalError, match="no such function"):
                a.execute("SELECT two()")
            functions["two"] = 2
            pool.drain()
        for _ in range(2):
            with pool.connection() as a, pool.connection() as b, pool.connection() as c:
                assert [rows(conn, "SELECT one() + two()") for conn in (a, b, c)] == [[(3,)]] * 3
        assert pool.stats().opened == 5


def test_a_setup_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    def setup(conn: sqlite3.Connection) -> None:
        conn.execute("CREATE TABLE t (x)")
        raise OSError("setup failed")

    with ConnectionPool(tmp_path / "app.db", setup=setup) as pool:
        with pytest.raises(OSError, match="setup failed"):
            pool.acquire()
        assert open_files(tmp_path) == []
        assert pool.stats().size == 0


def test_pragmas_hold_on_every_connection(tmp_path: Path) -> None:
    pragmas = {"cache_size": -4000, "synchronous": "FULL", "foreign_keys": False}
    with ConnectionPool(tmp_path / "app.db", pragmas=pragmas, max_size=2) as pool:
        a, b = pool.acquire(), pool.acquire()
        for conn in (a, b):
            assert rows(conn, "PRAGMA cache_size") == [(-4000,)]
            assert rows(conn, "PRAGMA synchronous") == [(2,)]
            assert rows(conn, "PRAGMA foreign_keys") == [(0,)]
            assert rows(conn, "PRAGMA journal_mode") == [("wal",)]
            pool.release(conn)


# -- in memory


def test_memory_is_one_database_for_all_connections_and_threads() -> None:
    with ConnectionPool(":memory:", max_size=4) as pool, ConnectionPool(":memory:") as other:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE t (x)")

        def insert() -> None:
            for number in range(20):
                with pool.connection() as conn:
                    conn.execute("INSERT INTO t VALUES (?)", (number,))

        for thread in [start(insert) for _ in range(8)]:
            thread.result(PATIENCE)
        with pool.connection() as a, pool.connection() as b, pool.connection() as c:
            assert [rows(conn, "SELECT count(*) FROM t") for conn in (a, b, c)] == [[(160,)]] * 3
        with other.connection() as conn, pytest.raises(sqlite3.OperationalError, match="no such table"):
            conn.execute("SELECT * FROM t")


def test_memory_lives_as_long_as_the_pool_though_every_connection_is_closed() -> None:
    with ConnectionPool(":memory:") as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE t (x)")
            conn.execute("INSERT INTO t VALUES (1)")
        pool.drain()
        assert pool.stats().size == 0
        with pool.connection() as conn:
            pool.discard(conn)
            assert rows(conn, "SELECT x FROM t") == [(1,)]
        with pool.connection() as conn:
            assert rows(conn, "SELECT x FROM t") == [(1,)]


def test_memory_that_was_being_opened_when_the_pool_was_closed_leaves_nothing_open() -> None:
    opened: list[sqlite3.Connection] = []
    opening, go = threading.Event(), threading.Event()

    def setup(conn: sqlite3.Connection) -> None:
        opened.append(conn)
        opening.set()
        assert go.wait(PATIENCE)

    pool = ConnectionPool(":memory:", setup=setup)
    borrower = start(pool.acquire)
    assert opening.wait(PATIENCE)
    pool.close()
    go.set()
    with pytest.raises(PoolClosed):
        borrower.result(PATIENCE)
    for conn in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            conn.execute("SELECT 1")


def test_two_threads_that_open_the_first_memory_connection_at_once() -> None:
    for _ in range(10):
        with ConnectionPool(":memory:", max_size=8) as pool:
            barrier = threading.Barrier(8)

            def create(number: int, pool: Any = pool, barrier: threading.Barrier = barrier) -> None:
                barrier.wait(PATIENCE)
                with pool.transaction() as conn:
                    conn.execute(f"CREATE TABLE t{number} (x)")

            for thread in [start(create, number) for number in range(8)]:
                thread.result(PATIENCE)
            with pool.connection() as conn:
                assert rows(conn, "SELECT count(*) FROM sqlite_master") == [(8,)]
            eventually(lambda pool=pool: pool.stats().in_use == 0)


# -- paths


@pytest.mark.parametrize("kind", [str, Path, lambda path: f"file:{path}", lambda path: f"file://{path}?mode=rwc"])
def test_kinds_of_paths(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    with ConnectionPool(kind(tmp_path / "app.db")) as pool:
        with pool.transaction() as conn:
            conn.execute("CREATE TABLE t (x)")
        assert "app.db" in repr(pool)
    assert [file.name for file in tmp_path.iterdir()] == ["app.db"]


def test_a_uri_that_forbids_writing(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "app.db").close()
    with ConnectionPool(tmp_path / "app.db") as pool, pool.connection() as conn:
        conn.execute("CREATE TABLE t (x)")
    with ConnectionPool(f"file:{tmp_path}/app.db?mode=ro", read_only=True) as pool:
        conn = pool.acquire()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            conn.execute("INSERT INTO t VALUES (1)")
        conn.rollback()
        pool.release(conn)


def test_the_folder_may_change_under_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with ConnectionPool("app.db") as pool:
        monkeypatch.chdir(tmp_path / "b")
        with pool.connection(), pool.connection():
            pass
    assert [file.parent.name for file in tmp_path.rglob("app.db")] == ["a"]
