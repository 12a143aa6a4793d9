"""A block ends as `with conn:` does; a retired connection holds nothing back."""

import contextlib
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pool_support import Open

from sqlitepool.cleaning import clean, end_block, retire
from sqlitepool.connection import Connection


def rows(conn: sqlite3.Connection, sql: str) -> list[Any]:
    return conn.execute(sql).fetchall()


def count(conn: sqlite3.Connection) -> int:
    return int(rows(conn, "SELECT count(*) FROM t")[0][0])


@pytest.mark.parametrize("isolation_level", ["IMMEDIATE", "DEFERRED", None])
@pytest.mark.parametrize("commit", [True, False])
def test_a_block_is_committed_or_rolled_back(opened: Open, commit: bool, isolation_level: str | None) -> None:
    conn, other = opened(isolation_level=isolation_level), opened()
    if isolation_level is None:
        conn.execute("BEGIN")
    conn.execute("DELETE FROM t WHERE id = 1")
    end_block(conn, commit)
    assert not conn.in_transaction
    assert count(other) == (2 if commit else 3)


def test_a_half_read_returning_is_committed(opened: Open) -> None:
    conn = opened()
    cursor = conn.execute("UPDATE t SET b = 'x' RETURNING id")
    assert cursor.fetchone() == (1,)
    end_block(conn, True)
    assert rows(opened(), "SELECT b FROM t") == [("x",)] * 3


def test_a_failed_commit_is_rolled_back_and_raised(opened: Open) -> None:
    conn = opened()
    conn.execute("CREATE TABLE child (t REFERENCES t DEFERRABLE INITIALLY DEFERRED)")
    conn.execute("INSERT INTO child VALUES (99)")
    with pytest.raises(sqlite3.IntegrityError):
        end_block(conn, True)
    assert not conn.in_transaction
    assert clean(conn)
    assert rows(conn, "SELECT * FROM child") == []


def test_a_commit_that_finds_the_file_busy_is_rolled_back(tmp_path: Path) -> None:
    """Without WAL a reader keeps the writer from committing, and leaves it in its transaction."""
    writer = sqlite3.connect(tmp_path / "journal.db", factory=Connection, timeout=0, isolation_level=None)
    writer.execute("CREATE TABLE t (x)")
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM t").fetchall()
        writer.execute("BEGIN")
        writer.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            end_block(writer, True)
        assert not writer.in_transaction
        reader.execute("COMMIT")
        assert reader.execute("SELECT * FROM t").fetchall() == []
    retire(writer)


def test_a_block_whose_connection_was_closed_ends_quietly(opened: Open) -> None:
    conn = opened()
    conn.close()
    end_block(conn, True)
    end_block(conn, False)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit came with Python 3.12")
def test_autocommit_true_is_rolled_back_too(opened: Open) -> None:
    conn = opened(autocommit=True)
    conn.execute("BEGIN")
    conn.execute("DELETE FROM t")
    assert clean(conn)
    assert not conn.in_transaction
    assert count(conn) == 3


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit came with Python 3.12")
@pytest.mark.parametrize("how", ["nothing", "COMMIT", "ROLLBACK", "block", "pragma"])
def test_autocommit_false_rests_in_a_transaction(opened: Open, how: str) -> None:
    conn = opened(autocommit=False)
    assert conn.in_transaction
    conn.execute("DELETE FROM t")
    if how == "block":
        end_block(conn, True)
    elif how == "pragma":
        conn.rollback()
        conn.executescript("ROLLBACK; PRAGMA foreign_keys = 0")
    elif how != "nothing":
        conn.execute(how)
    for _ in range(2):
        assert clean(conn)
        assert conn.in_transaction
        assert conn.autocommit is False  # type: ignore[attr-defined]
    assert rows(conn, "PRAGMA foreign_keys") == [(1,)]
    assert count(opened()) == (0 if how in ("block", "COMMIT") else 3)


def test_retire_releases_locks_and_may_be_called_twice(opened: Open) -> None:
    conn, other = opened(), opened()
    cursor = conn.execute("UPDATE t SET b = NULL RETURNING id")
    cursor.fetchone()
    retire(conn)
    retire(conn)
    other.execute("DELETE FROM t")  # the write lock is free
    other.commit()
    with pytest.raises(sqlite3.ProgrammingError):
        conn.execute("SELECT 1")
    assert not clean(conn)


def test_retire_takes_a_closed_connection(opened: Open) -> None:
    conn = opened()
    conn.close()
    retire(conn)


def test_retire_interrupts_a_statement_of_another_thread(opened: Open) -> None:
    conn = opened()
    errors = []
    running = threading.Event()

    def forever() -> None:
        conn.set_progress_handler(lambda: running.set(), 1000)  # type: ignore[func-returns-value]
        try:
            conn.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n")
        except sqlite3.Error as error:
            errors.append(str(error))

    thread = threading.Thread(target=forever)
    thread.start()
    assert running.wait(10)
    assert not clean(conn)
    retire(conn)
    thread.join(10)
    assert errors == ["interrupted"]


def test_without_sight_of_cursors_nothing_is_lent_again(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlitepool.tracking.LAYOUT", None)
    monkeypatch.setattr("sqlitepool.cleaning.LAYOUT", None)
    conn = opened()
    conn.execute("BEGIN")
    conn.execute("DELETE FROM t WHERE id = 1")
    end_block(conn, True)
    assert not clean(conn)
    retire(conn)
    with pytest.raises(sqlite3.ProgrammingError):
        conn.execute("SELECT 1")
