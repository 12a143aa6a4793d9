"""In a forked child the connections that were lent in the parent refuse to work."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from database_support import database, insert, numbers
from pool_support import rows
from test_fork import in_child

from sqlitepool import ConnectionPool, Database

db = database

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()"),
    # What we test is what this warning, of Python 3.12, is about.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def refuses(conn: sqlite3.Connection) -> None:
    """Try, in a child, all that could reach the file."""
    with pytest.raises(sqlite3.ProgrammingError, match="process that forked"):
        conn.execute("INSERT INTO t (n) VALUES (7)")
    with pytest.raises(sqlite3.ProgrammingError, match="process that forked"):
        conn.executemany("INSERT INTO t (n) VALUES (?)", [(7,)])
    with pytest.raises(sqlite3.ProgrammingError, match="process that forked"):
        conn.executescript("INSERT INTO t (n) VALUES (7)")
    for method in (conn.cursor, conn.commit, conn.rollback, conn.__enter__):
        with pytest.raises(sqlite3.ProgrammingError, match="process that forked"):
            method()
    with pytest.raises(sqlite3.ProgrammingError, match="process that forked"):
        conn.blobopen("t", "n", 1)
    assert not conn.in_transaction
    conn.close()  # nothing happens


def test_the_parents_connections_refuse_to_work_in_a_child(db: Database) -> None:
    with db.write() as writing, db.read() as reading:
        insert(writing, 1)
        in_child(lambda: (refuses(writing), refuses(reading)))
        insert(writing, 2)
        assert rows(reading, "SELECT count(*) FROM t") == [(0,)]
    assert numbers(db) == [1, 2]


def test_the_connections_of_a_pool_refuse_too_and_in_the_parent_nothing_has_changed(tmp_path: Path) -> None:
    with ConnectionPool(tmp_path / "app.db") as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE t (n)")
            conn.execute("INSERT INTO t VALUES (1)")
            in_child(lambda: refuses(conn))
            conn.execute("INSERT INTO t VALUES (2)")
        with pool.connection() as again:
            assert again is conn
            assert rows(again, "SELECT n FROM t") == [(1,), (2,)]
