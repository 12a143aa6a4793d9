"""Opening one SQLite connection for a server: the path, the options, the PRAGMAs, and errors that say what to do.

Whatever can be refused without opening anything is refused by `normalise_path`, `check_path`, `check_options` and
`check_pragmas`, which a pool calls when it is made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from sqlitepool.cleaning import retire, set_baseline
from sqlitepool.tracking import RESTORABLE_PRAGMAS, Connection

__all__ = ["Connection", "Target", "check_options", "check_path", "check_pragmas", "normalise_path", "open_connection"]

#: What a server wants of each connection, in the order it is applied. `pragmas` of the caller replace or add to these.
DEFAULT_PRAGMAS: Mapping[str, object] = {
    "journal_mode": "WAL",
    "synchronous": "NORMAL",
    "foreign_keys": True,
    "journal_size_limit": 64 * 1024 * 1024,
    "mmap_size": 0,
    "trusted_schema": False,
    "busy_timeout": 5000,
}

_ISOLATION_LEVELS = (None, "", "DEFERRED", "IMMEDIATE", "EXCLUSIVE")
_BOOLEANS = ("on", "off", "yes", "no", "true", "false")
#: The words for what is not just on or off. SQLite takes any other word in silence, for something else.
_WORDS = {
    "auto_vacuum": ("none", "full", "incremental"),
    "locking_mode": ("normal", "exclusive"),
    "secure_delete": (*_BOOLEANS, "fast"),
    "synchronous": (*_BOOLEANS, "normal", "full", "extra"),
    "temp_store": ("default", "file", "memory"),
}
_WORD_OR_NUMBER = re.compile(r"\w+|[-+]?\d+(\.\d+)?", re.ASCII)
_MEMORY_VFS = "memdb"
_UNREADABLE = (
    "SQLite makes two files beside a database in WAL mode even to read it: allow it to write to the folder, or say "
    "immutable=1 in a file: URI if nobody ever changes the database"
)


@dataclass(frozen=True, slots=True)
class Target:
    """What to open: `database` and `uri` for `sqlite3.connect`, and what is known about it.

    `file` is the absolute path of the file, None for a database in memory (`memory`).
    """

    database: str
    uri: bool
    file: str | None
    memory: bool


def normalise_path(path: str | os.PathLike[str], read_only: bool) -> Target:
    """Understand a path, a `file:` URI or ":memory:". Relative paths are bound to the present folder.

    ":memory:" becomes a database of a new name that connections of this process share, as long as one is open.

    Raises:
        TypeError: the path is neither text nor `os.PathLike`.
        ValueError: it is empty, or names a database in memory that each connection would have for itself.

    Example::

        normalise_path("app.db", read_only=True).database   # "file:/srv/app.db?mode=ro"
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"the path of a database is a str or os.PathLike[str], not {type(text).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"not the path of a database: {text!r}; for one in memory use ':memory:'")
    if text == ":memory:":
        return Target(f"file:/sqlitepool-{uuid.uuid4().hex}?vfs={_MEMORY_VFS}", True, None, True)
    if text.startswith("file:"):
        return _normalise_uri(text, read_only)
    file = os.path.abspath(text)
    if read_only:
        return Target(f"file:{quote(file)}?mode=ro", True, file, False)
    return Target(file, False, file, False)


def _normalise_uri(uri: str, read_only: bool) -> Target:
    location, _, query = uri.removeprefix("file:").partition("#")[0].partition("?")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    if location.startswith("//"):
        authority, slash, location = location[2:].partition("/")
        if authority not in ("", "localhost"):
            raise ValueError(f"a file: URI names no other host than localhost: {uri!r}")
        location = slash + location
    name = unquote(location)
    if "\0" in name:
        raise ValueError(f"not the path of a database: {uri!r}")
    if parameters.get("vfs") == _MEMORY_VFS or parameters.get("mode") == "memory" or name == ":memory:":
        named = parameters.get("vfs") == _MEMORY_VFS and name.startswith("/")
        if not named and parameters.get("cache") != "shared":
            raise ValueError(f"each connection would have a database of its own at {uri!r}: use ':memory:'")
        return Target(uri, True, None, True)
    if not name:
        raise ValueError(f"the URI names no file: {uri!r}")
    file = os.path.abspath(name)
    if read_only:
        parameters["mode"] = "ro"
    tail = f"?{urlencode(parameters)}" if parameters else ""
    return Target(f"file:{quote(file)}{tail}", True, file, False)


def check_path(target: Target, read_only: bool) -> None:
    """Refuse what is known to fail, without opening the file (to open and close it would drop SQLite's locks on it).

    Raises:
        FileNotFoundError: the folder is missing, or the file, which `read_only` does not create.
        IsADirectoryError: the path is a folder.
        sqlite3.OperationalError: it is no regular file, may not be read, or not be written without `read_only=True`.
    """
    if target.file is None:
        return
    file, folder = target.file, os.path.dirname(target.file)
    if os.path.isdir(file):
        raise IsADirectoryError(errno.EISDIR, "a folder, where the file of a database is wanted", file)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder: create it before the database", folder)
    if not os.path.exists(file):
        if read_only:
            raise FileNotFoundError(errno.ENOENT, "no such database, and read_only=True does not create one", file)
        if target.uri and re.search(r"[?&]mode=r[ow](&|$)", target.database):
            raise FileNotFoundError(errno.ENOENT, "no such database, and the mode in its URI does not create one", file)
        if not os.access(folder, os.W_OK):
            raise sqlite3.OperationalError(f"cannot create {file}: no permission to write to its folder")
    elif not os.path.isfile(file):
        raise sqlite3.OperationalError(f"cannot open {file}: it is no regular file")
    elif not os.access(file, os.R_OK):
        raise sqlite3.OperationalError(f"cannot open {file}: no permission to read it")
    elif not read_only and not os.access(file, os.W_OK):
        raise sqlite3.OperationalError(
            f"cannot write to {file}: allow it, or only read: ConnectionPool(..., read_only=True)"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options for `sqlite3.connect` that a pool does not take.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value that sqlite3 does not know.
    """
    allowed = {"autocommit", "cached_statements", "detect_types", "factory", "isolation_level"}
    for name in options:
        if name not in allowed:
            raise TypeError(f"unknown option {name!r}; connections take {', '.join(sorted(allowed))}")
    level = options.get("isolation_level")
    if (level.upper() if isinstance(level, str) else level) not in _ISOLATION_LEVELS:
        raise ValueError(f"isolation_level is one of {_ISOLATION_LEVELS}, not {level!r}")
    for name in ("cached_statements", "detect_types"):
        value = options.get(name, 0)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is a number from 0 on, not {value!r}")
    if "autocommit" in options:
        if sys.version_info >= (3, 12):
            if options["autocommit"] not in (True, False, sqlite3.LEGACY_TRANSACTION_CONTROL):
                raise ValueError(f"autocommit is True, False or LEGACY_TRANSACTION_CONTROL: {options['autocommit']!r}")
        else:
            raise TypeError("autocommit needs Python 3.12; isolation_level=None gives autocommit on this one")
    factory = options.get("factory", Connection)
    if not (isinstance(factory, type) and issubclass(factory, Connection)):
        raise TypeError(f"factory is a subclass of sqlitepool.connection.Connection, not {factory!r}")
    if factory.__basicsize__ != Connection.__basicsize__ or factory.__dictoffset__ != 0:
        raise TypeError(f"{factory.__name__} must declare __slots__ = (): attributes would pass to the next borrower")


def check_pragmas(pragmas: Mapping[str, object]) -> None:
    """Refuse PRAGMAs that this SQLite does not know (it would ignore them in silence) and values that are none.

    Raises:
        ValueError: an unknown name, a text that is not one word or number, or a word that the PRAGMA does not know.
        TypeError: a value that is no text, number or bool; or `pragmas` is no mapping.
    """
    if not isinstance(pragmas, Mapping):
        raise TypeError(f'pragmas are a mapping, such as {{"synchronous": "FULL"}}, not {pragmas!r}')
    with contextlib.closing(sqlite3.connect(":memory:")) as conn:
        known = {name for (name,) in conn.execute("PRAGMA pragma_list")}
    for name, value in pragmas.items():
        if known and str(name).lower() not in known:  # a SQLite built without introspection lists none
            raise ValueError(f"SQLite {sqlite3.sqlite_version} has no PRAGMA {name!r}")
        _pragma_value(name, value)


def _pragma_value(name: str, value: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError(f"not the name of a PRAGMA: {name!r}")
    if not isinstance(value, bool | int | float | str):
        raise TypeError(f"PRAGMA {name} takes a text, a number or a bool, not {value!r}")
    text = str(int(value) if isinstance(value, bool) else value)
    if not _WORD_OR_NUMBER.fullmatch(text):
        raise ValueError(f"PRAGMA {name} takes one word or number, not {value!r}")
    words = _WORDS.get(name.lower(), _BOOLEANS if name.lower() in RESTORABLE_PRAGMAS else None)
    if words is not None and isinstance(value, str) and value[-1].isalpha() and value.lower() not in words:
        raise ValueError(f"PRAGMA {name} takes a number or one of {', '.join(words)}, not {value!r}")
    return text


def open_connection(
    path: str,
    *,
    uri: bool,
    read_only: bool,
    pragmas: Mapping[str, object],
    setup: Callable[[sqlite3.Connection], object] | None,
    deadline: float | None,
    connect_options: Mapping[str, Any],
    watch: Callable[[], object] | None = None,
) -> Connection:
    """Open a connection, apply the server's defaults and `pragmas`, run `setup` and commit what it did.

    Args:
        path: `Target.database`.
        uri: `Target.uri`.
        read_only: leave the file as it is; `path` must say so too (`normalise_path` sees to it).
        pragmas: replace or add to `DEFAULT_PRAGMAS`.
        setup: called with the connection; an exception closes the connection and goes on to the caller. What it sets
            (functions, handlers, factories, attached databases) is what every borrower finds.
        deadline: while the database is locked, try again until then (a value of `time.monotonic()`); None: for ever.
        connect_options: as `check_options` allows them. `isolation_level` is "IMMEDIATE" unless given.
        watch: called when the database is open and nothing else: SQLite opens its journal, by name, when it first
            reads. An exception closes the connection and goes on to the caller.

    Raises:
        FileNotFoundError, IsADirectoryError: see `check_path`.
        sqlite3.OperationalError: the file is locked, or may not be read or written.
        sqlite3.DatabaseError: the file is no database.

    Example::

        target = normalise_path("app.db", read_only=False)
        conn = open_connection(target.database, uri=target.uri, read_only=False, pragmas={}, setup=None,
                               deadline=time.monotonic() + 30, connect_options={})
    """
    check_options(connect_options)
    options = {"isolation_level": "IMMEDIATE", **connect_options}
    factory: type[Connection] = options.pop("factory", Connection)
    autocommit = options.pop("autocommit", None)
    try:
        conn = sqlite3.connect(path, timeout=0, uri=uri, check_same_thread=False, factory=factory, **options)
    except sqlite3.Error as error:
        _explain(error, path, uri, read_only)
        raise
    try:
        if watch is not None:
            watch()
        try:
            own = {name.lower(): value for name, value in pragmas.items()}
            _configure(conn, read_only, {**DEFAULT_PRAGMAS, **own}, deadline)
            if read_only and normalise_path(path, read_only).memory:  # where `mode=ro` means nothing
                conn.read("PRAGMA query_only = 1")
        except sqlite3.Error as error:
            _explain(error, path, uri, read_only)
            raise
        if autocommit is not None:
            object.__setattr__(conn, "autocommit", autocommit)
        if setup is not None:
            setup(conn)
            if conn.in_transaction:
                conn.commit()
        set_baseline(conn)
    except BaseException:
        retire(conn)
        raise
    return conn


def _configure(conn: Connection, read_only: bool, pragmas: Mapping[str, object], deadline: float | None) -> None:
    if sys.version_info >= (3, 12):
        conn.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        conn.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DDL, False)
        conn.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
    for name, value in pragmas.items():
        text = _pragma_value(name, value)
        if name != "journal_mode":
            _read(conn, f"PRAGMA {name} = {text}", deadline)
        elif not read_only:
            _set_journal_mode(conn, text.lower(), deadline)


def _set_journal_mode(conn: Connection, mode: str, deadline: float | None) -> None:
    answer = _read(conn, "PRAGMA journal_mode", deadline)[0][0]
    if answer not in (mode, "memory"):
        answer = _read(conn, f"PRAGMA journal_mode = {mode}", deadline)[0][0]
    if answer not in (mode, "memory"):
        raise sqlite3.OperationalError(f"journal_mode stays {answer!r} where {mode!r} was asked for")


def _read(conn: Connection, sql: str, deadline: float | None) -> list[Any]:
    """Run it, and again while the database is locked, until `deadline`. SQLite's own wait knows no deadline."""
    pause = 0.001
    while True:
        try:
            return conn.read(sql)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise
            time.sleep(min(pause, left))
            pause = min(pause * 2, 0.05)


def _explain(error: sqlite3.Error, path: str, uri: bool, read_only: bool) -> None:
    """Raise the error of the file system that lies behind `error`, or say in `error` which database it is about."""
    has_links = False
    with contextlib.suppress(ValueError):
        target = normalise_path(path if not uri or path.startswith("file:") else f"file:{path}", read_only)
        check_path(target, read_only)
        has_links = target.file is not None and os.path.exists(target.file) and os.stat(target.file).st_nlink > 1
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    advice = {
        sqlite3.SQLITE_BUSY: "another connection holds the lock; give it time, or end its transaction",
        sqlite3.SQLITE_CANTOPEN: _UNREADABLE if read_only else "check the permissions of the file and its folder",
        sqlite3.SQLITE_NOTADB: "the file is not a SQLite database, or it is encrypted",
        sqlite3.SQLITE_READONLY: _UNREADABLE
        if read_only
        else "the file cannot be written; to read it use ConnectionPool(..., read_only=True)",
    }.get(code)
    if code == sqlite3.SQLITE_IOERR and has_links:
        advice = "the file has several names (hard links), with a journal for each: open it by the name that others use"
    error.args = (f"{path}: {error}" + (f" ({advice})" if advice else ""),)
