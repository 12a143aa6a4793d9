"""What a borrower cannot do with the connection of `Database` that reads: end the snapshot, or write anywhere."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from database_support import database, insert
from pool_support import rows

from sqlitepool import ConnectionPool, Database, Scope
from sqlitepool.tracking import LAYOUT

db = database

pytestmark = pytest.mark.skipif(LAYOUT is None, reason="SQL cannot be refused beforehand on this Python")

ENDS: list[Callable[[sqlite3.Connection], object]] = [
    lambda conn: conn.commit(),
    lambda conn: conn.rollback(),
    lambda conn: conn.__enter__(),
    lambda conn: conn.execute("COMMIT"),
    lambda conn: conn.execute(" /* x */ end"),
    lambda conn: conn.cursor().execute("; ROLLBACK TRANSACTION"),
    lambda conn: sqlite3.Cursor(conn).execute("ROLLBACK"),
    lambda conn: conn.execute("BEGIN"),
    lambda conn: conn.executescript("SELECT 1; COMMIT; SELECT 2"),
    lambda conn: conn.cursor().executescript("COMMIT"),
    lambda conn: setattr(conn, "isolation_level", None),
]
if sys.version_info >= (3, 12):
    ENDS.append(lambda conn: setattr(conn, "autocommit", True))


@pytest.mark.parametrize("end", ENDS)
def test_a_read_block_keeps_its_snapshot_whatever_is_tried_to_end_it(
    db: Database, end: Callable[[sqlite3.Connection], object]
) -> None:
    with db.read() as conn:
        assert rows(conn, "SELECT count(*) FROM t") == [(0,)]
        for _ in range(2):  # again: a text that was refused must not be remembered as a good one
            with pytest.raises(sqlite3.ProgrammingError, match="snapshot begins and ends with the block"):
                end(conn)
        db.run_write(insert, 1)
        assert rows(conn, "SELECT count(*) FROM t") == [(0,)]
    assert db.execute("SELECT count(*) FROM t") == [(1,)]


def test_a_script_runs_in_the_snapshot(db: Database) -> None:
    with db.read() as conn:
        assert rows(conn, "SELECT count(*) FROM t") == [(0,)]
        conn.executescript("CREATE TEMP TABLE wanted (n); INSERT INTO wanted VALUES (1)")
        cursor = conn.cursor()
        assert cursor.executescript("INSERT INTO wanted VALUES (2); -- the end") is cursor
        db.run_write(insert, 1)
        assert rows(conn, "SELECT count(*) FROM t, wanted") == [(0,)]
        assert rows(conn, "SELECT count(*) FROM wanted") == [(2,)]
    with db.read() as conn, pytest.raises(sqlite3.OperationalError, match="no such table"):
        conn.execute("SELECT * FROM wanted")


def test_a_savepoint_is_allowed_in_a_read_block(db: Database) -> None:
    with db.read() as conn:
        for sql in ("SAVEPOINT a", "SELECT * FROM t", "ROLLBACK TO a", "ROLLBACK TRANSACTION TO a", "RELEASE a"):
            conn.execute(sql)


def test_a_snapshot_that_was_ended_past_us_is_not_taken_for_one(db: Database) -> None:
    with pytest.raises(sqlite3.OperationalError, match="snapshot of this read block was ended"), db.read() as conn:
        sqlite3.Cursor(conn).executescript("SELECT 1")
    with contextlib.suppress(LookupError), db.read() as conn:  # an error of the block's own says more
        sqlite3.Cursor(conn).executescript("SELECT 1")
        raise LookupError
    assert db.execute("SELECT count(*) FROM t") == [(0,)]


def test_to_commit_where_no_block_is_open_does_nothing(db: Database) -> None:
    """Over a `Database` a scope lends outside of a transaction: code that ends each of its reads goes on to work."""
    with Scope(db) as scope:
        conn = scope.get()
        with conn:
            assert rows(conn, "SELECT count(*) FROM t") == [(0,)]
        conn.commit()
        conn.rollback()
        with pytest.raises(sqlite3.ProgrammingError, match="snapshot"):
            conn.execute("BEGIN")
        conn.execute("SAVEPOINT left_open")
    with db.read() as again:
        assert again is conn  # it was proved clean, not replaced


# -- writing elsewhere

WAYS_TO_WRITE = [
    "ATTACH 'other.db' AS o",
    "/* x */ attach database ':memory:' AS o",
    "VACUUM",
    "VACUUM INTO 'other.db'",
    "PRAGMA wal_checkpoint",
    "PRAGMA main.wal_checkpoint(TRUNCATE)",
    "PRAGMA journal_mode = delete",
    "PRAGMA query_only = 0",
    'PRAGMA "query_only"(0)',
]


def in_block(db: Database, run: Callable[[sqlite3.Connection], object]) -> None:
    with db.read() as conn:
        run(conn)


WAYS: dict[str, Callable[[Database, str], object]] = {
    "execute": lambda db, sql: db.execute(sql),
    "read": lambda db, sql: in_block(db, lambda conn: conn.execute(sql)),
    "script": lambda db, sql: in_block(db, lambda conn: conn.executescript(sql)),
    "cursor by hand": lambda db, sql: in_block(db, lambda conn: sqlite3.Cursor(conn).execute(sql)),
}


@pytest.mark.parametrize("sql", WAYS_TO_WRITE)
@pytest.mark.parametrize("how", WAYS)
def test_who_reads_writes_nowhere_else_and_is_told_what_to_use(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(sqlite3.OperationalError, match=r"only reads.*use db\."):
        WAYS[how](db, sql)
    assert sorted(tmp_path.iterdir()) == before


def test_not_even_a_script_that_nobody_looks_at_attaches_a_file(db: Database, tmp_path: Path) -> None:
    for sql in (f"ATTACH '{tmp_path}/other.db' AS o", f"VACUUM INTO '{tmp_path}/other.db'"):
        with pytest.raises(sqlite3.OperationalError, match="too many attached"), db.read() as conn:
            sqlite3.Cursor(conn).executescript(sql)
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize("sql", ["INSERT INTO t (n) VALUES (1)", "PRAGMA user_version = 7", "CREATE TABLE u (x)"])
def test_who_writes_to_the_database_itself_is_told_what_to_use(db: Database, sql: str) -> None:
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match=r"readonly.*use db\.write\(\)"), db.read() as conn:
            conn.execute(sql)
        with pytest.raises(sqlite3.OperationalError, match=r"readonly.*use db\.write\(\)"):
            db.execute(sql)


def test_what_setup_attached_can_be_read_but_not_written_by_who_reads(tmp_path: Path) -> None:
    other = tmp_path / "other.db"

    def attach(conn: sqlite3.Connection) -> None:
        conn.execute("ATTACH ? AS other", (str(other),))

    with Database(tmp_path / "app.db", setup=attach) as db:
        db.execute_write("CREATE TABLE other.o (x)")
        db.execute_write("INSERT INTO other.o VALUES (1)")
        for _ in range(3):
            with pytest.raises(sqlite3.OperationalError, match=r"readonly.*use db\.write\(\)"):
                db.execute("INSERT INTO other.o VALUES (2)")
            with pytest.raises(sqlite3.OperationalError, match="only reads"):
                db.execute("PRAGMA query_only = 0")
            with db.read() as conn:
                assert rows(conn, "SELECT x FROM other.o") == [(1,)]
        assert db.stats().readers.opened == 1


def test_a_database_in_memory_cannot_be_written_by_who_reads() -> None:
    with Database(":memory:") as db:
        db.execute_write("CREATE TABLE t (n)")
        for sql in ("PRAGMA query_only = 0", "INSERT INTO t VALUES (1)"):
            with pytest.raises(sqlite3.OperationalError, match=r"only reads.*use db\."), db.read() as conn:
                conn.execute(sql)
        assert db.execute("SELECT * FROM t") == []


def test_reading_costs_no_connection(db: Database) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: db.execute("PRAGMA journal_mode"),
        lambda: db.execute("PRAGMA query_only"),
        lambda: db.execute("SELECT 'commit; attach'"),
        lambda: db.execute("CREATE TEMP TABLE s (x)"),
    ]
    for call in calls * 3:
        call()
    assert db.stats().readers.opened == 1


def test_a_file_that_cannot_be_written_is_refused_with_a_way_that_there_is(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db")) as conn:
        conn.execute("CREATE TABLE t (n)")
    with pytest.raises(sqlite3.OperationalError, match=r"ConnectionPool\(\.\.\., read_only=True\)"):
        Database(f"file:{tmp_path}/app.db?mode=ro")
    with ConnectionPool(tmp_path / "app.db", read_only=True) as pool, pool.connection() as conn:
        assert rows(conn, "SELECT * FROM t") == []
