"""A journal never gets into a file that it does not belong to, whoever of this process opens a connection there."""

from __future__ import annotations

import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, open_files, start
from test_files import look, make_database, pause, read, replace

import sqlitepool.own_connection
from sqlitepool import ConnectionPool, Database, FileReplaced

pytestmark = pytest.mark.filterwarnings("ignore:.*was (replaced|deleted):RuntimeWarning")

MANY = [("old" * 1000,)] * 50


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "app.db"
    make_database(path, "old")
    yield path
    assert [name for name in open_files(tmp_path) if "-gate" not in name] == []


def in_isolated(db: Database, path: Path) -> list[str]:
    with db.isolated() as conn:
        conn.execute("VACUUM")
        return read(conn)


def in_backup(db: Database, path: Path) -> list[str]:
    copy = path.with_name("copy.db")
    db.backup(copy)
    with closing(sqlite3.connect(copy)) as conn:
        return read(conn)


def in_second_database(db: Database, path: Path) -> list[str]:
    with Database(path) as second:
        return [x for (x,) in second.execute("SELECT x FROM t ORDER BY rowid")]


def in_second_pool(db: Database, path: Path) -> list[str]:
    with ConnectionPool(path) as pool:
        return look(pool)


OPENERS = [in_isolated, in_backup, in_second_database, in_second_pool]
Opener = Callable[[Database, Path], list[str]]


@pytest.mark.parametrize("opener", OPENERS)
def test_whoever_opens_the_new_file_first_finds_what_is_in_it(path: Path, opener: Opener) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", MANY)
        replace(path)
        assert opener(db, path) == ["new"]
        assert path.with_name("app.db-wal-replaced").stat().st_size > 0
        assert db.execute("SELECT x FROM t") == [("new",)]
        db.execute_write("INSERT INTO t VALUES ('more')")
        assert db.execute("PRAGMA integrity_check") == [("ok",)]
    with closing(sqlite3.connect(path)) as conn:
        assert read(conn) == ["new", "more"]


@pytest.mark.parametrize("opener", OPENERS[2:])
def test_also_when_the_one_before_was_told_not_to_reopen_and_is_closed(path: Path, opener: Opener) -> None:
    db = Database(path, timeout=PATIENCE, if_replaced="raise")
    with db:
        db.executemany_write("INSERT INTO t VALUES (?)", MANY)
        replace(path)
        with pytest.raises(FileReplaced):
            db.execute("SELECT x FROM t")
    assert opener(db, path) == ["new"]


@pytest.mark.parametrize("opener", OPENERS[:2])
def test_by_option_isolated_blocks_and_backups_raise_too(path: Path, opener: Opener) -> None:
    with Database(path, timeout=PATIENCE, if_replaced="raise") as db:
        db.execute_write("INSERT INTO t VALUES ('last')")
        os.link(path, path.with_name("aside.db"))
        replace(path)
        for _ in range(2):
            with pytest.raises(FileReplaced, match="was replaced"):
                opener(db, path)
        os.replace(path.with_name("aside.db"), path)
        pause()
        assert opener(db, path) == ["old", "last"]


@pytest.mark.parametrize("opener", OPENERS)
def test_where_the_file_was_removed_an_empty_one_is_opened(path: Path, opener: Opener) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", MANY)
        path.unlink()
        pause()
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            opener(db, path)
        assert db.execute("SELECT * FROM sqlite_master") == []


def test_a_backup_inside_of_a_write_to_the_old_file_is_an_error_at_once(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        with db.write() as conn:
            conn.execute("INSERT INTO t VALUES ('last')")
            replace(path)
            with pytest.raises(FileReplaced, match="while a block was open"):
                in_backup(db, path)
        assert in_backup(db, path) == ["new"]


def test_a_file_replaced_while_an_isolated_connection_is_opened_is_not_touched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection looks when it has the database open, and nothing else."""
    connect = sqlite3.connect
    files = [path.with_name("second"), path.with_name("third")]
    for file in files:
        make_database(file, file.name)

    def replace_and_connect(*args: Any, **options: Any) -> sqlite3.Connection:
        if files:
            os.replace(files.pop(0), path)
        return connect(*args, **options)

    with Database(path, timeout=PATIENCE) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", MANY)
        open_connection = sqlitepool.own_connection.open_connection

        def open_slowly(*args: Any, **options: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(sqlite3, "connect", replace_and_connect)
                return open_connection(*args, **options)

        monkeypatch.setattr(sqlitepool.own_connection, "open_connection", open_slowly)
        assert in_isolated(db, path) == ["third"]
    with closing(sqlite3.connect(path)) as conn:
        assert read(conn) == ["third"]


def test_the_journal_of_the_new_file_is_its_own(path: Path) -> None:
    """One pool has left the old file and writes to the new one; another still has the old one open."""
    with Database(path, timeout=PATIENCE) as db, ConnectionPool(path) as other, other.connection() as conn:
        assert read(conn) == ["old"]
        replace(path)
        db.execute_write("INSERT INTO t VALUES ('first')")
        with Database(path) as third:
            assert third.execute("SELECT x FROM t") == [("new",), ("first",)]
        db.execute_write("INSERT INTO t VALUES ('second')")
        assert read(conn) == ["old"]
        with ConnectionPool(path) as fourth:
            assert look(fourth) == ["new", "first", "second"]


def test_the_old_file_put_back_does_not_get_the_journal_of_the_new_one(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.checkpoint()
        os.link(path, path.with_name("aside.db"))
        replace(path)
        db.executemany_write("INSERT INTO t VALUES (?)", MANY)
        os.replace(path.with_name("aside.db"), path)
        pause()
        assert in_isolated(db, path) == ["old"]
        assert db.execute("SELECT x FROM t") == [("old",)]


def test_a_journal_that_is_gone_is_forgotten(path: Path) -> None:
    """Its number may be that of another one soon, which is set aside for nobody."""
    journals = sqlitepool.database_file._journals
    with Database(path, timeout=PATIENCE) as db:
        assert str(path) in journals._owners
        with db.isolated() as conn:
            conn.execute("VACUUM")
        assert str(path) in journals._owners
    assert str(path) not in journals._owners


def test_a_link_that_is_turned_leaves_the_journal_with_its_file(path: Path, tmp_path: Path) -> None:
    """It lies beside another file, and is in nobody's way."""
    link, other = tmp_path / "current.db", tmp_path / "other.db"
    make_database(other, "new")
    link.symlink_to(path)
    with Database(link, timeout=PATIENCE) as db, db.read() as conn:
        db.execute_write("INSERT INTO t VALUES ('last')")
        assert read(conn) == ["old", "last"]
        (tmp_path / "next").symlink_to(other)
        os.replace(tmp_path / "next", link)
        pause()
        assert in_isolated(db, link) == ["new"]
        assert not path.with_name("app.db-wal-replaced").exists()
    with ConnectionPool(path) as pool:
        assert look(pool) == ["old", "last"]


def test_of_two_who_find_the_old_journal_only_one_sets_it_aside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other would take the new file's journal away."""
    os_replace = os.replace
    entered, go = threading.Event(), threading.Event()
    moved: list[str] = []

    def replace_slowly(source: str, target: str) -> None:
        if source.endswith("-wal"):
            moved.append(threading.current_thread().name)
            entered.set()
            assert go.wait(PATIENCE)
        os_replace(source, target)

    def open_and_insert(text: str) -> None:
        with ConnectionPool(path) as pool, pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (?)", (text,))

    with Database(path, timeout=PATIENCE) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", MANY)
        replace(path)
        monkeypatch.setattr(os, "replace", replace_slowly)
        first = start(open_and_insert, "a", name="first")
        assert entered.wait(PATIENCE)
        second = start(open_and_insert, "b", name="second")
        go.set()
        first.result(PATIENCE)
        second.result(PATIENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sorted(x for (x,) in db.execute("SELECT x FROM t")) == ["a", "b", "new"]
    assert moved == ["first"]


@pytest.mark.parametrize("who", ["pool", "writer"])
def test_a_file_replaced_while_its_first_connection_is_opened_gets_no_journal(
    path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is another connection's, of which the pools know nothing."""
    other, connect = sqlite3.connect(path), sqlite3.connect
    other.execute("PRAGMA journal_mode = wal")
    other.executemany("INSERT INTO t VALUES (?)", MANY)
    other.commit()
    new = path.with_name("new.db")
    make_database(new, "new")
    content = new.read_bytes()

    def replace_and_connect(*args: Any, **options: Any) -> sqlite3.Connection:
        if args[0] != ":memory:" and new.exists():
            os.replace(new, path)
        return connect(*args, **options)

    def open_it() -> None:
        if who == "pool":
            with ConnectionPool(path) as pool:
                look(pool)
        else:
            Database(path, timeout=0)

    with closing(other):
        monkeypatch.setattr(sqlite3, "connect", replace_and_connect)
        with pytest.raises(FileReplaced, match="while a connection to it was opened"):
            open_it()
        monkeypatch.undo()
    assert path.read_bytes() == content
