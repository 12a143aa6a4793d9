"""Opening: a path is understood, a mistake is refused early and clearly, and nothing half open is left behind."""

import contextlib
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sqlitepool.cleaning import clean, retire
from sqlitepool.connection import (
    Connection,
    check_options,
    check_path,
    check_pragmas,
    normalise_path,
    open_connection,
)


def connect(
    path: str | os.PathLike[str],
    read_only: bool = False,
    pragmas: Mapping[str, object] | None = None,
    setup: Callable[[sqlite3.Connection], object] | None = None,
    patience: float = 5.0,
    **options: Any,
) -> "contextlib.closing[Connection]":
    target = normalise_path(path, read_only)
    conn = open_connection(
        target.database,
        uri=target.uri,
        read_only=read_only,
        pragmas=pragmas or {},
        setup=setup,
        deadline=time.monotonic() + patience,
        connect_options=options,
    )
    return contextlib.closing(conn)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    with connect(path) as conn:
        conn.execute("CREATE TABLE t (x)")
    return path


def test_the_defaults_are_applied(database: Path) -> None:
    with connect(database) as conn:
        values = {name: conn.read_pragma(name) for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size")}
        assert values == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "mmap_size": 0}
        assert conn.read_pragma("journal_size_limit") == 64 * 1024 * 1024
        assert conn.read_pragma("trusted_schema") == 0
        assert conn.read_pragma("busy_timeout") == 5000
        assert conn.isolation_level == "IMMEDIATE"
        assert not conn.touched


def test_pragmas_replace_the_defaults(tmp_path: Path) -> None:
    pragmas = {"journal_mode": "delete", "synchronous": "FULL", "foreign_keys": False, "cache_size": -500}
    with connect(tmp_path / "app.db", pragmas=pragmas) as conn:
        assert conn.read_pragma("journal_mode") == "delete"
        assert conn.read_pragma("synchronous") == 2
        assert conn.read_pragma("foreign_keys") == 0
        assert conn.read_pragma("cache_size") == -500


@pytest.mark.skipif(sys.version_info < (3, 12), reason="setconfig came with Python 3.12")
def test_the_configuration_is_defensive(database: Path) -> None:
    with connect(database) as conn:
        assert conn.getconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE)  # type: ignore[attr-defined]
        with pytest.raises(sqlite3.OperationalError, match="no such column"):
            conn.execute('SELECT "text"')


# -- paths


def test_a_relative_path_is_bound_to_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalise_path("a.db", False).file == str(tmp_path / "a.db")
    assert normalise_path("file:a.db", False).file == str(tmp_path / "a.db")


@pytest.mark.parametrize("name", ["a b.db", "50%.db", "q?x=1.db", "h#1.db", "ünï.db"])
@pytest.mark.parametrize("read_only", [True, False])
def test_any_file_name_opens_the_same_file(tmp_path: Path, name: str, read_only: bool) -> None:
    file = tmp_path / name
    with connect(file) as conn:
        conn.execute("CREATE TABLE t (x)")
        with connect(file, read_only=read_only) as other:
            assert other.execute("SELECT * FROM t").fetchall() == []
    assert os.listdir(tmp_path) == [name]


def test_a_uri_keeps_its_parameters(database: Path) -> None:
    target = normalise_path(f"file:{database}?cache=private&psow=0", True)
    assert target.database == f"file:{database}?cache=private&psow=0&mode=ro"
    assert target.file == str(database)
    assert normalise_path(f"file://localhost{database}", False).file == str(database)
    with connect(f"file:{database}?cache=private") as conn:
        assert conn.execute("SELECT * FROM t").fetchall() == []


def test_memory_is_one_database_for_all_that_share_the_target() -> None:
    target, stranger = normalise_path(":memory:", False), normalise_path(":memory:", False)
    assert target.memory
    assert target.file is None
    with connect(target.database) as one, connect(target.database) as two, connect(stranger.database) as other:
        one.execute("CREATE TABLE t (x)")
        assert two.execute("SELECT * FROM t").fetchall() == []
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            other.execute("SELECT * FROM t")


def test_read_only_in_memory_is_query_only() -> None:
    target = normalise_path(":memory:", False)
    with connect(target.database) as one, connect(target.database, read_only=True) as two:
        one.execute("CREATE TABLE t (x)")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            two.execute("INSERT INTO t VALUES (1)")
        two.rollback()
        two.execute("PRAGMA query_only = 0")
        assert clean(two)
        assert two.read_pragma("query_only") == 1


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", ValueError),
        ("a\0b", ValueError),
        ("file::memory:", ValueError),
        ("file:x?mode=memory", ValueError),
        ("file:x?vfs=memdb", ValueError),
        ("file://example.org/x.db", ValueError),
        ("file:?mode=ro", ValueError),
        (b"x.db", TypeError),
        (7, TypeError),
    ],
)
def test_what_is_no_path_is_refused(path: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        normalise_path(path, False)


@pytest.mark.parametrize(
    ("path", "read_only", "error"),
    [
        ("missing/app.db", False, FileNotFoundError),
        ("missing.db", True, FileNotFoundError),
        (".", False, IsADirectoryError),
        (".", True, IsADirectoryError),
    ],
)
def test_paths_that_must_fail_are_refused_before_and_at_opening(
    tmp_path: Path, path: str, read_only: bool, error: type[OSError]
) -> None:
    target = normalise_path(tmp_path / path, read_only)
    with pytest.raises(error, match=str(tmp_path)):
        check_path(target, read_only)
    with pytest.raises(error):
        connect(tmp_path / path, read_only)
    assert os.listdir(tmp_path) == []


def test_a_good_path_is_let_through(database: Path) -> None:
    check_path(normalise_path(database, True), True)
    check_path(normalise_path(database, False), False)
    check_path(normalise_path(database.with_name("new.db"), False), False)
    check_path(normalise_path(":memory:", False), False)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_that_is_no_database_is_named(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    with pytest.raises(sqlite3.DatabaseError, match=r"notes\.txt.*not a database") as caught:
        connect(tmp_path / "notes.txt", read_only)
    assert type(caught.value) is sqlite3.DatabaseError


def test_a_file_that_cannot_be_written_says_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "app.db"
    with contextlib.closing(sqlite3.connect(file)) as conn:
        conn.execute("CREATE TABLE t (x)")
    with pytest.raises(sqlite3.OperationalError, match=r"app\.db.*read_only=True"):  # the journal mode cannot be set
        connect(f"file:{file}?mode=ro")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(sqlite3.OperationalError, match=r"app\.db.*read_only=True"):
        check_path(normalise_path(file, False), False)
    check_path(normalise_path(file, True), True)


def test_read_only_cannot_write(database: Path) -> None:
    with connect(database, read_only=True) as conn, pytest.raises(sqlite3.OperationalError, match="readonly"):
        conn.execute("INSERT INTO t VALUES (1)")


# -- options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"timeout": 3}, TypeError, "timeout"),
        ({"check_same_thread": True}, TypeError, "check_same_thread"),
        ({"max_sise": 3}, TypeError, "max_sise"),
        ({"isolation_level": "LAZY"}, ValueError, "LAZY"),
        ({"cached_statements": -1}, ValueError, "cached_statements"),
        ({"detect_types": "all"}, ValueError, "detect_types"),
        ({"factory": sqlite3.Connection}, TypeError, "subclass"),
        ({"factory": type("Own", (Connection,), {})}, TypeError, "__slots__"),
        ({"autocommit": "yes"}, TypeError if sys.version_info < (3, 12) else ValueError, "autocommit"),
    ],
    ids=str,
)
def test_options_that_a_pool_does_not_take(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_options(options)


def test_options_reach_the_connection(database: Path) -> None:
    own = type("Own", (Connection,), {"__slots__": (), "answer": lambda self: 42})
    options = {"factory": own, "isolation_level": None, "cached_statements": 5, "detect_types": sqlite3.PARSE_DECLTYPES}
    check_options(options)
    with connect(database, **options) as conn:
        assert isinstance(conn, own)
        assert conn.isolation_level is None
        conn.execute("PRAGMA foreign_keys = 0")
        assert clean(conn)
        assert conn.read_pragma("foreign_keys") == 1


@pytest.mark.parametrize(
    ("pragmas", "error"),
    [
        ({"foreign_kyes": True}, ValueError),
        ({"main.cache_size": 1}, ValueError),
        ({"cache_size": "1; DROP TABLE t"}, ValueError),
        ({"cache_size": float("nan")}, None),
        ({"cache_size": None}, TypeError),
        ({"cache_size": [1]}, TypeError),
    ],
    ids=str,
)
def test_pragmas_that_do_not_exist_or_are_no_value(pragmas: dict[str, object], error: type[Exception] | None) -> None:
    if error is None:
        check_pragmas(pragmas)
    else:
        with pytest.raises(error):
            check_pragmas(pragmas)


def test_good_pragmas_are_let_through() -> None:
    check_pragmas({"journal_mode": "WAL", "cache_size": -2000, "foreign_keys": True, "synchronous": "normal"})


# -- setup


def test_what_setup_did_is_committed_and_there_for_every_borrower(database: Path) -> None:
    def setup(conn: sqlite3.Connection) -> None:
        conn.create_function("seven", 0, lambda: 7)
        conn.row_factory = sqlite3.Row
        conn.execute("PRAGMA cache_size = 33")
        conn.execute("INSERT INTO t VALUES (1)")

    with connect(database, setup=setup) as conn:
        assert not conn.in_transaction
        conn.row_factory = None
        conn.execute("PRAGMA cache_size = 44")
        assert clean(conn)
        assert conn.row_factory is sqlite3.Row
        assert conn.execute("SELECT seven(), x FROM t").fetchone()["x"] == 1
        assert conn.read_pragma("cache_size") == 33


def test_a_statement_of_setup_is_seen_when_a_borrower_runs_it(database: Path) -> None:
    def setup(conn: sqlite3.Connection) -> None:
        conn.execute("PRAGMA cache_size = 44")
        conn.execute("PRAGMA cache_size = 33")

    with connect(database, setup=setup) as conn:
        conn.execute("PRAGMA cache_size = 44")
        assert clean(conn)
        assert conn.read_pragma("cache_size") == 33


def test_a_failing_setup_closes_the_connection(database: Path) -> None:
    seen: list[sqlite3.Connection] = []

    def setup(conn: sqlite3.Connection) -> None:
        seen.append(conn)
        conn.execute("INSERT INTO t VALUES (1)")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        connect(database, setup=setup)
    with pytest.raises(sqlite3.ProgrammingError):
        seen[0].execute("SELECT 1")
    with connect(database) as conn:
        assert conn.execute("SELECT * FROM t").fetchall() == []


# -- locks


def test_opening_waits_for_a_lock_until_the_deadline(tmp_path: Path) -> None:
    file = tmp_path / "app.db"
    holder = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    holder.execute("CREATE TABLE t (x)")
    holder.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match=r"app\.db.*locked") as caught:
        connect(file, patience=0.1)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    assert 0.1 <= time.monotonic() - start < 2
    timer = threading.Timer(0.1, holder.close)
    timer.start()
    with connect(file) as conn:  # released while we try
        assert conn.read_pragma("journal_mode") == "wal"
    timer.join()


def test_a_retired_connection_closes_in_any_thread(database: Path) -> None:
    with connect(database) as conn:
        thread = threading.Thread(target=retire, args=[conn])
        thread.start()
        thread.join()
        with pytest.raises(sqlite3.ProgrammingError):
            conn.execute("SELECT 1")
