"""A block that succeeds has written all that was done in it, or says so; and nothing done after it reaches anybody."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pool_support import rows

from sqlitepool import Connection, ConnectionPool

CLOSED = "closed with a transaction open"
ENDED = "ended before the block"

needs_autocommit = pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit came with Python 3.12")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with ConnectionPool(tmp_path / "app.db") as pool, pool.connection() as conn:
        conn.execute("CREATE TABLE t (x UNIQUE)")
        conn.execute("INSERT INTO t VALUES (1)")
    return tmp_path / "app.db"


def written(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as conn:
        return [x for (x,) in rows(conn, "SELECT x FROM t ORDER BY x")]


def rewrite(path: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(sql)


def in_block(pool: ConnectionPool[Any], block: str, work: Callable[[Any], object]) -> None:
    with getattr(pool, block)() as item:
        work(item)


class Wrapper:
    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn

    def execute(self, sql: str) -> sqlite3.Cursor:
        return self.conn.execute(sql)

    def close(self) -> None:
        self.conn.close()


# -- closed by the borrower


@pytest.mark.parametrize("wrap", [None, Wrapper])
@pytest.mark.parametrize("block", ["connection", "transaction"])
def test_a_connection_closed_before_the_commit_is_an_error(path: Path, block: str, wrap: Any) -> None:
    def insert_and_close(item: Any) -> None:
        item.execute("INSERT INTO t VALUES (2)")
        item.close()

    with ConnectionPool(path, max_size=1, wrap=wrap) as pool:
        with pytest.raises(sqlite3.ProgrammingError, match=CLOSED):
            in_block(pool, block, insert_and_close)
        assert (pool.stats().size, pool.stats().discarded) == (0, 1)
        with pool.connection(timeout=0) as item:
            item.execute("INSERT INTO t VALUES (3)")
    assert written(path) == [1, 3]


def test_a_connection_closed_after_a_commit_is_none(path: Path) -> None:
    with ConnectionPool(path) as pool:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (2)")
            conn.commit()
            conn.close()
            conn.close()
        with pool.connection() as conn:
            rows(conn, "SELECT * FROM t")
            conn.close()
    assert written(path) == [1, 2]


def test_the_error_of_a_block_goes_before(path: Path) -> None:
    def insert_close_and_raise(conn: Connection) -> None:
        conn.execute("INSERT INTO t VALUES (2)")
        conn.close()
        raise LookupError

    with ConnectionPool(path) as pool:
        for block in ("connection", "transaction"):
            with pytest.raises(LookupError):
                in_block(pool, block, insert_close_and_raise)
    assert written(path) == [1]


# -- one transaction


@pytest.mark.parametrize("isolation_level", ["IMMEDIATE", "", None])
def test_a_script_in_a_transaction_is_part_of_it(path: Path, isolation_level: Any) -> None:
    def insert_thrice_and_raise(conn: Connection) -> None:
        conn.execute("INSERT INTO t VALUES (2)")
        conn.executescript("INSERT INTO t VALUES (3); -- three; or\n INSERT INTO t VALUES (4)")
        conn.cursor().executescript("CREATE TABLE u (y); INSERT INTO u VALUES (';');")
        assert rows(conn, "SELECT count(*) FROM t, u") == [(4,)]
        raise LookupError

    with ConnectionPool(path, isolation_level=isolation_level) as pool:
        with pytest.raises(LookupError):
            in_block(pool, "transaction", insert_thrice_and_raise)
        assert written(path) == [1]
        with pool.transaction() as conn:
            conn.executescript("INSERT INTO t VALUES (5); INSERT INTO t VALUES (6)")
        assert written(path) == [1, 5, 6]
        with pytest.raises(sqlite3.OperationalError, match="within a transaction"):
            in_block(pool, "transaction", lambda conn: conn.executescript("BEGIN; COMMIT"))
        assert pool.stats().opened == 1


def test_a_transaction_that_sqlite_rolled_back_is_an_error(path: Path) -> None:
    def insert_or_roll_back(conn: Connection) -> None:
        conn.execute("INSERT INTO t VALUES (8)")
        with contextlib.suppress(sqlite3.IntegrityError):
            conn.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        conn.execute("INSERT INTO t VALUES (9)")

    with ConnectionPool(path) as pool:
        with pytest.raises(sqlite3.ProgrammingError, match=ENDED):
            in_block(pool, "transaction", insert_or_roll_back)
        assert (pool.stats().idle, pool.stats().discarded) == (1, 0)
    assert 8 not in written(path)


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param({"autocommit": way}, marks=needs_autocommit) for way in (True, False))]
)
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_a_transaction_that_the_block_ends_by_sql_is_an_error(path: Path, end: str, options: dict[str, Any]) -> None:
    def end_early(conn: Connection) -> None:
        conn.execute("INSERT INTO t VALUES (2)")
        conn.execute(end)

    with ConnectionPool(path, **options) as pool:
        with pytest.raises(sqlite3.ProgrammingError, match=ENDED):
            in_block(pool, "transaction", end_early)
        in_block(pool, "transaction", lambda conn: conn.execute("INSERT INTO t VALUES (3)"))
        assert pool.stats().opened == 1
    assert written(path) == ([1, 3] if end == "ROLLBACK" else [1, 2, 3])


def write_and_fail(conn: Connection) -> None:
    conn.execute("INSERT INTO t VALUES (3)")
    raise LookupError


@pytest.mark.parametrize("end", ["commit", "rollback", "with"])
def test_what_comes_after_a_commit_of_the_block_is_in_another_transaction(path: Path, end: str) -> None:
    def write(conn: Connection) -> None:
        with conn if end == "with" else contextlib.nullcontext():
            conn.execute("INSERT INTO t VALUES (2)")
        if end != "with":
            getattr(conn, end)()
        conn.execute("INSERT INTO t VALUES (3)")

    def write_and_fail(conn: Connection) -> None:
        write(conn)
        raise LookupError

    with ConnectionPool(path) as pool:
        with pytest.raises(LookupError):
            in_block(pool, "transaction", write_and_fail)
        assert written(path) == ([1] if end == "rollback" else [1, 2])
        rewrite(path, "DELETE FROM t WHERE x > 1")
        in_block(pool, "transaction", write)
    assert written(path) == ([1, 3] if end == "rollback" else [1, 2, 3])


@pytest.mark.parametrize("how", ["well", "with an error", "early"])
def test_after_a_transaction_sqlite3_begins_transactions_as_before(path: Path, how: str) -> None:
    def work(conn: Connection) -> None:
        if how == "with an error":
            raise LookupError
        if how == "early":
            conn.commit()

    with ConnectionPool(path, max_size=1) as pool:
        with contextlib.suppress(LookupError, sqlite3.ProgrammingError):
            in_block(pool, "transaction", work)
        with pool.connection() as conn:
            assert conn.isolation_level == "IMMEDIATE"
            conn.execute("INSERT INTO t VALUES (2)")
            assert conn.in_transaction
            conn.executescript("INSERT INTO t VALUES (3)")
            assert not conn.in_transaction, "here it commits, as it does in sqlite3"
        assert pool.stats().opened == 1


# -- used after its return


@pytest.mark.parametrize(
    "use",
    [
        lambda conn: conn.execute("INSERT INTO t VALUES (7)"),
        lambda conn: conn.execute("PRAGMA foreign_keys = 0"),
        lambda conn: setattr(conn, "row_factory", sqlite3.Row),
        lambda conn: sqlite3.Connection.close(conn),
    ],
)
def test_what_is_done_with_a_connection_after_its_return_reaches_nobody(
    path: Path, use: Callable[[Connection], object], caplog: pytest.LogCaptureFixture
) -> None:
    """It is noticed at the next checkout, if that is not within ten microseconds."""
    with ConnectionPool(path, max_size=1) as pool:
        with pool.connection() as stale:
            pass
        use(stale)
        time.sleep(0.001)
        with pool.connection() as conn:
            assert not conn.in_transaction
            assert conn.row_factory is None
            assert rows(conn, "PRAGMA foreign_keys") == [(1,)]
        assert "used after its return" in caplog.text
    assert written(path) == [1]
