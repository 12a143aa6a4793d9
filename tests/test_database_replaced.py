"""The file is removed, replaced or spoilt while a `Database` has it open, under load and at the worst of moments."""

from __future__ import annotations

import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from database_load import in_file, insert_text, under_load
from pool_support import PATIENCE, eventually, open_files, start
from test_files import make_database, pause, replace
from test_fork import in_child

import sqlitepool.connection
import sqlitepool.connection_pool
from sqlitepool import Connection, Database, FileReplaced, PoolError

READ = "SELECT x FROM t ORDER BY rowid"


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    make_database(path, "old")
    return path


@contextmanager
def warned(match: str) -> Iterator[None]:
    """Both pools may warn of the file in this block, and nobody else of anything."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert caught
    assert [str(warning.message) for warning in caught if match not in str(warning.message)] == []


# ---- replaced


def test_when_the_file_is_replaced_under_load_all_that_is_acknowledged_later_is_in_the_new_one(path: Path) -> None:
    with warned("was replaced"), under_load(path) as load:
        make_database(path.with_suffix(".new"), "new")
        os.replace(path.with_suffix(".new"), path)
        pause()
        load.marked.set()
        eventually(lambda: load.errors or {text.split("-")[0] for text in list(load.after)} == {"0", "1", "2"})
        load.until_more()
        assert load.errors == []
    assert set(load.after) <= in_file(path)


def test_what_came_after_the_file_was_replaced_is_not_committed_to_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It joins a group that was begun before: all of that are run again."""
    monkeypatch.setattr("sqlitepool.group_commit._LONGEST_BATCH", PATIENCE)
    began, go = threading.Event(), threading.Event()

    def slow(conn: sqlite3.Connection) -> None:
        insert_text(conn, "slow")
        began.set()
        assert go.wait(PATIENCE)

    with Database(path, timeout=PATIENCE) as db:
        first = start(db.run_write, slow)
        assert began.wait(PATIENCE)
        replace(path)
        late = [start(db.run_write, insert_text, "late"), db.submit(insert_text, "later")]
        eventually(lambda: db.stats().queued == 2)
        with warned("was replaced"):
            go.set()
            for one in (first, *late):
                one.result(PATIENCE)
        assert db.stats().jobs == 3
    assert in_file(path) == {"new", "slow", "late", "later"}


def test_who_reads_the_new_file_does_not_keep_the_writer_out_of_it(path: Path) -> None:
    """It is in no WAL mode yet, and only who is alone in it could change that: so the writer goes first."""
    with Database(path, timeout=PATIENCE) as db:
        assert db.execute(READ) == [("old",)]
        db.run_write(insert_text, "last")
        replace(path)
        with warned("was replaced"), db.read() as conn:
            assert conn.execute(READ).fetchall() == [("new",)]
            db.run_write(insert_text, "first")
            assert conn.execute(READ).fetchall() == [("new",)]
        assert db.execute(READ) == [("new",), ("first",)]


def test_who_reads_the_old_file_may_finish_while_others_use_the_new_one(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.run_write(insert_text, "last")
        with db.read() as conn:
            assert conn.execute(READ).fetchall() == [("old",), ("last",)]
            replace(path)
            with warned("was replaced"):
                assert db.execute(READ) == [("new",)]
                db.run_write(insert_text, "first")
            assert conn.execute(READ).fetchall() == [("old",), ("last",)]
        assert db.execute(READ) == [("new",), ("first",)]
    assert in_file(path) == {"new", "first"}


def write(db: Database, text: str) -> None:
    with db.write() as conn:
        insert_text(conn, text)


@pytest.mark.parametrize("second", [write, lambda db, text: db.checkpoint()], ids=["write", "checkpoint"])
def test_who_waited_at_the_gate_of_the_old_file_goes_on_at_that_of_the_new_one(
    path: Path, second: Callable[[Database, str], object]
) -> None:
    """Each file has a gate of its own. Nobody may wait at one for what somebody at the other has."""
    with Database(path, timeout=5) as db:
        waiting = []
        with warned("was replaced"):
            with db.write():
                for number, work in enumerate([write, second, write], 1):
                    waiting.append(start(work, db, f"{number}"))
                    eventually(lambda: db.stats().gate_waiting == len(waiting))
                replace(path)
            for one in waiting:
                one.result(PATIENCE)
        db.run_write(insert_text, "more")
    assert in_file(path) >= {"new", "1", "3", "more"}


def test_to_read_the_new_file_inside_of_a_write_to_the_old_one_is_an_error_at_once(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        db.execute(READ)
        with warned("was replaced"):
            with db.write() as conn:
                insert_text(conn, "last")
                replace(path)
                with pytest.raises(FileReplaced, match="while a block was open"):
                    db.execute(READ)
            assert db.execute(READ) == [("new",)]


@pytest.mark.parametrize("who", ["reader", "writer"])
def test_a_file_that_is_replaced_while_a_connection_is_opened_is_noticed(
    path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_connection = sqlitepool.connection_pool.open_connection
    texts = ["second", "third"] if who == "reader" else ["third"]

    def open_and_replace(*args: Any, **options: Any) -> Connection:
        conn = open_connection(*args, **options)
        if texts:
            replace(path, texts.pop(0))
        return conn

    with Database(path, timeout=PATIENCE) as db:
        if who == "writer":
            replace(path, "second")
        monkeypatch.setattr(sqlitepool.connection_pool, "open_connection", open_and_replace)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if who == "reader":
                assert db.execute(READ) == [("third",)]
            db.run_write(insert_text, "first")
            assert db.execute(READ) == [("third",), ("first",)]
    assert in_file(path) == {"third", "first"}


def test_a_reader_that_opened_the_new_database_does_not_touch_the_log_of_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open it would truncate the index of the log, which those who still use the old file have in memory."""
    connect, configure = sqlite3.connect, sqlitepool.connection._configure
    read_from: list[str] = []

    def replace_and_connect(database: str, **options: Any) -> sqlite3.Connection:
        if not path.with_name("old.db").exists():
            os.link(path, path.with_name("old.db"))
            replace(path)
        return connect(database, **options)

    def note_and_configure(conn: Connection, read_only: bool, *arguments: Any) -> None:
        if read_only:
            read_from.append("new" if path.with_name("app.db-wal-replaced").exists() else "old")
        configure(conn, read_only, *arguments)

    with Database(path, timeout=PATIENCE) as db:
        db.run_write(insert_text, "last")
        monkeypatch.setattr(sqlite3, "connect", replace_and_connect)
        monkeypatch.setattr(sqlitepool.connection, "_configure", note_and_configure)
        with warned("was replaced"):
            assert db.execute(READ) == [("new",)]
        monkeypatch.undo()
    assert read_from == ["new"]
    assert in_file(path) == {"new"}


def test_the_writer_enters_no_other_file_while_a_reader_is_opened(path: Path) -> None:
    opened, go = threading.Event(), threading.Event()

    def wait(conn: sqlite3.Connection) -> None:
        if threading.current_thread().name == "the reader":
            opened.set()
            assert go.wait(PATIENCE)

    with Database(path, timeout=PATIENCE, setup=wait) as db:
        reader = start(db.execute, READ, name="the reader")
        assert opened.wait(PATIENCE)
        replace(path)
        with warned("was replaced"):
            with pytest.raises(PoolError), db.write(timeout=0.1):
                pass
            go.set()
            reader.result(PATIENCE)
            db.run_write(insert_text, "first")
        assert db.execute(READ) == [("new",), ("first",)]


def test_by_option_a_replaced_file_is_an_error_for_all_until_it_is_back(path: Path) -> None:
    with Database(path, timeout=PATIENCE, if_replaced="raise") as db:
        assert db.execute(READ) == [("old",)]
        os.link(path, path.with_name("aside.db"))
        replace(path)
        for _ in range(2):
            with pytest.raises(FileReplaced):
                db.execute(READ)
            with pytest.raises(FileReplaced):
                db.run_write(insert_text, "nowhere")
        os.replace(path.with_name("aside.db"), path)
        pause()
        db.run_write(insert_text, "more")
        assert db.execute(READ) == [("old",), ("more",)]


# ---- removed


def test_who_reads_after_the_file_was_removed_finds_an_empty_one(path: Path) -> None:
    with Database(path, timeout=PATIENCE) as db:
        assert db.execute(READ) == [("old",)]
        path.unlink()
        pause()
        with warned("was deleted"):
            assert db.execute("SELECT name FROM sqlite_master") == []
        db.execute_write("CREATE TABLE t (x)")
        assert db.execute(READ) == []


def test_when_the_file_is_removed_under_load_nothing_is_acknowledged_that_is_not_in_a_file(path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with under_load(path) as load:
            path.unlink()
            pause()
            load.marked.set()
            eventually(lambda: any("no such table" in str(error) for error in load.errors))
            with load.db.write() as conn:
                conn.execute("CREATE TABLE t (x)")
            load.until_more()
            eventually(lambda: load.after)
    assert any("was deleted" in str(warning.message) for warning in caught)
    assert set(load.after) <= in_file(path)


# ---- spoilt


def test_a_truncated_file_is_an_error_and_the_database_works_again_when_a_good_one_is_put_there(path: Path) -> None:
    with Database(path, timeout=5) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 1000)
        db.checkpoint()
        os.truncate(path, 16384)
        for _ in range(3):
            with pytest.raises(sqlite3.DatabaseError, match=r"malformed|not a database|I/O error"):
                db.execute("SELECT count(x) FROM t WHERE x LIKE '%y%'")
        make_database(path.with_suffix(".new"), "new")
        os.replace(path.with_suffix(".new"), path)
        pause()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert db.execute("SELECT x FROM t") == [("new",)]
            db.execute_write("INSERT INTO t VALUES ('more')")
        assert db.execute("SELECT x FROM t") == [("new",), ("more",)]
    assert in_file(path) == {"new", "more"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_file_that_is_no_database_any_more_is_an_error_for_writers_too(path: Path) -> None:
    with Database(path, timeout=5, pragmas={"cache_size": 10}) as db:
        db.executemany_write("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 1000)
        db.checkpoint()
        in_child(lambda: path.write_bytes(b"this is not a database" * 1000))  # to open it here would drop locks
        for _ in range(3):
            with pytest.raises(sqlite3.DatabaseError):
                db.execute_write("INSERT INTO t SELECT x FROM t")
            with pytest.raises(sqlite3.DatabaseError), db.write() as conn:
                conn.execute("INSERT INTO t SELECT x FROM t")
    assert [name for name in open_files(path.parent) if "-gate" not in name] == []
