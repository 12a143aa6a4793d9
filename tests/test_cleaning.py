"""What a borrower does never reaches the next one: each row of the table is undone, or the connection is retired."""

import functools
import gc
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pool_support import Open

from sqlitepool.cleaning import clean
from sqlitepool.tracking import RESTORABLE_PRAGMAS


def read(conn: sqlite3.Connection, sql: str) -> Any:
    """Rows as plain tuples and text, in a way that leaves no trace."""
    row_factory, text_factory = conn.row_factory, conn.text_factory
    object.__setattr__(conn, "row_factory", None)
    object.__setattr__(conn, "text_factory", str)
    try:
        cursor = sqlite3.Cursor(conn)
        rows = cursor.execute(sql).fetchall()
        cursor.close()
        return rows
    except sqlite3.Error as error:
        return str(error)
    finally:
        object.__setattr__(conn, "row_factory", row_factory)
        object.__setattr__(conn, "text_factory", text_factory)


def query(sql: str) -> Callable[[sqlite3.Connection], Any]:
    return functools.partial(read, sql=sql)


TEMPORARY = query("SELECT type, name FROM temp.sqlite_master ORDER BY 1, 2")
DATABASES = query("SELECT name FROM pragma_database_list WHERE name <> 'temp' ORDER BY 1")


def pragma(name: str) -> Callable[[sqlite3.Connection], Any]:
    return query(f"PRAGMA {name}")


@dataclass(frozen=True)
class Statement:
    """SQL of a borrower, how its trace is seen, and whether the connection must survive it (None: either is right)."""

    sql: str
    seen: Callable[[sqlite3.Connection], Any]
    reused: bool | None = True
    noticed: bool = True

    def __str__(self) -> str:
        return self.sql[:40].replace("\n", " ")


STATEMENTS = [
    # transactions
    Statement("BEGIN IMMEDIATE", lambda conn: conn.in_transaction),
    Statement("SAVEPOINT s", lambda conn: conn.in_transaction),
    Statement("/* a */ -- b\n BEGIN", lambda conn: conn.in_transaction),
    # PRAGMAs that are set back, in each spelling
    Statement("PRAGMA foreign_keys = 0", pragma("foreign_keys")),
    Statement("pragma foreign_keys(off)", pragma("foreign_keys")),
    Statement(" /* a */ PRAGMA/**/main.[foreign_keys]--\n= OFF", pragma("foreign_keys")),
    Statement("/* pragma user_version */PRAGMA foreign_keys = 0", pragma("foreign_keys")),
    Statement("-- pragma\nPRAGMA foreign_keys = 0", pragma("foreign_keys"), reused=None),
    Statement("PRAGMA \"main\" . 'synchronous' = EXTRA", pragma("synchronous")),
    Statement("PRAGMA main.cache_size = 77", pragma("cache_size")),
    Statement("PRAGMA temp.cache_size = 77", pragma("temp.cache_size"), reused=False),
    Statement("PRAGMA query_only = 1", pragma("query_only")),
    Statement("PRAGMA recursive_triggers = 1", pragma("recursive_triggers")),
    Statement("PRAGMA busy_timeout = 123", pragma("busy_timeout")),
    # PRAGMAs that are not
    Statement("PRAGMA case_sensitive_like = 1", query("SELECT 'a' LIKE 'A'"), reused=False),
    Statement("PRAGMA locking_mode = exclusive", pragma("locking_mode"), reused=False),
    Statement("PRAGMA temp_store = memory", pragma("temp_store"), reused=False),
    # An old name: it changes the names of columns.
    Statement("PRAGMA full_column_names = 1", pragma("full_column_names"), reused=False),
    # Some PRAGMAs act when they are prepared: EXPLAIN does not stop them.
    Statement("EXPLAIN PRAGMA foreign_keys = 0", pragma("foreign_keys"), reused=None, noticed=False),
    # the schema of the connection
    Statement("CREATE TEMP TABLE x (y)", TEMPORARY),
    Statement("CREATE TABLE temp.'a \"b' (y PRIMARY KEY)", TEMPORARY),
    Statement("CREATE TEMP VIEW v AS SELECT * FROM t", TEMPORARY),
    Statement("CREATE TEMP TRIGGER g AFTER INSERT ON main.t BEGIN SELECT 1; END", TEMPORARY),
    Statement("CREATE TEMP TABLE x (y INTEGER PRIMARY KEY AUTOINCREMENT)", TEMPORARY, reused=None),
    Statement("ATTACH ':memory:' AS other", DATABASES),
    Statement("ATTACH ':memory:' AS 'o \"\"o'", DATABASES),
    # Nothing of the connection changes.
    Statement("CREATE TABLE IF NOT EXISTS u (x)", query("SELECT 1"), noticed=False),
    Statement("PRAGMA table_info(t)", query("SELECT 1"), noticed=False),
    Statement("PRAGMA journal_mode", pragma("journal_mode"), noticed=False),
    Statement("ANALYZE", query("SELECT 1"), noticed=False),
]


class OwnCursor(sqlite3.Cursor):
    pass


WAYS: dict[str, Callable[[sqlite3.Connection, str], object]] = {
    "conn.execute": lambda conn, sql: conn.execute(sql),
    "cursor.execute": lambda conn, sql: conn.cursor().execute(sql),
    "plain cursor": lambda conn, sql: sqlite3.Cursor(conn).execute(sql),
    "own cursor class": lambda conn, sql: conn.cursor(OwnCursor).execute(sql),
    "conn.executescript": lambda conn, sql: conn.executescript("SELECT 'pragma'; -- pragma\n" + sql),
    "cursor.executescript": lambda conn, sql: conn.cursor().executescript(sql),
    "execute().executescript": lambda conn, sql: conn.execute("SELECT 1").executescript(sql),
    "own cursor class script": lambda conn, sql: conn.cursor(OwnCursor).executescript(sql),
    "cursor(factory) script": lambda conn, sql: conn.cursor(factory=lambda c: OwnCursor(c)).executescript(sql),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("statement", STATEMENTS, ids=str)
def test_no_statement_reaches_the_next_borrower(opened: Open, statement: Statement, way: str) -> None:
    conn = opened()
    before = statement.seen(conn)
    for _ in range(3):  # the second borrower runs the same text: from the statement cache, if it is still there
        WAYS[way](conn, statement.sql)
        if not clean(conn):
            # A script with the word in a text or a comment, or a cursor nobody can see through: the cautious answer.
            assert not statement.reused or "script" in way
            return
        assert statement.reused is not False
        assert statement.seen(conn) == before
        assert not conn.touched


@pytest.mark.parametrize("way", ["conn.execute", "cursor.executescript", "own cursor class script"])
def test_scripts_and_own_cursors_do_not_cost_the_connection(opened: Open, way: str) -> None:
    conn = opened()
    WAYS[way](conn, "PRAGMA foreign_keys = 0")
    assert clean(conn)


@pytest.mark.parametrize("statement", [s for s in STATEMENTS if s.noticed], ids=str)
def test_the_table_would_notice(opened: Open, statement: Statement) -> None:
    """A row proves something only if its trace can be seen."""
    conn = opened()
    before = statement.seen(conn)
    conn.execute(statement.sql).fetchall()
    assert statement.seen(conn) != before


@pytest.mark.parametrize("name", sorted(RESTORABLE_PRAGMAS))
def test_each_restorable_pragma_is_set_back(opened: Open, name: str) -> None:
    conn = opened()
    before = pragma(name)(conn)[0][0]
    conn.execute(f"PRAGMA {name} = {before - 1 if before > 0 else before + 1}").fetchall()
    assert pragma(name)(conn) != [(before,)]
    assert clean(conn)
    assert pragma(name)(conn) == [(before,)]


def test_a_pragma_changed_within_a_transaction_is_set_back(opened: Open) -> None:
    conn = opened()
    conn.execute("PRAGMA foreign_keys = 0")
    conn.execute("BEGIN")
    assert clean(conn)
    assert pragma("foreign_keys")(conn) == [(1,)]


class Sum:
    def step(self, value: int) -> None: ...
    def finalize(self) -> int:
        return 7


def no(*_: object) -> int:
    return sqlite3.SQLITE_DENY


@dataclass(frozen=True)
class Call:
    """What a borrower does with the methods and attributes of the connection."""

    name: str
    do: Callable[[Any], object]
    seen: Callable[[Any], Any]
    reused: bool

    def __str__(self) -> str:
        return self.name


def assign(name: str, value: object) -> Call:
    return Call(name, lambda conn: setattr(conn, name, value), lambda conn: getattr(conn, name), True)


def traced(conn: sqlite3.Connection) -> bool:
    TRACE.clear()
    read(conn, "SELECT 42")
    return bool(TRACE)


TRACE: list[str] = []

CALLS = [
    assign("row_factory", sqlite3.Row),
    assign("text_factory", bytes),
    assign("isolation_level", None),
    assign("isolation_level", "EXCLUSIVE"),
    Call("set_authorizer", lambda c: c.set_authorizer(no), query("SELECT count(*) FROM t"), True),
    Call("set_trace_callback", lambda c: c.set_trace_callback(TRACE.append), traced, True),
    Call(
        "set_progress_handler",
        lambda c: c.set_progress_handler(lambda: 1, 1),
        query("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99) SELECT max(i) FROM n"),
        True,
    ),
    Call("setlimit", lambda c: c.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 3), lambda c: c.getlimit(2), True),
    Call("create_function", lambda c: c.create_function("f", 0, lambda: 7), query("SELECT f()"), False),
    Call("override", lambda c: c.create_function("upper", 1, lambda x: "!"), query("SELECT upper('a')"), False),
    Call("create_aggregate", lambda c: c.create_aggregate("s", 1, Sum), query("SELECT s(id) FROM t"), False),
    Call(
        "create_collation",
        lambda c: c.create_collation("back", lambda a, b: 1),
        query("SELECT 'a' < 'b' COLLATE back"),
        False,
    ),
    Call("create_window_function", lambda c: c.create_window_function("w", 1, Sum), query("SELECT w(1)"), False),
    Call("close", lambda c: c.close(), query("SELECT 1"), False),
    Call("__init__", lambda c: c.__init__(":memory:"), query("SELECT count(*) FROM t"), False),
    Call("deserialize", lambda c: c.deserialize(c.serialize()), lambda c: None, False),
    Call("opaque cursor", lambda c: c.cursor(lambda conn: OwnCursor(conn)), lambda c: None, False),
]
if hasattr(sqlite3.Connection, "enable_load_extension"):
    CALLS.append(Call("extension", lambda c: c.enable_load_extension(True), lambda c: None, False))
if sys.version_info >= (3, 12):
    CALLS += [
        assign("autocommit", True),
        assign("autocommit", False),
        Call(
            "setconfig",
            lambda c: c.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False),
            lambda c: c.getconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER),
            False,
        ),
    ]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_call_reaches_the_next_borrower(opened: Open, call: Call) -> None:
    conn = opened()
    before = call.seen(conn)
    for _ in range(2):
        call.do(conn)
        if before is not None:
            assert call.seen(conn) != before, "the table would not notice"
        assert clean(conn) is call.reused
        if not call.reused:
            return
        assert call.seen(conn) == before
        assert not conn.touched


@pytest.mark.parametrize("call", [c for c in CALLS if c.name.startswith("set_")], ids=str)
def test_a_handler_of_setup_is_part_of_every_loan(opened: Open, call: Call) -> None:
    """It cannot be read, so that a borrower's own in its place costs the connection."""
    conn = opened(setup=lambda c: c.set_trace_callback(TRACE.append))
    assert clean(conn)
    assert traced(conn)
    call.do(conn)
    assert clean(conn) is (call.name != "set_trace_callback")


def test_statements_prepared_under_an_authorizer_are_forgotten(opened: Open) -> None:
    conn = opened()
    conn.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_IGNORE if action == sqlite3.SQLITE_READ else sqlite3.SQLITE_OK
    )
    assert conn.execute("SELECT id FROM t").fetchone() == (None,)
    assert clean(conn)
    assert conn.execute("SELECT id FROM t").fetchone() == (1,)


@pytest.mark.parametrize(
    "make",
    [lambda c: c.cursor(), lambda c: sqlite3.Cursor(c), lambda c: c.cursor(OwnCursor), lambda c: c.execute("SELECT 1")],
    ids=["cursor", "by hand", "own class", "execute"],
)
def test_a_stale_cursor_raises_and_pins_nothing(opened: Open, make: Callable[[Any], sqlite3.Cursor]) -> None:
    conn, other = opened(), opened()
    cursor = make(conn)
    cursor.execute("SELECT id FROM t")
    assert cursor.fetchone() == (1,)
    assert clean(conn)
    with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
        cursor.fetchone()
    with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
        cursor.execute("SELECT 1")
    other.execute("DELETE FROM t")
    other.commit()
    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def test_a_cursor_in_a_reference_cycle_is_closed(opened: Open) -> None:
    conn = opened()
    gc.disable()
    try:
        cursor = conn.cursor(type("Cycle", (sqlite3.Cursor,), {}))
        cursor.itself = cursor
        cursor.execute("SELECT id FROM t").fetchone()
        del cursor
        assert clean(conn)
        other = opened()
        other.execute("DELETE FROM t")
        other.commit()
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    finally:
        gc.enable()


def test_a_stale_blob_raises(opened: Open) -> None:
    conn = opened()
    blob = conn.blobopen("t", "b", 1)
    assert clean(conn)
    with pytest.raises(sqlite3.ProgrammingError):
        blob.read()


def test_cursors_leave_no_dead_references_behind(opened: Open) -> None:
    conn = opened()
    for _ in range(1000):
        conn.execute("SELECT 1")
        assert clean(conn)
    assert not any(isinstance(r, list) and r for r in gc.get_referents(conn))


@pytest.mark.parametrize(
    "undo",
    ["DETACH extra", "DROP TABLE temp.mine", "ALTER TABLE temp.mine RENAME TO yours", "DROP VIEW temp.v"],
)
def test_what_setup_made_is_kept_or_the_connection_is_not(opened: Open, undo: str) -> None:
    def setup(conn: sqlite3.Connection) -> None:
        conn.execute("ATTACH ':memory:' AS extra")
        conn.execute("CREATE TEMP TABLE mine (x)")
        conn.execute("CREATE TEMP VIEW v AS SELECT 1")

    conn = opened(setup=setup)
    conn.execute("CREATE TEMP TABLE x (y)")
    conn.execute("ATTACH ':memory:' AS other")
    assert clean(conn)
    assert DATABASES(conn) == [("extra",), ("main",)]
    assert TEMPORARY(conn) == [("table", "mine"), ("view", "v")]
    conn.execute(undo)
    assert not clean(conn)


def test_a_pragma_beside_attached_databases_of_setup_retires(opened: Open) -> None:
    """`PRAGMA secure_delete = 0` reaches all databases, and reading it tells of one."""
    conn = opened(setup=lambda c: c.execute("ATTACH ':memory:' AS extra"))
    conn.execute("PRAGMA secure_delete = 0")
    assert not clean(conn)


def test_row_factory_reaches_the_cursors_of_execute(opened: Open) -> None:
    conn = opened()
    conn.row_factory = sqlite3.Row
    assert type(conn.execute("SELECT 1").fetchone()) is sqlite3.Row
    assert type(conn.cursor().execute("SELECT 1").fetchone()) is sqlite3.Row


def test_an_own_cursor_class_stays_what_it_was(opened: Open) -> None:
    assert isinstance(opened().cursor(OwnCursor), OwnCursor)


def test_a_value_changed_twice_goes_back_to_the_first(opened: Open) -> None:
    conn = opened()
    conn.isolation_level = None
    conn.isolation_level = "DEFERRED"
    conn.execute("PRAGMA cache_size = 5")
    conn.execute("PRAGMA cache_size = 6")
    conn.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 5)
    conn.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 6)
    assert clean(conn)
    assert conn.isolation_level == "IMMEDIATE"
    assert pragma("cache_size")(conn) == [(-2000,)]
    assert conn.getlimit(sqlite3.SQLITE_LIMIT_COLUMN) == 2000


def test_an_error_that_is_not_sqlites_passes_through(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    conn = opened()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sqlitepool.cleaning._execute", interrupted)
    conn.execute("BEGIN")
    with pytest.raises(KeyboardInterrupt):
        clean(conn)
