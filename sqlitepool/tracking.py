"""A sqlite3 connection that knows what its borrower may have changed.

`Connection` is a real `sqlite3.Connection`. Whatever can change its state adds a word to `touched`, and where the old
value can be read it is kept in `before`, so that `sqlitepool.cleaning` can put it back. Queries pay next to nothing:

1. Attributes (`row_factory`, ...) pass through `__setattr__`.
2. Rarely called methods (`create_function`, `set_authorizer`, ...) are overridden.
3. SQL is looked at once per text. CPython keeps prepared statements in `lru_cache(connection)`: on a miss it *calls the
   connection* with the SQL, and `__call__` here reads it. A statement found in that cache was harmless: the cache is
   emptied after anything else.
4. `executescript` passes that cache by, so it is overridden, on cursors too.
5. Open cursors and blobs need no record: CPython keeps lists of them, which `gc.get_referents` shows.

What cannot be seen: `executescript` on a cursor made by hand (`sqlite3.Cursor(conn)`; `conn.cursor()` is fine), and
calls such as `sqlite3.Connection.set_authorizer(conn, ...)` that go round the methods of the object.

What SQLite offers no way to reset from Python: `last_insert_rowid()`, `changes()` and `total_changes` go on from the
borrower before. Ask `cursor.lastrowid` and `cursor.rowcount`, which belong to one statement. The rows of a temporary
table that `setup` made are as shared as those of any other table.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import sqlite3
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

# White space and comments, as SQLite's tokenizer skips them. Possessive (*+): a hostile text costs linear time.
_GAP = r"(?:[ \t\n\f\r]|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*+"
_FLAGS = re.ASCII | re.DOTALL | re.IGNORECASE

# Statements that change rows or the transaction and nothing else.
_harmless = re.compile(
    rf"{_GAP}(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH|VALUES|BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE)\b", _FLAGS
).match
_is_pragma = re.compile(rf"{_GAP}PRAGMA\b", _FLAGS).match

# Each word PRAGMA in a text: its schema, its name, what follows. A look-ahead: none may hide in another's match.
_NAME = r"[\"'`\[]?(\w+)[\"'`\]]?"
_find_pragmas = re.compile(rf"\bPRAGMA\b(?={_GAP}(?:{_NAME}{_GAP}\.{_GAP})?{_NAME}{_GAP}([=(])?|)", _FLAGS).findall


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These read, or change the file as an UPDATE would: nothing of the connection changes, with an argument or without.
_HARMLESS_PRAGMAS = _names("""
    application_id collation_list compile_options data_version database_list foreign_key_check foreign_key_list
    freelist_count function_list incremental_vacuum index_info index_list index_xinfo integrity_check module_list
    optimize page_count pragma_list quick_check shrink_memory table_info table_list table_xinfo user_version
    wal_checkpoint
""")

#: PRAGMAs whose answer can be set again (a test sets each of them, reads it back and sets it again).
RESTORABLE_PRAGMAS = _names("""
    analysis_limit automatic_index busy_timeout cache_size cell_size_check checkpoint_fullfsync
    defer_foreign_keys foreign_keys fullfsync ignore_check_constraints journal_size_limit legacy_alter_table
    max_page_count mmap_size query_only read_uncommitted recursive_triggers reverse_unordered_selects secure_delete
    synchronous threads trusted_schema wal_autocheckpoint
""")

# Harmless to read; setting them changes the file, the process, or something that cannot be set back.
_READABLE_PRAGMAS = RESTORABLE_PRAGMAS | _names("""
    auto_vacuum cache_spill default_cache_size encoding hard_heap_limit journal_mode locking_mode page_size
    schema_version soft_heap_limit temp_store writable_schema
""")

#: The attributes of a connection that a borrower may set.
ATTRIBUTES = frozenset(("autocommit", "isolation_level", "row_factory", "text_factory"))

#: In `Connection.touched`: in the block of a `transaction()`, where sqlite3 shall neither end nor begin a transaction.
WHOLE = "whole transaction"
#: In `Connection.touched`: closed with a transaction open, so that what it had not committed is lost.
CUT_SHORT = "closed in a transaction"

_new_cursor = sqlite3.Connection.cursor
_object_setattr = object.__setattr__


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a new connection had when `setup` was done. Single values are noted only when they change, in `before`."""

    databases: frozenset[tuple[str, str]]
    temporary: frozenset[tuple[str, str, str]]
    handlers: frozenset[str]
    #: True under `autocommit=False` (3.12+): a transaction is open at all times, at rest too.
    rests_in_transaction: bool


NO_BASELINE = Baseline(frozenset(), frozenset(), frozenset(), False)


class Cursor(sqlite3.Cursor):
    """A cursor whose `executescript` is seen. `conn.cursor(YourCursor)` gives a subclass of both."""

    __slots__ = ()

    def executescript(self, sql_script: str, /) -> sqlite3.Cursor:
        """Run the statements of `sql_script`, as `sqlite3.Cursor.executescript` does.

        It commits first. In a `transaction()` block it does not: there the statements are run inside the transaction.
        """
        connection = self.connection
        if isinstance(connection, Connection):
            connection._run_script(self, sql_script)
            return self
        return super().executescript(sql_script)


def split_script(script: str) -> Iterable[str]:
    """Yield the statements of an SQL script one by one, the way the SQLite shell tells where one ends."""
    statement = ""
    for part in script.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    statement = statement[:-1]
    if statement.strip():
        yield statement


@functools.lru_cache(maxsize=64)
def _seen_cursor_class(factory: type[sqlite3.Cursor]) -> type[sqlite3.Cursor]:
    if factory is sqlite3.Cursor:
        return Cursor
    if issubclass(factory, Cursor):
        return factory
    return type(factory.__name__, (Cursor, factory), {"__module__": factory.__module__})


class Connection(sqlite3.Connection):
    """A `sqlite3.Connection` that can be proved clean. Made by `sqlitepool.connection.open_connection`.

    A subclass must declare `__slots__ = ()`: an attribute would pass from one borrower to the next.
    """

    __slots__ = ("__weakref__", "baseline", "before", "blobs", "cursors", "loan", "touched")

    baseline: Baseline
    #: kind -> the value before the first change. A kind that is not in here is not set back by value.
    before: dict[str, Any]
    #: CPython's own lists of weak references to the open handles, as `cleaning` found them last; None before.
    blobs: list[Any] | None
    cursors: list[Any] | None
    #: Empty while the connection rests in a pool, see `Slot.loan`; None for one that is of no pool.
    loan: list[float] | None
    #: The kinds of state that may have changed since the connection was last clean.
    touched: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        finally:  # afterwards: to initialise a connection again clears all its attributes
            _object_setattr(self, "baseline", NO_BASELINE)
            _object_setattr(self, "before", {})
            _object_setattr(self, "blobs", None)
        _object_setattr(self, "cursors", None)
        _object_setattr(self, "loan", None)
        _object_setattr(self, "touched", {"init"})

    def __repr__(self) -> str:
        if self.baseline is NO_BASELINE:
            return f"<{type(self).__name__}, not set up>"
        file = dict(self.baseline.databases)["main"]
        return f"<{type(self).__name__} to {file or ':memory:'!r}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ATTRIBUTES:
            self.before.setdefault(name, getattr(self, name))
            self.touched.add(name)
        _object_setattr(self, name, value)

    def __call__(self, sql: str, /) -> Any:
        """Prepare `sql`. CPython's statement cache calls this for each text that it does not hold."""
        if _harmless(sql) is None:
            if _is_pragma(sql) is None:
                self.touched.add("schema")
            self._note_pragmas(sql)
        return super().__call__(sql)

    # `sqlite3.Connection.execute` makes a plain cursor, whose executescript would not be seen.
    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Run one statement on a new cursor, and return the cursor."""
        return _new_cursor(self, Cursor).execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        """Run one statement for each of `parameters` on a new cursor, and return the cursor."""
        return _new_cursor(self, Cursor).executemany(sql, parameters)

    def executescript(self, sql_script: str, /) -> sqlite3.Cursor:
        """Run the statements of `sql_script` on a new cursor, and return the cursor."""
        return _new_cursor(self, Cursor).executescript(sql_script)

    def cursor(self, factory: Any = Cursor) -> Any:
        """Return a new cursor. From a cursor class of yours: an instance of a subclass that sees `executescript`."""
        if factory is Cursor:
            return _new_cursor(self, Cursor)
        if isinstance(factory, type) and issubclass(factory, sqlite3.Cursor):
            return _new_cursor(self, _seen_cursor_class(factory))
        cursor: sqlite3.Cursor = _new_cursor(self, factory)
        if not isinstance(cursor, Cursor):
            self.touched.add("unseen cursor")
        return cursor

    def close(self) -> None:
        """Close the connection. Nothing happens if it was returned to its pool before: it is somebody else's then.

        While the next borrower has it, nobody can tell a stale `close` from that borrower's own. What is not committed
        is lost, as ever; the end of the block says so.
        """
        self.touched.add("closed")
        if self.loan is None or self.loan:
            try:
                if self.in_transaction:  # as it always is under autocommit=False, where an empty one cannot be told
                    self.touched.add(CUT_SHORT)
            except sqlite3.ProgrammingError:  # it is closed
                pass
            super().close()

    def commit(self) -> None:
        """Commit the transaction, as `sqlite3.Connection.commit` does."""
        super().commit()
        self.end_whole()

    def rollback(self) -> None:
        """Roll the transaction back, as `sqlite3.Connection.rollback` does."""
        super().rollback()
        self.end_whole()

    def __exit__(self, *error: Any) -> Literal[False]:
        super().__exit__(*error)
        self.end_whole()
        return False

    def end_whole(self) -> None:
        """Have sqlite3 begin transactions again, when that of a `transaction()` block is to end or has ended."""
        if WHOLE in self.touched:
            self.touched.discard(WHOLE)
            level = self.before.get("isolation_level")
            if level is not None:  # to set it to None would commit
                _object_setattr(self, "isolation_level", level)

    def setlimit(self, category: int, limit: int, /) -> int:
        """Set a limit of SQLite, as `sqlite3.Connection.setlimit` does, and return the one before."""
        prior = super().setlimit(category, limit)
        self.touched.add(f"limit:{category}")
        self.before.setdefault(f"limit:{category}", prior)
        return prior

    def mark_clean(self, baseline: Baseline) -> None:
        """Say that the connection is now as `baseline` describes it."""
        _object_setattr(self, "baseline", baseline)
        self.touched.clear()
        self.before.clear()
        if LAYOUT is None:
            self.touched.add("unseen cursors")
        if (
            baseline.rests_in_transaction
        ):  # setting it again, on each return, begins the next transaction if none is open
            self.touched.add("autocommit")
            self.before["autocommit"] = False

    def lend_by(self, loan: list[float]) -> None:
        """Have `close` ask `loan`, which is empty while the connection rests in a pool: see `Slot.loan`."""
        _object_setattr(self, "loan", loan)

    def read(self, sql: str) -> list[Any]:
        """The rows of `sql` as plain tuples and text, whatever factories the borrower has set."""
        text_factory = self.text_factory
        _object_setattr(self, "text_factory", str)
        try:
            return sqlite3.Cursor(self).execute(sql).fetchall()
        finally:
            _object_setattr(self, "text_factory", text_factory)

    def read_pragma(self, name: str) -> Any:
        """The value of a PRAGMA; None if it has none here, as `mmap_size` in memory."""
        rows = self.read(f"PRAGMA {name}")
        return rows[0][0] if rows else None

    def _run_script(self, cursor: sqlite3.Cursor, script: str) -> None:
        self._note_script(script)
        if WHOLE in self.touched and self.in_transaction and isinstance(script, str):
            for statement in split_script(script):
                cursor.execute(statement)
        else:
            sqlite3.Cursor.executescript(cursor, script)

    def _note_script(self, script: str) -> None:
        self.touched.add("schema")
        if isinstance(script, str):  # anything else is refused by sqlite3
            self._note_pragmas(script)

    def _note_pragmas(self, sql: str) -> None:
        for schema, name, argument in _find_pragmas(sql):
            name = name.lower()
            if name in _HARMLESS_PRAGMAS or (not argument and name in _READABLE_PRAGMAS):
                continue
            schema = schema.lower() or "main"
            kind = f"pragma:{schema}.{name}"
            if kind in self.touched:
                continue
            self.touched.add(kind)
            # With other databases attached from the start, which of them a PRAGMA changed is anybody's guess. While
            # there is no baseline, the connection is being opened: what is done now is what borrowers find.
            if name in RESTORABLE_PRAGMAS and schema == "main" and len(self.baseline.databases) == 1:
                with contextlib.suppress(sqlite3.Error):
                    value = self.read_pragma(name)
                    if value is not None:
                        self.before[kind] = value


# Methods that change something, and the kind of state they change. `cleaning` knows the kinds that can be undone.
_MARKED = {
    "create_aggregate": "function",
    "create_collation": "function",
    "create_function": "function",
    "create_window_function": "function",
    "deserialize": "deserialized",
    "enable_load_extension": "extension",
    "load_extension": "extension",
    "set_authorizer": "set_authorizer",
    "set_progress_handler": "set_progress_handler",
    "set_trace_callback": "set_trace_callback",
    "setconfig": "config",
}


def _marked(method: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Connection, /, *args: Any, **kwargs: Any) -> Any:
        self.touched.add(kind)
        return method(self, *args, **kwargs)

    return call


for _name, _kind in _MARKED.items():
    if hasattr(sqlite3.Connection, _name):  # some depend on how Python and SQLite were built
        setattr(Connection, _name, _marked(getattr(sqlite3.Connection, _name), _kind))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where `gc.get_referents(connection)` has its statement cache, and the lists of weak references to its handles."""

    statements: int
    cursors: int
    blobs: int


def _find_layout() -> Layout | None:
    """Try out, once, that this Python shows what tracking builds on. None: it does not."""

    def position(test: Callable[[Any], bool]) -> int:
        (found,) = (i for i, referent in enumerate(gc.get_referents(conn)) if test(referent))
        return found

    def holds(thing: object) -> Callable[[Any], bool]:
        return lambda x: isinstance(x, list) and any(isinstance(ref, weakref.ref) and ref() is thing for ref in x)

    conn = sqlite3.connect(":memory:", factory=Connection)
    try:
        conn.execute("CREATE TABLE t (b)")
        conn.execute("INSERT INTO t VALUES (zeroblob(1))")
        with conn.blobopen("t", "b", 1) as blob:
            cursor = sqlite3.Cursor(conn)
            statements = position(lambda referent: hasattr(referent, "cache_clear"))
            layout = Layout(statements, position(holds(cursor)), position(holds(blob)))
        for _ in range(2):  # a new text calls the connection; emptying the cache makes it new again
            conn.touched.clear()
            conn.execute("PRAGMA foreign_keys = 0")
            if "pragma:main.foreign_keys" not in conn.touched:
                return None
            gc.get_referents(conn)[layout.statements].cache_clear()
        return layout
    except (ValueError, sqlite3.Error):
        return None
    finally:
        sqlite3.Connection.close(conn)


LAYOUT = _find_layout()
if LAYOUT is None:
    warnings.warn(
        "this Python does not show the cursors of a sqlite3 connection: sqlitepool closes connections after each use",
        RuntimeWarning,
        stacklevel=2,
    )
