"""The end of a loan: end the transaction, prove the connection clean or undo what was done, or retire it.

The rule is *clean or not at all*. `clean` undoes what can be undone exactly and says no to everything else; whoever
gets a no calls `retire`. Nearly every loan leaves `touched` empty, no transaction and no open cursor, and pays less
than half a microsecond here.
"""

from __future__ import annotations

import contextlib
import gc
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from sqlitepool.tracking import ATTRIBUTES, CUT_SHORT, LAYOUT, WHOLE, Baseline, Connection

# The kinds of state that `_undo` handles, besides those whose old value is in `Connection.before`.
_HANDLERS = frozenset(("set_authorizer", "set_progress_handler", "set_trace_callback"))
_UNDONE = _HANDLERS | {"schema", WHOLE}
_QUICKLY_UNDONE = ATTRIBUTES | {WHOLE}

# Indexes last: by then those of dropped tables are gone.
_DROP_ORDER = ("trigger", "view", "table", "index")

# How long `retire` waits, in seconds, for another thread to let go of the connection, each time after an interrupt.
_PATIENCE = (0.001, 0.01, 0.1, 0.5)

_get_referents = gc.get_referents
_close_cursor = sqlite3.Cursor.close
_close_blob = sqlite3.Blob.close
_execute = sqlite3.Connection.execute

_getrefcount = sys.getrefcount

# With these words a connection of `Database` lets them through, which refuses its borrowers to end a transaction.
_COMMIT, _ROLLBACK = "COMMIT -- sqlitepool", "ROLLBACK -- sqlitepool"


def _references_to_a_local() -> int:
    thing = object()
    return _getrefcount(thing)


# CPython begins a new list of cursors every 200 cursors. As long as it has the one that we know, there are two
# references to it besides that of a local variable: asking for their number costs a quarter of asking for the list.
_STILL_THE_LIST = _references_to_a_local() + 2


def end_block(conn: Connection, commit: bool) -> None:
    """End the transaction of a block as `with conn:` does: commit it, or roll it back.

    Cursors are closed first: a half-read `INSERT ... RETURNING` would make COMMIT fail, though its rows are written.
    When COMMIT fails (`sqlite3.OperationalError`: locked; `sqlite3.IntegrityError`: a deferred foreign key), the
    transaction is rolled back and the error raised. A connection that its borrower closed has nothing left to commit;
    if it was closed with a transaction open, that is a `sqlite3.ProgrammingError`, as it is for `with conn:`.
    """
    if is_closed(conn):
        if commit and CUT_SHORT in conn.touched:
            raise sqlite3.ProgrammingError(
                "the connection was closed with a transaction open, so what was not committed is lost: leave it to the "
                "pool to commit and to close"
            )
        return
    if not conn.in_transaction:
        return
    if not commit:
        _roll_back(conn)
        return
    try:
        close_handles(conn)
        _execute(conn, _COMMIT)
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # the first error says more; a connection that stays dirty is retired
            _roll_back(conn)
        raise


def clean(conn: Connection) -> bool:
    """Bring `conn` to the state it was opened in. False: that cannot be proved, `retire` it.

    An open transaction is rolled back, open cursors and blobs are closed. Raises no `sqlite3.Error`; what is not an
    error of SQLite (Ctrl-C) passes through, and the connection must then be retired.
    """
    try:
        if conn.in_transaction or conn.touched:
            _roll_back(conn)
            return _undo(conn)
        cursors = conn.cursors
        if _getrefcount(cursors) != _STILL_THE_LIST:
            if LAYOUT is None:
                return False
            cursors = _find_lists(conn)
        if cursors:  # mostly one that is gone already: what `_close_all` does, for less
            for reference in cursors:
                cursor = reference()
                if cursor is not None:
                    _close_cursor(cursor)
            cursors.clear()
        if conn.blobs:
            _close_all(conn.blobs, _close_blob)
        return True
    except sqlite3.Error:
        return False


def retire(conn: Connection) -> None:
    """Close `conn` for good: cursors and blobs, ROLLBACK, close, in this order. Raises no `sqlite3.Error`.

    Safe to call twice. A statement that another thread is still running is interrupted; if it does not end within about
    half a second, the connection is left to the garbage collector, with a `ResourceWarning`: to close it then could
    crash the process.
    """
    if is_closed(conn):
        return
    if not _free_of_statements(conn):
        warnings.warn(
            "a connection was retired while another thread ran a statement on it: left open until that thread drops it",
            ResourceWarning,
            stacklevel=2,
        )
        return
    with contextlib.suppress(sqlite3.Error):
        _execute(conn, "SELECT 1")  # an interrupt that is still pending would end the checkpoint of the close
    with contextlib.suppress(sqlite3.Error):
        if conn.in_transaction:
            _execute(conn, _ROLLBACK)
    with contextlib.suppress(sqlite3.Error):
        sqlite3.Connection.close(conn)


def open_handles(conn: Connection) -> list[object]:
    """Return the cursors and blobs of `conn` that are still open: in a forked child nobody may finalize them."""
    if LAYOUT is None:
        return []
    references = [*_find_lists(conn), *(conn.blobs or [])]
    return [handle for reference in references if (handle := reference()) is not None]


def set_baseline(conn: Connection) -> None:
    """Take `conn` as it is now, opened and set up, for the state that every borrower is to find."""
    close_handles(conn)
    baseline = Baseline(
        databases=_databases(conn),
        temporary=_temporary(conn),
        handlers=_HANDLERS & conn.touched,
        rests_in_transaction=getattr(conn, "autocommit", None) is False,
    )
    _clear_statements(conn)
    conn.mark_clean(baseline)


def _close_all(handles: list[Any], close: Callable[[Any], None]) -> None:
    """Close what the weak references lead to, so that a stale cursor raises instead of working on.

    Raises `sqlite3.ProgrammingError` if one is in use at this moment by another thread.
    """
    for reference in handles:
        handle = reference()
        if handle is not None:
            close(handle)
    handles.clear()  # dead references too: the list is CPython's own and would grow


def close_handles(conn: Connection) -> None:
    """Close the cursors and blobs that are open on `conn`, where Python shows them (`tracking.LAYOUT`)."""
    if LAYOUT is not None:
        _close_all(_find_lists(conn), _close_cursor)
        _close_all(conn.blobs or [], _close_blob)


def _find_lists(conn: Connection) -> list[Any]:
    """Find the lists of open handles; return that of the cursors."""
    assert LAYOUT is not None
    referents = _get_referents(conn)
    cursors: list[Any] = referents[LAYOUT.cursors]
    object.__setattr__(conn, "cursors", cursors)
    object.__setattr__(conn, "blobs", referents[LAYOUT.blobs])
    return cursors


def _clear_statements(conn: Connection) -> None:
    if LAYOUT is not None:
        _get_referents(conn)[LAYOUT.statements].cache_clear()


def _roll_back(conn: Connection) -> None:
    close_handles(conn)  # ROLLBACK alone would leave half-read statements holding their snapshot
    if conn.in_transaction:
        _execute(conn, _ROLLBACK)


def _free_of_statements(conn: Connection) -> bool:
    for pause in _PATIENCE:
        try:
            close_handles(conn)
            return True
        except sqlite3.ProgrammingError:
            conn.interrupt()
            time.sleep(pause)
    return False


def is_closed(conn: Connection) -> bool:
    """Tell whether somebody has closed the connection."""
    try:
        return conn.in_transaction is None
    except sqlite3.ProgrammingError:
        return True


def _undo(conn: Connection) -> bool:
    """Put back whatever `conn.touched` names. False: something cannot be put back. No transaction is open."""
    touched = conn.touched
    if touched <= _QUICKLY_UNDONE:
        _restore_attributes(conn)
        conn.mark_clean(conn.baseline)
        return True
    if not touched <= _UNDONE | conn.before.keys() or touched & conn.baseline.handlers:
        return False
    # Handlers and limits first: they would act on what follows.
    if "set_authorizer" in touched:
        sqlite3.Connection.set_authorizer(conn, None)
    if "set_progress_handler" in touched:
        sqlite3.Connection.set_progress_handler(conn, None, 0)
    if "set_trace_callback" in touched:
        sqlite3.Connection.set_trace_callback(conn, None)
    if not (_restore_limits(conn) and _restore_pragmas(conn)):
        return False
    if "schema" in touched and not (_restore_databases(conn) and _restore_temporary(conn)):
        return False
    # Attributes last: `autocommit = False` begins a transaction, in which some PRAGMAs do nothing.
    _restore_attributes(conn)
    _clear_statements(conn)
    conn.mark_clean(conn.baseline)
    return True


def _restore_attributes(conn: Connection) -> None:
    for name in ATTRIBUTES & conn.before.keys():
        object.__setattr__(conn, name, conn.before[name])


def _restore_limits(conn: Connection) -> bool:
    limits = {int(kind[6:]): value for kind, value in conn.before.items() if kind.startswith("limit:")}
    for category, value in limits.items():
        sqlite3.Connection.setlimit(conn, category, value)
    return all(conn.getlimit(category) == value for category, value in limits.items())


def _restore_pragmas(conn: Connection) -> bool:
    """Set changed PRAGMAs back. All are read again at the end: one may change the answer of another."""
    pragmas = {kind[7:]: value for kind, value in conn.before.items() if kind.startswith("pragma:")}
    for name, value in pragmas.items():
        if conn.read_pragma(name) != value:
            conn.read(f"PRAGMA {name} = {value}")
    return all(conn.read_pragma(name) == value for name, value in pragmas.items())


def _restore_databases(conn: Connection) -> bool:
    for name, _ in _databases(conn) - conn.baseline.databases:
        conn.read(f"DETACH {_quoted(name)}")
    return _databases(conn) == conn.baseline.databases


def _restore_temporary(conn: Connection) -> bool:
    now = _temporary(conn)
    added = now - conn.baseline.temporary
    for kind in _DROP_ORDER:
        for _, name, _ in (thing for thing in added if thing[0] == kind):
            conn.read(f"DROP {kind} IF EXISTS temp.{_quoted(name)}")
    return (_temporary(conn) if added else now) == conn.baseline.temporary


def _databases(conn: Connection) -> frozenset[tuple[str, str]]:
    """Name and file of each database but `temp`, which comes into being when it is first used."""
    return frozenset((name, file) for _, name, file in conn.read("PRAGMA database_list") if name != "temp")


def _temporary(conn: Connection) -> frozenset[tuple[str, str, str]]:
    return frozenset(conn.read("SELECT type, name, sql FROM temp.sqlite_master"))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
