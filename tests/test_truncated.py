"""The file is emptied while it is in use. SQLite does not notice with WAL: it goes on committing to the journal."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pool_support import PATIENCE, start
from test_files import look, make_database, pause, read, replace

from sqlitepool import ConnectionPool, Database

INSERT = "INSERT INTO t VALUES ('lost')"


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    make_database(path, "old")
    return path


def in_block(db: Database, path: Path) -> None:
    with db.write() as conn:
        conn.execute(INSERT)


def in_read_block(db: Database, path: Path) -> None:
    with db.read() as conn:
        conn.execute("SELECT x FROM t").fetchall()


def in_isolated(db: Database, path: Path) -> None:
    with db.isolated() as conn:
        conn.execute(INSERT)


CALLS: dict[str, Callable[[Database, Path], object]] = {
    "execute_write": lambda db, path: db.execute_write(INSERT),
    "submit": lambda db, path: db.submit(sqlite3.Connection.execute, INSERT).result(PATIENCE),
    "write": in_block,
    "isolated": in_isolated,
    "execute": lambda db, path: db.execute("SELECT x FROM t"),
    "read": in_read_block,
    "backup": lambda db, path: db.backup(path.with_name("copy.db")),
    "checkpoint": lambda db, path: db.checkpoint(),
}


@pytest.mark.parametrize("if_replaced", ["reopen", "raise"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_acknowledged_and_the_error_says_why(path: Path, call: str, if_replaced: str) -> None:
    with Database(path, timeout=PATIENCE, if_replaced=if_replaced) as db:  # type: ignore[arg-type]
        db.execute_write("INSERT INTO t VALUES ('kept')")
        db.checkpoint()
        db.execute("SELECT x FROM t")
        os.truncate(path, 0)
        pause()
        for _ in range(2):
            with pytest.raises(sqlite3.DatabaseError, match=r"app\.db was truncated .*os\.replace") as caught:
                CALLS[call](db, path)
            assert caught.value.sqlite_errorname == "SQLITE_CORRUPT"
        assert db.stats().holder is None
    assert not path.with_name("copy.db").exists()


def test_a_file_that_grows_again_is_not_trusted(path: Path) -> None:
    """What is in the journal and in the caches of the connections is not of what was written there since."""
    with Database(path, timeout=PATIENCE) as db:
        db.execute_write("INSERT INTO t VALUES ('kept')")
        os.truncate(path, 0)
        pause()
        with pytest.raises(sqlite3.DatabaseError, match="truncated"):
            db.execute_write(INSERT)
        os.truncate(path, 8192)
        pause()
        with pytest.raises(sqlite3.DatabaseError, match="truncated"):
            db.execute_write(INSERT)


def test_all_is_well_again_when_a_whole_file_is_put_there(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.execute_write("INSERT INTO t VALUES ('kept')")
        os.truncate(path, 0)
        pause()
        with pytest.raises(sqlite3.DatabaseError, match="truncated"):
            db.execute_write(INSERT)
        replace(path)
        with pytest.warns(RuntimeWarning, match="was replaced"):
            db.execute_write("INSERT INTO t VALUES ('more')")
        assert db.execute("SELECT x FROM t") == [("new",), ("more",)]
    with closing(sqlite3.connect(path)) as conn:
        assert read(conn) == ["new", "more"]


def test_functions_that_wait_for_the_same_commit_all_fail(path: Path) -> None:
    began, go = threading.Event(), threading.Event()

    def slow(conn: sqlite3.Connection) -> None:
        conn.execute(INSERT)
        began.set()
        assert go.wait(PATIENCE)

    with Database(path, timeout=PATIENCE) as db:
        calls = [start(db.run_write, slow)]
        assert began.wait(PATIENCE)
        calls += [db.submit(sqlite3.Connection.execute, INSERT) for _ in range(3)]  # type: ignore[list-item]
        os.truncate(path, 0)
        pause()
        go.set()
        for one in calls:
            with pytest.raises(sqlite3.DatabaseError, match="truncated"):
                one.result(PATIENCE)


def test_a_plain_pool_notices_too(path: Path) -> None:
    with ConnectionPool(path) as pool:
        assert look(pool) == ["old"]
        os.truncate(path, 0)
        pause()
        for _ in range(2):
            with pytest.raises(sqlite3.DatabaseError, match="truncated"):
                look(pool)
        assert pool.stats().in_use == 0


def test_a_vacuum_that_makes_the_file_smaller_is_no_damage(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 1000)
        db.checkpoint()
        size = path.stat().st_size
        db.execute_write("DELETE FROM t")
        with db.isolated() as conn:
            conn.execute("VACUUM")
        db.checkpoint()
        assert path.stat().st_size < size
        pause()
        db.execute_write("INSERT INTO t VALUES ('more')")
        assert db.execute("SELECT x FROM t") == [("more",)]


def test_without_wal_an_empty_file_is_an_empty_database(tmp_path: Path) -> None:
    """SQLite reads the first page in each transaction there, and notices by itself."""
    path = tmp_path / "plain.db"
    with Database(path, timeout=PATIENCE, pragmas={"journal_mode": "delete"}) as db:
        assert path.stat().st_size == 0
        db.execute_write("CREATE TABLE t (x)")
        os.truncate(path, 0)
        pause()
        with pytest.raises(sqlite3.DatabaseError, match="no such table"):
            db.execute_write(INSERT)
