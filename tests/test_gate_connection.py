"""The writing connection goes from one transaction to the next with the right to write, clean, and to nobody else."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gate_support import Holder
from pool_support import PATIENCE, open_files, start

from sqlitepool import Database
from sqlitepool.file_lock import FileLock
from sqlitepool.group_commit import GroupCommit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.db"


@pytest.fixture
def db(path: Path) -> Iterator[Database]:
    with Database(path, timeout=PATIENCE) as database:
        database.execute_write("CREATE TABLE t (n)")
        yield database


def insert(conn: sqlite3.Connection, number: int) -> int:
    conn.execute("INSERT INTO t VALUES (?)", (number,))
    return number


def connection_of(db: Database) -> sqlite3.Connection:
    with db.write() as conn:
        return conn


def lent(db: Database) -> tuple[int, int]:
    """How many writing connections are lent, and idle."""
    stats = db._writers.stats()
    return stats.in_use, stats.idle


def test_the_connection_is_kept_for_the_next_transaction_on_any_thread(db: Database) -> None:
    conn = connection_of(db)
    assert lent(db) == (1, 0)
    checkouts = db._writers.stats().checkouts
    assert start(connection_of, db).result(PATIENCE) is conn
    assert db.run_write(lambda conn: conn) is conn
    assert db._writers.stats().checkouts == checkouts


def test_it_is_not_lost_with_the_thread_that_had_it_last(db: Database) -> None:
    thread = threading.Thread(target=db.run_write, args=(insert, 1))
    thread.start()
    thread.join()
    assert lent(db) == (1, 0), "and no warning"
    assert db.close() == []


def test_it_is_in_the_pool_for_whoever_else_takes_a_turn(db: Database) -> None:
    conn = connection_of(db)
    with db._writer.gate.turn(0):
        assert lent(db) == (0, 1)
        with db._writers.connection(0) as lent_by_the_pool:
            assert lent_by_the_pool is conn
    assert db.checkpoint().is_complete
    with db.isolated():
        assert lent(db) == (0, 1)
    assert connection_of(db) is conn


def test_two_databases_on_one_file_keep_to_their_own_connections(db: Database, path: Path) -> None:
    with Database(path, timeout=PATIENCE) as other:
        assert other._writer.gate is db._writer.gate
        ours, theirs = connection_of(db), connection_of(other)
        assert ours is not theirs
        for _ in range(3):
            assert connection_of(db) is ours
            assert connection_of(other) is theirs
            assert lent(db) == (0, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_transaction_finds_nothing_of_the_one_before(db: Database, fails: bool) -> None:
    def change(conn: sqlite3.Connection) -> sqlite3.Cursor:
        conn.row_factory = sqlite3.Row
        conn.execute("CREATE TEMP TABLE mine (a)")
        cursor = conn.execute("SELECT 1 UNION SELECT 2")
        if fails:
            raise KeyError
        return cursor

    cursor: sqlite3.Cursor | None = None
    try:
        with db.write() as conn:
            cursor = change(conn)
    except KeyError:
        pass
    with db.write() as conn:
        assert conn.row_factory is None
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            conn.execute("SELECT * FROM mine")
    if cursor is not None:
        with pytest.raises(sqlite3.ProgrammingError):
            cursor.fetchone()


def test_a_connection_that_was_closed_is_not_kept(db: Database) -> None:
    with pytest.raises(sqlite3.Error), db.write() as conn:
        sqlite3.Connection.close(conn)
    assert lent(db) == (0, 0)
    assert db.run_write(insert, 1) == 1


def test_a_database_closes_though_another_process_has_the_right_to_write(path: Path, tmp_path: Path) -> None:
    db = Database(path, timeout=PATIENCE)
    db.execute_write("CREATE TABLE t (n)")
    other = FileLock(str(path))
    other.open()
    assert other.try_to_queue()
    assert db.close(timeout=0.05) == []
    other.close()
    assert db._writers.stats().size == 0
    assert "app.db" not in open_files(tmp_path)


def test_a_block_that_is_open_when_the_database_is_closed_is_named_with_its_line(db: Database) -> None:
    connection_of(db)
    with Holder(db._writer.gate):
        pass
    with db.write() as conn:
        insert(conn, 1)
        (still_out,) = start(db.close, 0.05).result(PATIENCE)
        assert f"{__file__}:" in still_out.where
        assert still_out.where.endswith("with_its_line")
    assert db._writers.stats().size == 0


def test_a_function_that_nobody_is_before_runs_at_once(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("there is no need for a queue")

    monkeypatch.setattr(GroupCommit, "_admit", refuse)
    before = db.stats()
    assert db.run_write(insert, 1) == 1
    with pytest.raises(KeyError):
        db.run_write(lambda conn: insert(conn, 2) and {}["nothing"])
    db.execute_write("INSERT INTO t VALUES (3)")
    after = db.stats()
    assert (after.batches - before.batches, after.jobs - before.jobs) == (2, 2)
    assert db.execute("SELECT n FROM t") == [(1,), (3,)]


def test_a_function_waits_its_turn_behind_those_that_are_queued(db: Database) -> None:
    with db.write():
        first = db.submit(insert, 1)
        second = start(db.run_write, insert, 2)
    assert (first.result(PATIENCE), second.result(PATIENCE)) == (1, 2)
    assert db.run_write(insert, 3) == 3
    assert db.execute("SELECT n FROM t") == [(1,), (2,), (3,)]
