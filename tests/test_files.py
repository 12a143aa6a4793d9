"""The database file is watched: replaced or deleted underneath, the pool retires its connections and says so."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, open_files, rows, start

from sqlitepool import Connection, ConnectionPool, FileReplaced
from sqlitepool.database_file import DatabaseFile


def make_database(path: Path, text: str) -> None:
    """A database as a backup tool would leave it: one file, one row."""
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("CREATE TABLE t (x)")
        conn.execute("INSERT INTO t VALUES (?)", (text,))
        conn.commit()


def replace(path: Path, text: str = "new") -> None:
    make_database(path.with_suffix(".tmp"), text)
    os.replace(path.with_suffix(".tmp"), path)
    pause()


def pause() -> None:
    """The file is looked at once in a millisecond at least; the next checkout is to see the change."""
    time.sleep(0.002)


def read(conn: sqlite3.Connection) -> list[str]:
    return [x for (x,) in rows(conn, "SELECT x FROM t ORDER BY rowid")]


def look(pool: ConnectionPool[Any]) -> list[str]:
    with pool.connection() as conn:
        return read(conn)


@contextmanager
def told(match: str) -> Iterator[None]:
    """The pool warns once in this block, of this."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in caught if match in str(warning.message)], caught
    assert [warning.category for warning in caught] == [RuntimeWarning]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "app.db"
    make_database(path, "old")
    yield path
    assert open_files(tmp_path) == [], "closed pools leave nothing open"


def test_a_replaced_file_is_opened_anew_with_a_warning(path: Path) -> None:
    with ConnectionPool(path, max_size=3) as pool:
        with pool.connection() as a, pool.connection() as b:
            assert read(a) == read(b) == ["old"]
        replace(path)
        with told("was replaced"):
            assert look(pool) == ["new"]
        assert look(pool) == ["new"]  # without another warning
        assert (pool.stats().size, pool.stats().opened, pool.stats().closed) == (1, 3, 2)
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES ('written')")
    with closing(sqlite3.connect(path)) as conn:
        assert read(conn) == ["new", "written"]


def test_a_deleted_file_is_made_anew_with_a_warning(path: Path) -> None:
    with ConnectionPool(path) as pool:
        assert look(pool) == ["old"]
        path.unlink()
        pause()
        with told("was deleted"), pool.connection() as conn:
            assert rows(conn, "SELECT * FROM sqlite_master") == []
            conn.execute("CREATE TABLE t (x)")
        assert look(pool) == []
    assert path.exists()


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_the_old_wal_is_not_mixed_into_the_new_file(path: Path, how: str) -> None:
    """SQLite finds a journal by its path: the old `-wal` must not be replayed into a file that is not its own."""
    with ConnectionPool(path, max_size=2) as pool:
        with pool.connection() as conn:
            conn.executemany("INSERT INTO t VALUES (?)", [("old" * 1000,)] * 50)
        assert path.with_name("app.db-wal").stat().st_size > 0
        if how == "replaced":
            replace(path)
        else:
            path.unlink()
            pause()
        with told(f"was {how}"), pool.connection() as conn:
            assert rows(conn, "PRAGMA integrity_check") == [("ok",)]
            if how == "replaced":
                assert read(conn) == ["new"]
            else:
                assert rows(conn, "SELECT name FROM sqlite_master") == []


def test_behind_a_symbolic_link_too_the_old_wal_is_not_mixed_into_the_new_file(path: Path, tmp_path: Path) -> None:
    """SQLite follows the link: the `-wal` lies beside the file, not beside the link."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current.db"
    link.symlink_to(path)
    with ConnectionPool(link) as pool:
        with pool.connection() as conn:
            conn.executemany("INSERT INTO t VALUES (?)", [("old" * 1000,)] * 50)
        replace(path)
        with told("was replaced"):
            assert look(pool) == ["new"]


def test_a_link_that_is_turned_to_another_file_is_a_replacement(path: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "current.db", tmp_path / "other.db"
    make_database(other, "new")
    link.symlink_to(path)
    with ConnectionPool(link) as pool:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES ('last')")
        (tmp_path / "next").symlink_to(other)
        os.replace(tmp_path / "next", link)
        pause()
        with told("was replaced"):
            assert look(pool) == ["new"]
    with ConnectionPool(path) as pool:
        assert look(pool) == ["old", "last"], "nothing of the first file is lost"


def test_a_look_that_is_old_news_does_not_bring_the_old_wal_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread has looked at the file just before it is replaced, and goes on when another has left the file."""
    looked, go_on = threading.Event(), threading.Event()
    file_look = DatabaseFile.look

    def look_slowly(file: DatabaseFile) -> str | None:
        found = file_look(file)
        if threading.current_thread().name == "slow" and not looked.is_set():
            looked.set()
            assert go_on.wait(PATIENCE)
        return found

    with ConnectionPool(path, max_size=2) as pool:
        with pool.connection() as conn:
            conn.executemany("INSERT INTO t VALUES (?)", [("old" * 1000,)] * 50)
        monkeypatch.setattr(DatabaseFile, "look", look_slowly)
        slow = start(look, pool, name="slow")
        assert looked.wait(PATIENCE)
        replace(path)

        def let_the_slow_one_go_on(*_: object, **__: object) -> None:
            go_on.set()
            slow.result(PATIENCE)

        with warnings.catch_warnings():  # told when the connections are closed, before others are opened
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", let_the_slow_one_go_on)
            assert look(pool) == ["new"]
    with closing(sqlite3.connect(path)) as conn:
        assert read(conn) == ["new"]


def test_a_file_that_comes_with_its_own_wal_keeps_it(path: Path, tmp_path: Path) -> None:
    """A copy of a live database is two files; the rows in its journal belong to it."""
    source = tmp_path / "source.db"
    make_database(source, "new")
    with ConnectionPool(path) as pool, closing(sqlite3.connect(source)) as live:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES ('last')")
        live.execute("PRAGMA journal_mode = wal")
        live.execute("INSERT INTO t VALUES ('in the journal')")
        live.commit()
        for suffix in ("-wal", ""):
            copy = tmp_path / f"copy{suffix}"
            copy.write_bytes((tmp_path / f"source.db{suffix}").read_bytes())
            os.replace(copy, f"{path}{suffix}")
        pause()
        with told("was replaced"):
            assert look(pool) == ["new", "in the journal"]


def test_a_file_replaced_while_the_pool_has_no_connection_is_just_opened(path: Path) -> None:
    with ConnectionPool(path) as pool:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES ('last')")
        pool.drain()
        replace(path)
        assert look(pool) == ["new"]


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_by_option_a_replaced_file_is_an_error_until_it_is_back(path: Path, how: str) -> None:
    aside = path.with_name("aside.db")
    with ConnectionPool(path, if_replaced="raise") as pool:
        assert look(pool) == ["old"]
        os.link(path, aside)
        if how == "replaced":
            replace(path)
        else:
            path.unlink()
            pause()
        for _ in range(3):
            with pytest.raises(FileReplaced, match=rf"app\.db was {how}"):
                look(pool)
            assert pool.stats().size == 0
        os.replace(aside, path)
        pause()
        assert look(pool) == ["old"]


@pytest.mark.parametrize("if_replaced", ["reopen", "raise"])
def test_while_a_connection_to_the_old_file_is_lent_the_new_one_is_not_opened(path: Path, if_replaced: Any) -> None:
    with ConnectionPool(path, if_replaced=if_replaced) as pool:
        with pool.connection() as conn:
            replace(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(2):
                    with pytest.raises(FileReplaced):
                        start(look, pool).result(PATIENCE)
            assert read(conn) == ["old"], "its borrower may finish"
            assert pool.stats().size == 1
        assert pool.stats().size == 0
        if if_replaced == "reopen":
            assert look(pool) == ["new"]
        else:
            with pytest.raises(FileReplaced):
                look(pool)


def test_a_file_replaced_twice_is_noticed_twice(path: Path) -> None:
    with ConnectionPool(path) as pool:
        look(pool)
        for text in ("second", "third"):
            replace(path, text)
            with told("was replaced"):
                assert look(pool) == [text]


def test_a_warning_that_is_an_error_costs_nothing(path: Path) -> None:
    with ConnectionPool(path) as pool:
        look(pool)
        replace(path)
        with pytest.raises(RuntimeWarning, match="replaced"):  # this project's settings make errors of warnings
            look(pool)
        assert look(pool) == ["new"]
        assert pool.stats().in_use == 0


def test_a_waiter_gets_the_new_file(path: Path) -> None:
    """The only connection comes back after the file was replaced: who waits for it is not given the old one."""
    with ConnectionPool(path, max_size=1) as pool:
        conn: Connection = pool.acquire()
        assert read(conn) == ["old"]
        replace(path)
        pool.release(conn)
        with told("was replaced"):
            assert look(pool) == ["new"]


def test_a_file_that_only_changes_is_not_replaced(path: Path) -> None:
    with ConnectionPool(path) as pool:
        first = look(pool)
        with closing(sqlite3.connect(path)) as other:
            other.execute("INSERT INTO t VALUES ('more')")
            other.commit()
        os.utime(path)
        pause()
        assert look(pool) == [*first, "more"]
        assert pool.stats().opened == 1


def test_a_folder_that_is_gone_is_an_error_that_says_so(path: Path, tmp_path: Path) -> None:
    with ConnectionPool(path) as pool:
        look(pool)
        hidden = tmp_path.with_name(tmp_path.name + "-gone")
        tmp_path.rename(hidden)
        pause()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(2):
                    with pytest.raises((FileNotFoundError, FileReplaced)):
                        look(pool)
            assert pool.stats().size == 0
        finally:
            hidden.rename(tmp_path)
        pause()
        assert look(pool) == ["old"]
