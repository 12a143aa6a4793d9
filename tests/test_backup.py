"""Where a backup goes: what it may replace, what it leaves alone, and what is left when it fails."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from database_support import CREATE, insert
from pool_support import PATIENCE, start

from sqlitepool import Database


@pytest.fixture(name="db")
def _db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.chdir(tmp_path)
    db = Database("app.db", timeout=PATIENCE)
    db.execute_write(CREATE)
    db.run_write(insert, 7)
    return db


@pytest.fixture(autouse=True)
def _close(db: Database, tmp_path: Path) -> object:
    yield
    db.close()
    assert [name for name in os.listdir(tmp_path) if "-partial" in name] == [], "nothing half done is left"


def numbers_in(path: str) -> list[int]:
    with closing(sqlite3.connect(path)) as conn:
        return [n for (n,) in conn.execute("SELECT n FROM t")]


def plain(path: str) -> sqlite3.Connection:
    conn = sqlite3.connect(path, isolation_level=None, timeout=0)
    conn.execute("CREATE TABLE other (x)")
    return conn


@pytest.mark.parametrize("lock", ["BEGIN; SELECT * FROM other", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_database_with_a_rollback_journal_that_is_in_use_is_not_replaced(db: Database, lock: str) -> None:
    with closing(plain("copy.db")) as other:
        for statement in lock.split("; "):
            other.execute(statement).fetchall()
        with pytest.raises(FileExistsError, match="in use"):
            db.backup("copy.db")
        other.execute("COMMIT")
        other.execute("INSERT INTO other VALUES (1)")
    db.backup("copy.db")
    assert numbers_in("copy.db") == [7]


def test_one_that_comes_into_use_while_the_copy_is_made_is_not_replaced(db: Database) -> None:
    with closing(plain("copy.db")) as other:

        def lock(status: int, remaining: int, total: int) -> None:
            other.execute("BEGIN IMMEDIATE")

        with pytest.raises(FileExistsError, match="in use"):
            db.backup("copy.db", progress=lock)
        other.execute("INSERT INTO other VALUES (1)")
        other.execute("COMMIT")
        assert other.execute("SELECT * FROM other").fetchall() == [(1,)]


def test_what_nobody_uses_is_replaced(db: Database) -> None:
    plain("copy.db").close()
    Path("text.db").write_text("no database")
    Path("empty.db").touch()
    with closing(sqlite3.connect("wal.db")) as other:
        other.execute("PRAGMA journal_mode = wal")
        other.execute("CREATE TABLE other (x)")
    for name in ("copy.db", "text.db", "empty.db", "wal.db", "fresh.db"):
        db.backup(name)
        assert numbers_in(name) == [7]
    assert [name for name in os.listdir() if name.endswith(("-wal", "-shm")) and not name.startswith("app.db")] == []


def test_backups_to_one_file_at_the_same_time_do_not_disturb_each_other(db: Database) -> None:
    db.executemany_write("INSERT INTO t (n) VALUES (?)", [(number,) for number in range(1000, 50_000)])
    calls = [start(db.backup, "copy.db") for _ in range(4)]
    for call in calls:
        call.result(PATIENCE)
    assert len(numbers_in("copy.db")) == 49_001


def test_an_error_while_the_copy_is_made_leaves_nothing(db: Database) -> None:
    def fail(*_: int) -> None:
        raise KeyError("progress")

    with pytest.raises(KeyError):
        db.backup("copy.db", progress=fail)
    assert not os.path.exists("copy.db")


@pytest.mark.parametrize(
    ("destination", "error", "match"),
    [
        (":memory:", ValueError, "pass a connection"),
        ("file:x?mode=memory&cache=shared", ValueError, "pass a connection"),
        ("", ValueError, "not the path"),
        (b"copy.db", TypeError, "str or os.PathLike"),
        (".", IsADirectoryError, "folder"),
        ("missing/copy.db", FileNotFoundError, "no such folder"),
        ("app.db", ValueError, "its own backup"),
        ("file:app.db?mode=rw", ValueError, "its own backup"),
    ],
)
def test_what_is_no_file_to_copy_to_is_refused(
    db: Database, destination: str, error: type[Exception], match: str
) -> None:
    before = set(os.listdir())
    with pytest.raises(error, match=match):
        db.backup(destination)
    assert set(os.listdir()) == before


def test_a_uri_names_the_file(db: Database, tmp_path: Path) -> None:
    db.backup("file:copy%201.db")
    assert numbers_in("copy 1.db") == [7]


def disk_full(*_: object, **__: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
    raise error


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda db: db.backup("copy.db", progress=disk_full), "in a backup to copy.db"),
        (Database.checkpoint, "checkpoint"),
    ],
)
def test_the_error_of_a_full_disk_names_the_file_and_the_step(
    db: Database, call: Callable[[Database], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db._wal, "_cut", disk_full)
    with pytest.raises(sqlite3.OperationalError) as caught:
        call(db)
    (note,) = caught.value.__notes__
    assert said in note
    assert "app.db (SQLITE_FULL)" in note


def test_a_hard_link_to_a_database_in_use_is_an_error_that_says_so(db: Database) -> None:
    os.link("app.db", "link.db")
    with pytest.raises(sqlite3.OperationalError, match="hard links"):
        Database("link.db")
