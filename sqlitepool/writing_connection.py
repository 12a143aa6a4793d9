"""The connection that `Database` writes with: its transaction belongs to the block that has it.

Whoever commits or rolls back inside of `with db.write()` or of a function for `run_write` would commit half of the
block, or the work of others who are in the same group commit. So SQL that begins or ends a transaction is refused here,
with the advice what to do instead, and so are `close()`, the attributes that commit when they are set, and every
statement after SQLite itself has rolled the transaction back: it would be committed on its own. `executescript`, which
commits first, runs its statements inside the transaction.

Who goes round the methods of the connection (`sqlite3.Connection.commit(conn)`, or `executescript` on a cursor made by
hand) can still end the transaction. That is seen when the block or function ends. Whether SQLite has undone it or
somebody has committed it is known from the errors that pass through here: see `ROLLED_BACK`.

The check of SQL costs nothing for a text that was seen before: see `tracking.py`, item 3. A text that was refused is
never remembered.
"""

from __future__ import annotations

import gc
import re
import sqlite3
from collections.abc import Iterable
from typing import Any, Self

from sqlitepool.tracking import LAYOUT, NO_BASELINE, Connection, Cursor, split_script

#: The statements of `transaction.py` itself. Only these texts are let through.
BEGIN = "BEGIN IMMEDIATE -- sqlitepool"
COMMIT = "COMMIT -- sqlitepool"
ROLLBACK = "ROLLBACK -- sqlitepool"
_OURS = (BEGIN, COMMIT, ROLLBACK)

#: In `touched`: an error of SQLite was seen to end the transaction, so it was rolled back.
ROLLED_BACK = "rolled back"

# Setting one of these commits, whatever the value.
_COMMITTING = ("isolation_level", "autocommit")

#: This Python lets us see each new SQL text, so nobody but us ends a transaction by SQL.
CAN_REFUSE = LAYOUT is not None

_GAP = r"(?:[ \t\n\f\r;]|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*+"
_is_ours_to_say = re.compile(
    rf"{_GAP}(?:BEGIN|COMMIT|END|ROLLBACK(?!{_GAP}(?:TRANSACTION\b{_GAP})?TO\b))\b",
    re.ASCII | re.DOTALL | re.IGNORECASE,
).match

_execute = sqlite3.Cursor.execute
_execute_many = sqlite3.Cursor.executemany
_new_cursor = sqlite3.Connection.cursor


def own_cursor(conn: Connection) -> sqlite3.Cursor:
    """Return a cursor that `cleaning` does not see, and so does not close at the end of a transaction."""
    cursor = sqlite3.Cursor(conn)
    if LAYOUT is not None:
        seen = gc.get_referents(conn)[LAYOUT.cursors]
        seen[:] = [reference for reference in seen if reference() is not cursor]
    return cursor


def lost() -> sqlite3.OperationalError:
    """Make the error for a transaction that SQLite has rolled back by itself."""
    return sqlite3.OperationalError(
        "no transaction is open: the block or function that this connection was lent to has ended, or SQLite has "
        "rolled its transaction back (OR ROLLBACK, a full disk or the like) and nothing of it was written"
    )


def ended() -> sqlite3.OperationalError:
    """Make the error for a transaction that somebody has ended, past us: it may have been committed."""
    return sqlite3.OperationalError(
        "the transaction was ended past Database, by a method of sqlite3 itself or a cursor made by hand: what was "
        "written before may be committed, or undone. Look before you repeat it"
    )


def closed() -> sqlite3.ProgrammingError:
    """Make the error for a connection that somebody has closed, past us, which rolled its transaction back."""
    return sqlite3.ProgrammingError(
        "the connection was closed inside a write of Database, which gives it back itself: nothing of it was written"
    )


def refusal(what: str) -> sqlite3.ProgrammingError:
    """Make the error for an attempt to begin or end a transaction."""
    return sqlite3.ProgrammingError(
        f"{what} inside a write of Database: the transaction is committed when the block or function ends, and "
        "rolled back when it raises. For a part that may fail use a nested `with db.write()`; for a connection that is "
        "all yours, `db.isolated()`"
    )


class WritingCursor(Cursor):
    """A cursor of the writing connection."""

    __slots__ = ()

    def execute(self, sql: str, parameters: Any = (), /) -> Self:
        """Run one statement."""
        connection = self.connection
        if not connection.in_transaction and not _is_being_set_up(connection):
            raise lost()
        try:
            _execute(self, sql, parameters)
        except sqlite3.Error:
            _note_end(connection)
            raise
        return self

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Self:
        """Run one statement for each of `parameters`."""
        connection = self.connection
        if not connection.in_transaction and not _is_being_set_up(connection):
            raise lost()
        try:
            _execute_many(self, sql, parameters)
        except sqlite3.Error:
            _note_end(connection)
            raise
        return self

    def executescript(self, sql_script: str, /) -> sqlite3.Cursor:
        """Run the statements of `sql_script`, in the transaction that is open."""
        connection = self.connection
        if connection.in_transaction:
            connection._note_script(sql_script)  # type: ignore[attr-defined]
            for statement in split_script(sql_script):
                self.execute(statement)
            return self
        if not _is_being_set_up(connection):
            raise lost()
        return super().executescript(sql_script)


def _note_end(connection: sqlite3.Connection) -> None:
    """After an error of a statement that was begun inside of the transaction: note if it is open no more."""
    if isinstance(connection, Connection) and not connection.in_transaction:
        connection.touched.add(ROLLED_BACK)


def _is_being_set_up(connection: sqlite3.Connection) -> bool:
    return isinstance(connection, Connection) and connection.baseline is NO_BASELINE


class WritingConnection(Connection):
    """A connection whose transaction is begun and ended by `Database` alone, once it is set up."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _COMMITTING and self.baseline is not NO_BASELINE:
            raise refusal(f"{name} = {value!r}")
        super().__setattr__(name, value)

    def __call__(self, sql: str, /) -> Any:
        """Prepare `sql`, unless it would begin or end a transaction."""
        if self.baseline is not NO_BASELINE and _is_ours_to_say(sql) is not None and sql not in _OURS:
            raise refusal(sql.split()[0].upper() if sql[:1].isalpha() else sql)
        return super().__call__(sql)

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Run one statement on a new cursor, and return the cursor."""
        if not self.in_transaction and self.baseline is not NO_BASELINE:
            raise lost()
        try:
            return _execute(_new_cursor(self, WritingCursor), sql, parameters)
        except sqlite3.Error:
            _note_end(self)
            raise

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        """Run one statement for each of `parameters` on a new cursor, and return the cursor."""
        if not self.in_transaction and self.baseline is not NO_BASELINE:
            raise lost()
        try:
            return _execute_many(_new_cursor(self, WritingCursor), sql, parameters)
        except sqlite3.Error:
            _note_end(self)
            raise

    def executescript(self, sql_script: str, /) -> sqlite3.Cursor:
        """Run the statements of `sql_script` in the transaction that is open, on a new cursor that is returned."""
        return _new_cursor(self, WritingCursor).executescript(sql_script)

    def cursor(self, factory: Any = WritingCursor) -> Any:
        """Return a new cursor."""
        return super().cursor(factory) if factory is not WritingCursor else _new_cursor(self, WritingCursor)

    def close(self) -> None:
        """Refused: the connection is given back when the block ends."""
        if self.baseline is not NO_BASELINE:
            raise sqlite3.ProgrammingError(
                "close() on a connection that Database has lent: it is given back when the block or function ends"
            )
        super().close()

    def commit(self) -> None:
        """Refused: the transaction is committed when the block ends."""
        if self.baseline is not NO_BASELINE and self.in_transaction:
            raise refusal("commit()")
        super().commit()

    def rollback(self) -> None:
        """Refused: the transaction is rolled back when the block raises."""
        if self.baseline is not NO_BASELINE and self.in_transaction:
            raise refusal("rollback()")
        super().rollback()

    def __enter__(self) -> Any:
        if self.baseline is not NO_BASELINE and self.in_transaction:
            raise refusal("`with conn:`")
        return super().__enter__()


def last_statement(conn: Connection) -> str | None:
    """Return the SQL that was run last on `conn`, by any thread; None if that cannot be known.

    CPython keeps prepared statements in a cache, in the order of their use, and shows them to the garbage collector.
    """
    if LAYOUT is None:
        return None
    known = gc.get_referents(gc.get_referents(conn)[LAYOUT.statements])
    return next((text for text in reversed(known) if isinstance(text, str) and text not in _OURS), None)
