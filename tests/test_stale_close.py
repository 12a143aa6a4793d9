"""Who closes a connection after giving it back closes nobody else's."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from database_support import database, insert, numbers
from pool_support import PATIENCE, open_files, rows

from sqlitepool import ConnectionPool, Database

db = database


class Wrapper:
    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn

    def close(self) -> None:
        self.conn.close()


def unwrap(item: Any) -> Any:
    return item.conn if isinstance(item, Wrapper) else item


@pytest.mark.parametrize("wrap", [None, Wrapper], ids=["raw", "wrapped"])
@pytest.mark.parametrize("way", ["with", "transaction", "release"])
def test_a_stale_close_never_reaches_the_next_borrower(tmp_path: Path, way: str, wrap: Any) -> None:
    with ConnectionPool(tmp_path / "app.db", wrap=wrap, max_size=1) as pool:
        for number in range(3):
            if way == "release":
                stale = pool.acquire()
                pool.release(stale)
            else:
                with pool.connection() if way == "with" else pool.transaction() as stale:
                    pass
            stale.close()
            stale.close()
            with pool.connection(timeout=0) as item:
                unwrap(item).execute("CREATE TABLE IF NOT EXISTS t (n)")
                unwrap(item).execute("INSERT INTO t VALUES (?)", (number,))
            with pool.connection() as item:
                assert rows(unwrap(item), "SELECT count(*) FROM t") == [(number + 1,)]
    assert open_files(tmp_path) == []


def test_a_borrower_can_still_close_its_connection_at_once(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db", max_size=1) as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE t (n)")
            conn.close()
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                conn.execute("SELECT 1")
        with pool.connection() as other:
            assert other is not conn
            assert rows(other, "SELECT * FROM t") == []


def test_a_reset_that_closes_the_connection_has_it_replaced(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db", max_size=1, reset=lambda conn: conn.close()) as pool:
        with pool.connection() as first:
            pass
        with pool.connection(timeout=0) as second:
            assert second is not first
            assert rows(second, "SELECT 1") == [(1,)]
    assert open_files(tmp_path) == []


def test_the_end_of_the_pool_closes_for_good(tmp_path: Path) -> None:
    pool = ConnectionPool(tmp_path / "app.db", wrap=Wrapper)
    with pool.connection() as item:
        pass
    pool.close()
    item.close()
    assert open_files(tmp_path) == []
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        item.conn.execute("SELECT 1")


def test_a_stale_close_harms_nobody_who_reads_in_a_database(db: Database) -> None:
    for _ in range(3):
        with db.read() as stale:
            pass
        stale.close()
        with db.read() as conn:
            assert conn is stale
            stale.close()  # while another borrower reads
            assert rows(conn, "SELECT * FROM t") == []
        assert db.execute("SELECT count(*) FROM t") == [(0,)]


def test_a_stale_close_harms_nobody_who_writes_in_a_database(db: Database) -> None:
    with db.write() as stale:
        insert(stale, 1)
    with contextlib.suppress(sqlite3.ProgrammingError):  # it may be refused
        stale.close()
    db.execute_write("INSERT INTO t (n) VALUES (2)")
    assert db.submit(insert, 3).result(PATIENCE) == 3
    with db.write() as conn:
        with contextlib.suppress(sqlite3.ProgrammingError):
            stale.close()
        insert(conn, 4)
    assert numbers(db) == [1, 2, 3, 4]
