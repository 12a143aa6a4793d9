"""Reading and writing with `Database`: what each verb promises."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from database_support import CREATE, database, insert, numbers
from pool_support import PATIENCE, eventually, start

from sqlitepool import Database

db = database


# -- writing


def test_a_write_block_is_committed_when_it_ends(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
        assert numbers(db) == []
    assert numbers(db) == [1]


def test_a_write_block_that_raises_is_rolled_back(db: Database) -> None:
    def fail() -> None:
        with db.write() as conn:
            insert(conn, 1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert numbers(db) == []
    assert db.run_write(insert, 2) == 2


def test_execute_write_tells_what_it_did(db: Database) -> None:
    assert db.execute_write("INSERT INTO t (n) VALUES (7)").lastrowid == 1
    result = db.execute_write("INSERT INTO t (n) VALUES (8), (9) RETURNING n")
    assert result.rows == [(8,), (9,)]
    assert db.execute_write("UPDATE t SET n = n + 10 WHERE n > :least", {"least": 7}).rowcount == 2
    assert numbers(db) == [7, 18, 19]


def test_executemany_write_is_all_or_nothing(db: Database) -> None:
    assert db.executemany_write("INSERT INTO t (n) VALUES (?)", ((n,) for n in range(3))) == 3
    with pytest.raises(sqlite3.IntegrityError):
        db.executemany_write("INSERT INTO t (n) VALUES (?)", [(3,), (1,)])
    assert numbers(db) == [0, 1, 2]


def test_a_script_runs_inside_of_the_transaction(db: Database) -> None:
    script = """
        INSERT INTO t (n) VALUES (1); -- one; or more
        CREATE TRIGGER twice AFTER INSERT ON t WHEN new.n < 10 BEGIN INSERT INTO t (n) VALUES (new.n + 10); END;
        INSERT INTO t (n) VALUES (2)
    """

    def fail() -> None:
        with db.write() as conn:
            conn.executescript(script)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert numbers(db) == []
    with db.write() as conn:
        conn.cursor().executescript(script)
    assert numbers(db) == [1, 2, 12]


@pytest.mark.parametrize("sql", ["COMMIT", "rollback", " /* x */ END", "; COMMIT", "BEGIN", "ROLLBACK TRANSACTION"])
def test_sql_that_ends_the_transaction_is_refused_each_time(db: Database, sql: str) -> None:
    for _ in range(2):
        with db.write() as conn:
            insert(conn, 1)
            with pytest.raises(sqlite3.ProgrammingError, match="committed when the block or function ends"):
                conn.execute(sql)
            with pytest.raises(sqlite3.ProgrammingError, match="committed when the block or function ends"):
                conn.executescript(f"SELECT 1; {sql}")
            conn.execute("DELETE FROM t")
    assert numbers(db) == []


@pytest.mark.parametrize("name", ["commit", "rollback", "__enter__"])
def test_a_method_that_ends_the_transaction_is_refused(db: Database, name: str) -> None:
    with db.write() as conn:
        insert(conn, 1)
        with pytest.raises(sqlite3.ProgrammingError, match="committed when the block or function ends"):
            getattr(conn, name)()
    assert numbers(db) == [1]


def test_savepoints_of_the_callers_own_are_allowed(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
        conn.execute("SAVEPOINT mine")
        insert(conn, 2)
        conn.execute("ROLLBACK TO mine")
        conn.execute("ROLLBACK TRANSACTION TO SAVEPOINT mine")
        conn.execute("RELEASE mine")
    assert numbers(db) == [1]


def test_after_sqlite_rolled_back_by_itself_nothing_is_written(db: Database) -> None:
    def lose() -> None:
        with db.write() as conn:
            insert(conn, 2)
            with pytest.raises(sqlite3.IntegrityError):
                conn.execute("INSERT OR ROLLBACK INTO t (n) VALUES (1)")
            with pytest.raises(sqlite3.OperationalError, match="rolled its transaction back"):
                insert(conn, 3)  # would be committed at once
            with pytest.raises(sqlite3.OperationalError, match="rolled its transaction back"):
                conn.cursor().execute("INSERT INTO t (n) VALUES (4)")

    db.execute_write("INSERT INTO t (n) VALUES (1)")
    with pytest.raises(sqlite3.OperationalError, match="rolled its transaction back"):
        lose()
    assert numbers(db) == [1]


def test_a_half_read_returning_does_not_stop_the_commit(db: Database) -> None:
    with db.write() as conn:
        cursor = conn.execute("INSERT INTO t (n) VALUES (1), (2) RETURNING n")
        assert cursor.fetchone() == (1,)
    assert numbers(db) == [1, 2]


def test_the_connection_is_of_no_use_after_its_block(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
    with pytest.raises(sqlite3.OperationalError, match="has ended"):
        insert(conn, 2)
    assert numbers(db) == [1]


def test_a_commit_that_fails_writes_nothing_and_the_next_one_goes_on(db: Database) -> None:
    with db.write() as conn:
        conn.execute("CREATE TABLE child (t REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError), db.write() as conn:
        conn.execute("INSERT INTO child VALUES (99)")
    with db.write() as conn:
        insert(conn, 1)
    assert numbers(db) == [1]
    assert db.execute("SELECT count(*) FROM child") == [(0,)]


@pytest.mark.parametrize(("durable", "level"), [(False, 1), (True, 2)])
def test_durable_is_synchronous_full(tmp_path: Path, durable: bool, level: int) -> None:
    with Database(tmp_path / "app.db", durable=durable) as db, db.write() as conn:
        assert conn.execute("PRAGMA synchronous").fetchone() == (level,)
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# -- reading


def test_a_read_block_sees_one_snapshot(db: Database) -> None:
    with db.read() as conn:
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
        start(db.run_write, insert, 1).result(PATIENCE)
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert numbers(db) == [1]


def test_a_read_block_inside_of_a_write_block_sees_what_was_committed(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
        with db.read() as reader:
            assert reader.execute("SELECT count(*) FROM t").fetchone() == (0,)


@pytest.mark.parametrize("sql", ["INSERT INTO t (n) VALUES (1)", "CREATE TABLE u (x)", "PRAGMA user_version = 2"])
def test_a_reader_that_writes_is_told_what_to_use(db: Database, sql: str) -> None:
    with pytest.raises(sqlite3.OperationalError, match=r"use db\.write"), db.read() as conn:
        conn.execute(sql)
    with pytest.raises(sqlite3.OperationalError, match=r"use db\.write"):
        db.execute(sql)


def test_readers_go_on_while_somebody_writes(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
        assert start(numbers, db).result(PATIENCE) == []


def test_writers_who_wait_take_no_reader(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", readers=1) as db:
        db.execute_write(CREATE)
        waiting = []
        with db.write() as conn:
            insert(conn, 0)
            waiting = [start(db.run_write, insert, n) for n in range(1, 9)]
            eventually(lambda: db.stats().queued == 8)
            assert numbers(db) == []
        for future in waiting:
            future.result(PATIENCE)
        assert numbers(db) == list(range(9))
