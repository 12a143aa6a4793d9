"""What one borrower leaves never reaches the next: every kind of state, through the pool, raw and wrapped.

`test_cleaning.py` tries one connection in all spellings; here it is the whole way from one loan to the next.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pool_support import open_files, rows

from sqlitepool import ConnectionPool

Trace = Callable[[sqlite3.Connection], Any]


class Wrapper:
    """An application's object around the connection, with a row factory of its own."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn
        conn.row_factory = sqlite3.Row


def unwrap(item: Any) -> sqlite3.Connection:
    return item.conn if isinstance(item, Wrapper) else item


def answer(sql: str) -> Trace:
    """What a query says, as plain tuples, or the error that it raises."""

    def ask(conn: sqlite3.Connection) -> Any:
        cursor = conn.cursor()
        cursor.row_factory = None  # type: ignore[assignment]
        try:
            return cursor.execute(sql).fetchall()
        except sqlite3.Error as error:
            return str(error)

    return ask


def attribute(name: str) -> Trace:
    return lambda conn: getattr(conn, name)


def runs(sql: str) -> Callable[[sqlite3.Connection], object]:
    return lambda conn: conn.execute(sql).fetchall()


def traces(conn: sqlite3.Connection) -> bool:
    SEEN.clear()
    conn.execute("SELECT 42")
    return bool(SEEN)


SEEN: list[str] = []
COUNTED = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99) SELECT max(i) FROM n"
TEMPORARY = answer("SELECT name FROM temp.sqlite_master")
DATABASES = answer("SELECT name FROM pragma_database_list WHERE name <> 'temp'")


class Sum:
    def step(self, value: int) -> None: ...
    def inverse(self, value: int) -> None: ...
    def value(self) -> int:
        return 7

    def finalize(self) -> int:
        return 7


@dataclass(frozen=True)
class Left:
    """A kind of state: how a borrower leaves it behind, and how the next one would see it."""

    name: str
    do: Callable[[Any], object]
    seen: Trace

    def __str__(self) -> str:
        return self.name


def pragma(name: str, value: str) -> Left:
    return Left(f"PRAGMA {name}", runs(f"PRAGMA {name} = {value}"), answer(f"PRAGMA {name}"))


ROWS_OF_FACTS: list[Left] = [
    Left("transaction", runs("BEGIN"), attribute("in_transaction")),
    Left("savepoint", runs("SAVEPOINT s"), attribute("in_transaction")),
    Left("row_factory", lambda c: setattr(c, "row_factory", len), attribute("row_factory")),
    Left("text_factory", lambda c: setattr(c, "text_factory", bytes), attribute("text_factory")),
    Left("isolation_level", lambda c: setattr(c, "isolation_level", "EXCLUSIVE"), attribute("isolation_level")),
    Left("isolation_level None", lambda c: setattr(c, "isolation_level", None), attribute("isolation_level")),
    pragma("foreign_keys", "0"),
    pragma("cache_size", "17"),
    pragma("synchronous", "0"),
    pragma("busy_timeout", "17"),
    pragma("query_only", "1"),
    pragma("recursive_triggers", "1"),
    pragma("temp_store", "2"),
    pragma("ignore_check_constraints", "1"),
    pragma("wal_autocheckpoint", "0"),
    pragma("reverse_unordered_selects", "1"),
    pragma("trusted_schema", "1"),
    pragma("locking_mode", "exclusive"),
    Left("PRAGMA case_sensitive_like", runs("PRAGMA case_sensitive_like = 1"), answer("SELECT 'a' LIKE 'A'")),
    Left("PRAGMA in a script", lambda c: c.executescript("PRAGMA foreign_keys = 0"), answer("PRAGMA foreign_keys")),
    Left("temp table", runs("CREATE TEMP TABLE s (x)"), TEMPORARY),
    Left("temp table that hides one", runs("CREATE TEMP TABLE t (y)"), answer("SELECT * FROM t")),
    Left("temp view", runs("CREATE TEMP VIEW v AS SELECT 1"), TEMPORARY),
    Left("temp trigger", runs("CREATE TEMP TRIGGER g AFTER INSERT ON main.t BEGIN SELECT 1; END"), TEMPORARY),
    Left("attached database", runs("ATTACH ':memory:' AS other"), DATABASES),
    Left("function", lambda c: c.create_function("f", 0, lambda: 7), answer("SELECT f()")),
    Left("overridden function", lambda c: c.create_function("upper", 1, lambda x: "!"), answer("SELECT upper('a')")),
    Left("aggregate", lambda c: c.create_aggregate("s", 1, Sum), answer("SELECT s(x) FROM t")),
    Left("window function", lambda c: c.create_window_function("w", 1, Sum), answer("SELECT w(1) OVER ()")),
    Left("collation", lambda c: c.create_collation("k", lambda a, b: 1), answer("SELECT 'a' < 'b' COLLATE k")),
    Left("authorizer", lambda c: c.set_authorizer(lambda *_: sqlite3.SQLITE_DENY), answer("SELECT x FROM t")),
    Left("progress handler", lambda c: c.set_progress_handler(lambda: 1, 1), answer(COUNTED)),
    Left("trace callback", lambda c: c.set_trace_callback(SEEN.append), traces),
    Left(
        "limit",
        lambda c: c.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 3),
        lambda c: c.getlimit(sqlite3.SQLITE_LIMIT_COLUMN),
    ),
]
if hasattr(sqlite3.Connection, "deserialize"):
    with contextlib.closing(sqlite3.connect(":memory:")) as elsewhere:
        elsewhere.execute("CREATE TABLE t (x)")
        image = elsewhere.serialize()
    ROWS_OF_FACTS.append(Left("deserialize", lambda c: c.deserialize(image), answer("SELECT x FROM t WHERE x < 4")))
if sys.version_info >= (3, 12):
    trigger = sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER
    ROWS_OF_FACTS += [
        Left("autocommit True", lambda c: setattr(c, "autocommit", True), attribute("autocommit")),
        Left("autocommit False", lambda c: setattr(c, "autocommit", False), attribute("autocommit")),
        Left("db config", lambda c: c.setconfig(trigger, False), lambda c: c.getconfig(trigger)),
    ]

WRAPS: list[Any] = [None, Wrapper]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "app.db"
    with ConnectionPool(path) as pool, pool.connection() as conn:
        conn.execute("CREATE TABLE t (x)")
        conn.execute("INSERT INTO t VALUES (1), (2), (3)")
    yield path
    assert open_files(tmp_path) == []


def leave(pool: ConnectionPool[Any], way: str, do: Callable[[Any], object]) -> None:
    """Borrow a connection in this way and leave something behind on it."""
    if way == "with":
        with pool.connection() as item:
            do(unwrap(item))
    elif way == "raise":
        with contextlib.suppress(LookupError), pool.connection() as item:
            do(unwrap(item))
            raise LookupError
    elif way == "in a transaction":
        with pool.connection() as item:
            do(unwrap(item))
            with contextlib.suppress(sqlite3.Error):
                unwrap(item).execute("INSERT INTO t VALUES (4)")
    else:
        item = pool.acquire()
        do(unwrap(item))
        with contextlib.suppress(RuntimeWarning):  # says that a transaction was rolled back
            pool.release(item)


@pytest.mark.parametrize("wrap", WRAPS, ids=["raw", "wrapped"])
@pytest.mark.parametrize("way", ["with", "raise", "in a transaction", "release"])
@pytest.mark.parametrize("left", ROWS_OF_FACTS, ids=str)
def test_what_one_borrower_leaves_never_reaches_the_next(path: Path, left: Left, way: str, wrap: Any) -> None:
    with ConnectionPool(path, wrap=wrap, max_size=1, pragmas={"synchronous": "NORMAL"}) as pool:
        with pool.connection() as item:
            before = left.seen(unwrap(item))
        for _ in range(3):  # again: by now a statement cache or a trusting pool might have let it pass
            leave(pool, way, left.do)
            with pool.connection(timeout=0) as item:
                assert left.seen(unwrap(item)) == before
                assert not unwrap(item).in_transaction
        assert pool.stats().in_use == 0
        assert pool.stats().size == 1


@pytest.mark.parametrize("left", ROWS_OF_FACTS, ids=str)
def test_the_trace_of_each_kind_is_seen_by_who_looks(path: Path, left: Left) -> None:
    """The table proves nothing unless the one who did it sees it."""
    with ConnectionPool(path, max_size=1) as pool, pool.connection() as conn:
        before = left.seen(conn)
        left.do(conn)
        assert left.seen(conn) != before
        pool.discard(conn)


@pytest.mark.parametrize("wrap", WRAPS, ids=["raw", "wrapped"])
def test_a_stale_cursor_raises_and_does_not_see_the_next_borrowers_rows(path: Path, wrap: Any) -> None:
    with ConnectionPool(path, wrap=wrap, max_size=1) as pool:
        with pool.connection() as item:
            conn = unwrap(item)
            cursors = [conn.execute("SELECT x FROM t"), conn.cursor(), sqlite3.Cursor(conn)]
            assert cursors[0].fetchone() is not None
            blob = None
            conn.execute("CREATE TABLE b (x)")
            conn.execute("INSERT INTO b VALUES (zeroblob(10))")
            blob = conn.blobopen("b", "x", 1)
        for cursor in cursors:
            with pytest.raises(sqlite3.ProgrammingError):
                cursor.fetchone()
            with pytest.raises(sqlite3.ProgrammingError):
                cursor.execute("SELECT 1")
        with pytest.raises(sqlite3.ProgrammingError):
            blob.read()
        with pool.connection() as item:  # and holds no snapshot: nobody's checkpoint is blocked
            with pytest.raises(sqlite3.ProgrammingError):
                cursors[0].fetchone()
            unwrap(item).execute("INSERT INTO t VALUES (4)")
        with pool.connection() as item:
            assert answer("PRAGMA wal_checkpoint(TRUNCATE)")(unwrap(item)) == [(0, 0, 0)]
        assert pool.stats().opened == 1


def test_a_statement_of_a_borrower_does_not_work_in_the_name_of_the_next(path: Path) -> None:
    """The generator of one request is still there while the next request writes."""
    with ConnectionPool(path, max_size=1) as pool:

        def generate() -> Iterator[int]:
            with pool.connection() as conn:
                results = conn.execute("SELECT x FROM t")
            for (x,) in results:
                yield x

        with pytest.raises(sqlite3.ProgrammingError):
            next(generate())


def test_a_connection_kept_after_its_return_cannot_spoil_it_for_long(path: Path) -> None:
    """Nobody can keep a borrower from using a connection it gave back; the pool sees to it at the next return."""
    with ConnectionPool(path, max_size=1) as pool:
        with pool.connection() as kept:
            pass
        kept.row_factory = sqlite3.Row
        with pool.connection():
            pass
        with pool.connection() as conn:
            assert conn.row_factory is None


def test_clean_loans_do_not_cost_the_connection(path: Path) -> None:
    with ConnectionPool(path, max_size=1) as pool:
        for number in range(50):
            with pool.connection() as conn:
                conn.execute("INSERT INTO t VALUES (?)", (number,))
                rows(conn, "SELECT * FROM t")
                conn.row_factory = sqlite3.Row
            with pool.transaction("deferred") as conn:
                assert conn.row_factory is None
                rows(conn, "PRAGMA table_info(t)")
        assert pool.stats().opened == 1
