"""`ConnectionPool`: a `Pool` of SQLite connections, or of wrappers around them, that come back clean or not at all."""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import EllipsisType
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from sqlitepool import fork, limits
from sqlitepool.cleaning import clean, end_block, retire, set_baseline
from sqlitepool.connection import check_options, check_path, check_pragmas, normalise_path, open_connection
from sqlitepool.database_file import DatabaseFile
from sqlitepool.inherited import disown
from sqlitepool.lease import Lease, Slot
from sqlitepool.pool import close_item, logger
from sqlitepool.stats import LeaseInfo
from sqlitepool.tracking import Connection
from sqlitepool.waiting import locked
from sqlitepool.watched_pool import TRUSTED_FOR, WatchedPool
from sqlitepool.whole_block import WholeBlock

T = TypeVar("T")
W = TypeVar("W")

_MODES = ("deferred", "immediate", "exclusive")


class Options(TypedDict, total=False):
    """What `ConnectionPool` takes besides: the options of `Pool`, and those of `sqlite3.connect`."""

    max_size: int
    min_size: int
    timeout: float | None
    max_waiting: int | None
    max_idle: float | None
    max_lifetime: float | None
    fairness: float
    reset: Callable[[Any], object] | None
    check: Callable[[Any], object] | None
    close: Callable[[Any], object] | None
    name: str | None
    detect_types: int
    isolation_level: Literal["", "DEFERRED", "IMMEDIATE", "EXCLUSIVE"] | None
    cached_statements: int
    factory: type[Connection]
    autocommit: bool | int


_CONNECT_OPTIONS = frozenset(("detect_types", "isolation_level", "cached_statements", "factory", "autocommit"))
_POOL_OPTIONS = Options.__annotations__.keys() - _CONNECT_OPTIONS


def _nothing(item: object) -> None:
    """The default reset and close: the pool sees to the connection itself."""


class ConnectionPool(WatchedPool[T]):
    """Lends connections to one SQLite database.

        pool = ConnectionPool("app.db")
        with pool.connection() as conn:
            conn.execute("INSERT INTO visit (page) VALUES (?)", (page,))

    A `connection()` block ends as `with conn:` does: committed when it succeeded, rolled back when it raised. What is
    left open on `release` is rolled back, with a warning. Whatever else a borrower changed (PRAGMAs, row factories,
    temporary tables, attached databases, handlers, open cursors) is undone before the next one gets the connection, or
    the connection is closed and replaced. Leave closing to the pool: if a borrower closes the connection with a
    transaction open (under `autocommit=False` that is always), what was not committed is lost, and a block that
    succeeded raises `sqlite3.ProgrammingError`. Do not use the connection after its block: it may be lent to somebody
    else by then, whose transaction you would write into.

        pool = ConnectionPool("app.db", wrap=UserDatabase)   # lends UserDatabase(conn)

    Args:
        database: a path, a `file:` URI, or ":memory:" for one database in memory that all connections of the pool
            share. In memory there is no WAL: while one connection writes, the others can neither read nor be opened.
        wrap: called with each new connection; what it returns is lent instead of it. What it changes on the connection
            (a row factory, say) stays. It must not keep a cursor: cursors end with each loan.
        read_only: open the file so that nothing can be written; it must exist.
        pragmas: PRAGMAs for each new connection, over the defaults of `sqlitepool.connection`, by name. `busy_timeout`
            (milliseconds, 5000 unless given) is how long a statement waits for a lock of SQLite; `timeout` below is how
            long a caller waits for a connection.
        setup: called with each new connection, before `wrap`: to register functions, attach databases and so on. What
            it makes is part of the connection: the rows of its temporary tables are shared by all who borrow it.
        if_replaced: what to do when the database file has been replaced or deleted underneath: "reopen" retires every
            connection, with a `RuntimeWarning`, and opens the file that is there now; "raise" retires them and raises
            `FileReplaced` on each checkout until the old file is back. The file is looked at before a checkout when
            nobody was at work, if only for ten microseconds, and once in a millisecond under load, and before a block
            commits, which raises `FileReplaced` instead of writing to the old one. As long as a connection to the old
            file is lent, none to the new one is opened: who would need it gets `FileReplaced`, and may try again. With
            WAL, a file that was emptied is a `sqlite3.DatabaseError`, until another one is put in its place.
        **options: those of `Pool` (`reset`, `check` and `close` get what is lent, before the pool sees to the
            connection), and of `sqlite3.connect`: `detect_types`, `isolation_level` ("IMMEDIATE" unless given),
            `cached_statements`, `factory` (a subclass of `sqlitepool.Connection`) and, from Python 3.12, `autocommit`.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an unknown PRAGMA, or a value out of range.
        FileNotFoundError: the folder of the database is missing, or with `read_only` the file.
        IsADirectoryError: `database` is a folder.
    """

    @overload
    def __init__(
        self: ConnectionPool[Connection],
        database: str | os.PathLike[str],
        *,
        wrap: None = None,
        read_only: bool = False,
        pragmas: Mapping[str, object] | None = None,
        setup: Callable[[sqlite3.Connection], object] | None = None,
        if_replaced: Literal["reopen", "raise"] = "reopen",
        **options: Unpack[Options],
    ) -> None: ...

    @overload  # for subclasses that say so; whoever just calls the class meets the first
    def __init__(  # pyright: ignore[reportOverlappingOverload]
        self: ConnectionPool[sqlite3.Connection],
        database: str | os.PathLike[str],
        *,
        wrap: None = None,
        read_only: bool = False,
        pragmas: Mapping[str, object] | None = None,
        setup: Callable[[sqlite3.Connection], object] | None = None,
        if_replaced: Literal["reopen", "raise"] = "reopen",
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self: ConnectionPool[W],
        database: str | os.PathLike[str],
        *,
        wrap: Callable[[sqlite3.Connection], W],
        read_only: bool = False,
        pragmas: Mapping[str, object] | None = None,
        setup: Callable[[sqlite3.Connection], object] | None = None,
        if_replaced: Literal["reopen", "raise"] = "reopen",
        **options: Unpack[Options],
    ) -> None: ...

    def __init__(
        self,
        database: str | os.PathLike[str],
        *,
        wrap: Callable[[sqlite3.Connection], Any] | None = None,
        read_only: bool = False,
        pragmas: Mapping[str, object] | None = None,
        setup: Callable[[sqlite3.Connection], object] | None = None,
        if_replaced: Literal["reopen", "raise"] = "reopen",
        **options: Any,
    ) -> None:
        limits.callable_or_none("wrap", wrap)
        limits.callable_or_none("setup", setup)
        if if_replaced not in ("reopen", "raise"):
            raise ValueError(f'if_replaced must be "reopen" or "raise", not {if_replaced!r}')
        pool_options = {key: options.pop(key) for key in _POOL_OPTIONS & options.keys()}
        check_options(options)
        if pragmas is not None:
            check_pragmas(pragmas)
        self._target = normalise_path(database, read_only)
        self._open_options: dict[str, Any] = {
            "read_only": read_only,
            "pragmas": dict(pragmas or {}),
            "setup": setup,
            "connect_options": options,
        }
        self._wrap = wrap
        self._raises = if_replaced == "raise"
        check_path(self._target, read_only)
        self._anchor: Connection | None = None
        self._file = DatabaseFile(self._target.file) if self._target.file is not None else None
        for hook in ("reset", "close"):
            if pool_options.get(hook) is None:
                pool_options[hook] = close_item if hook == "close" and wrap is not None else _nothing
        if pool_options.get("name") is None:
            pool_options["name"] = os.path.basename(self._target.file or str(database))
        super().__init__(_no_factory, **pool_options)
        if not self._target.memory:
            self._limits = replace(self._limits, trusted_for=min(self._limits.trusted_for, TRUSTED_FOR))

    def transaction(
        self,
        mode: Literal["deferred", "immediate", "exclusive"] = "immediate",
        timeout: float | EllipsisType | None = ...,
    ) -> Lease[T]:
        """Return a lease whose block is one transaction: begun at once, committed at the end, or rolled back.

            with pool.transaction() as conn:
                ...

        All of it or nothing: `executescript` runs inside the transaction instead of committing it first, and a block
        whose transaction was ended by SQL, or by SQLite (`INSERT OR ROLLBACK`), raises at its end, if nothing else was
        raised. Until the end `conn.isolation_level` is None, so that `sqlite3` begins no transaction of its own. Who
        calls `conn.commit()` or `conn.rollback()` ends it earlier; what follows is then as in `connection()`.

        Args:
            mode: how it begins (https://www.sqlite.org/lang_transaction.html). "immediate" takes the right to write at
                once, so that no read in it has to become a write half way.
            timeout: seconds to wait for a connection, as in `connection`. For the right to write it is the PRAGMA
                `busy_timeout` that counts.

        Raises (when the block begins):
            sqlite3.OperationalError: another connection holds the right to write ("database is locked").
            PoolError: as in `connection`.

        Raises (when it ends):
            sqlite3.ProgrammingError: the transaction had ended before, other than by `commit()` or `rollback()`.
            FileReplaced: the file was replaced or deleted meanwhile; nothing was written.
        """
        if mode not in _MODES and (not isinstance(mode, str) or mode.lower() not in _MODES):
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, not {mode!r}")
        return WholeBlock(self, limits.timeout(timeout), mode)

    def close(self, timeout: float | None = 0.0) -> list[LeaseInfo]:
        """Close the pool, as `Pool.close` does. A database in memory goes with its last connection."""
        try:
            return super().close(timeout)
        finally:
            anchor = locked(self._lock, self._take_anchor)
            if anchor is not None:
                retire(anchor)

    # -- what `Pool` asks of its subclasses

    def _create(self, slot: Slot[T], deadline: float | None) -> T:
        file = self._file
        before = None
        if file is not None:
            before = file.identify()
            file.hold_inherited_locks()
            self._enter_file(file)
        if self._target.memory and self._anchor is None:
            anchor = self._connect(deadline, None)
            if not locked(self._lock, self._keep_anchor, anchor):
                retire(anchor)
        conn = self._connect(deadline, before)
        try:
            if file is not None:
                conn.read("PRAGMA schema_version")  # from the first read on there is a journal to remember
                self._remember_file(file, before)
            slot.base = conn
            conn.lend_by(slot.loan)
            if self._wrap is None:
                return conn  # type: ignore[return-value]  # T is Connection then
            item = self._wrap(conn)
            if item is None or item is conn:
                raise TypeError(f"wrap must return an object that holds the connection, not {item!r}")
            if conn.in_transaction:
                end_block(conn, True)
            set_baseline(conn)
            return item  # type: ignore[no-any-return]
        except BaseException:
            retire(conn)
            raise

    def _keep_anchor(self, anchor: Connection) -> bool:
        """Keep a connection that a database in memory lives by, if there is none yet. Needs the lock."""
        if self._closed or self._anchor is not None:
            return False
        self._anchor = anchor
        return True

    def _take_anchor(self) -> Connection | None:
        anchor, self._anchor = self._anchor, None
        return anchor

    def _connect(self, deadline: float | None, before: tuple[int, int] | None) -> Connection:
        return open_connection(
            self._target.database,
            uri=self._target.uri,
            deadline=deadline,
            watch=partial(self._check_file, before),
            **self._open_options,
        )

    def _finish(self, slot: Slot[T], commit: bool | None) -> bool:
        conn: Connection = slot.base
        try:
            if not conn.in_transaction and self._reset is _nothing:
                return clean(conn)
        except sqlite3.ProgrammingError:  # its borrower closed it
            pass
        else:
            return self._finish_slowly(slot, commit, conn)
        if commit:
            end_block(conn, True)
        return False

    def _is_good(self, slot: Slot[T], idle_for: float) -> bool:
        conn: Connection = slot.base
        try:
            used = (conn.in_transaction or conn.touched) and not conn.baseline.rests_in_transaction
        except sqlite3.ProgrammingError:  # closed
            used = True
        if used:
            slot.spoiled = True
            logger.warning("pool %r replaces a connection that somebody used after its return", self.name)
            return False
        return super()._is_good(slot, idle_for)

    def _finish_slowly(self, slot: Slot[T], commit: bool | None, conn: Connection) -> bool:
        left_open = commit is None and conn.in_transaction and not conn.baseline.rests_in_transaction
        if commit and conn.in_transaction:
            self._look_before_commit(conn)
            end_block(conn, True)
        good = super()._finish(slot, commit) and clean(conn)
        if left_open:
            warnings.warn(
                f"pool {self.name!r} rolled back a transaction that was open on the return of the connection "
                f"taken at {slot.where}: commit before release(), or use a `with` block",
                RuntimeWarning,
                stacklevel=5,
            )
        return good

    def _dispose(self, slot: Slot[T], item: T) -> None:
        conn: Connection = slot.base
        clean(conn)
        try:
            super()._dispose(slot, item)
        finally:
            self._retire_connection(conn)

    def _retire_connection(self, conn: Connection) -> None:
        retire(conn)
        if self._file is not None:
            self._file.closed()

    def _start_anew(self) -> None:
        super()._start_anew()
        if self._target.memory:
            if self._anchor is not None:
                disown(self._anchor)
            self._anchor = None
            self._target = normalise_path(":memory:", self._open_options["read_only"])

    def _abandon(self, slot: Slot[T]) -> None:
        if slot.item is not None:
            if self._file is not None:
                self._file.inherit()
            fork.keep_forever(slot.item)
            disown(slot.base)


def _no_factory() -> Any:
    raise NotImplementedError("a ConnectionPool opens its connections itself")
