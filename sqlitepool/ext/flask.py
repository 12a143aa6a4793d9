"""Flask: a connection for each application context, so for each request and each command.

    from sqlitepool.ext.flask import SQLitePool

    db = SQLitePool(wrap=UserDatabase)

    def create_app():
        app = Flask(__name__)
        app.config["SQLITEPOOL_DATABASE"] = "app.db"
        db.init_app(app)
        return app

    @blueprint.get("/<name>")
    def show(name):
        return db.connection.profile(name)

A connection goes back when its context ends. Flask ends the context before it sends a streamed body, but such a body
may go on reading by the connection: then it goes back when the response is closed.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast, overload

from flask import Flask, Response
from flask.ctx import AppContext
from flask.globals import app_ctx
from werkzeug.local import LocalProxy

from sqlitepool import fork
from sqlitepool.connection_pool import ConnectionPool, Options
from sqlitepool.database import Database
from sqlitepool.errors import PoolClosed
from sqlitepool.ext.wsgi import close_at_exit
from sqlitepool.scope import OpenScope, Scope
from sqlitepool.stats import LeaseInfo
from sqlitepool.tracking import Connection

# The files of code that stands between the connection and who asks for it by the proxy.
_PROXY = (__file__, LocalProxy.__init__.__code__.co_filename)

# Returns the application context itself: each use of `app_ctx` or `g` looks it up anew.
_flask_context: Callable[[], AppContext] = app_ctx._get_current_object  # type: ignore[attr-defined]

T = TypeVar("T")
S = TypeVar("S", bound=ConnectionPool[Any] | Database)


class PoolOptions(Options, total=False):
    """The options of `ConnectionPool`."""

    read_only: bool
    pragmas: Mapping[str, object] | None
    setup: Callable[[sqlite3.Connection], object] | None
    if_replaced: Literal["reopen", "raise"]


class DatabaseOptions(TypedDict, total=False):
    """The options of `Database`."""

    readers: int
    durable: bool
    timeout: float | None
    max_queue: int
    pragmas: Mapping[str, object] | None
    setup: Callable[[sqlite3.Connection], object] | None
    if_replaced: Literal["reopen", "raise"]
    name: str | None


class _ContextScope(OpenScope[T]):
    """The scope of one application context. Ends when that has ended, and all responses streamed from it are closed."""

    _streams: set[object] | None = None
    _has_ended = False
    _has_failed = False

    def see(self, response: Response) -> None:
        """Look at a response that is about to be sent."""
        status = response.status_code
        self._has_failed = status >= 400
        # Error pages and redirects may look streamed too, and files are: none of them needs a connection.
        if status < 300 and response.is_streamed and not response.direct_passthrough:
            stream = object()
            streams = self._streams = self._streams or set()
            streams.add(stream)
            response.call_on_close(lambda: self._end_stream(streams, stream))

    def _end_stream(self, streams: set[object], stream: object) -> None:
        streams.discard(stream)
        if self._has_ended:
            self.end(None)

    def end(self, error: BaseException | None) -> None:
        """End it, unless a response is still being streamed. May be called again."""
        self._has_ended = True
        if error is not None:
            self._has_failed = True
        if not self._streams:
            self.close(failed=self._has_failed)


def _watch_contexts(app: Flask, key: str) -> None:
    """Have the scopes that stand in `g` as `key` see the responses, and end with their contexts.

    A receiver of the signal `request_finished` would see the same responses, for several times the price: whoever sends
    a signal asks about each receiver, each time anew, whether it is a coroutine function.
    """
    process_response = app.process_response

    def process_and_see(*args: Any) -> Response:
        response = process_response(*args)  # nobody will put another one in its place any more
        opened: _ContextScope[Any] | None = _flask_context().g.__dict__.get(key)
        if opened is not None:  # a stream that is the first to ask enters the context again, and so ends it again
            opened.see(response)
        return response

    def end(error: BaseException | None) -> None:  # called twice if the context was left and entered again
        opened: _ContextScope[Any] | None = _flask_context().g.__dict__.get(key)
        if opened is not None:
            opened.end(error)

    cast(Any, app).process_response = process_and_see  # a method that Flask has for being overridden
    app.teardown_appcontext(end)


class _App(Generic[S]):
    """What one application has of a database: the pool or `Database`, opened at its first use, closed at exit."""

    def __init__(self, app: Flask, open_source: Callable[[Flask], S], name: str, key: str) -> None:
        self.name = name
        self._open_source = open_source
        self._source: tuple[S, Scope[Any]] | None = None
        self._lock = threading.Lock()
        fork.register(self)
        close_at_exit(self)
        _watch_contexts(app, key)

    def source(self) -> tuple[S, Scope[Any]]:
        """What is open, and the scope over it. Opened if it is not."""
        source = self._source
        if source is None:
            with self._lock:
                source = self._source
                if source is None:
                    opened: Any = self._open_source(app_ctx.app)
                    source = self._source = (opened, Scope(opened))
        return source

    def has_open(self, opened: OpenScope[Any]) -> bool:
        """Tell whether a scope is of the pool that is open here."""
        source = self._source
        return source is not None and opened._scope is source[1]

    def close(self, timeout: float | None = 0.0) -> list[LeaseInfo]:
        """Close what is open. A request that comes later opens it again: threads of servers go on during the exit."""
        source, self._source = self._source, None
        return [] if source is None else source[0].close(timeout)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it at the fork


class _Extension(Generic[S, T]):
    """What the extensions have in common."""

    def __init__(
        self,
        app: Flask | None,
        open_source: Callable[..., S],
        database: str | os.PathLike[str] | None,
        options: Mapping[str, Any],
        config_prefix: str,
    ) -> None:
        if not isinstance(config_prefix, str):
            raise TypeError(f"config_prefix must be a string such as 'USERS', not {config_prefix!r}")
        self._open_source = open_source
        self._database = database
        self._options = options
        self._prefix = config_prefix
        self._key = f"_sqlitepool_{config_prefix}"
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Make the database known to an application. Opens nothing yet, and does not read the configuration.

        Raises:
            RuntimeError: the application has one with the same `config_prefix`.
        """
        known = app.extensions.setdefault("sqlitepool", {})
        if self._prefix in known:
            raise RuntimeError(
                f"{app!r} has a database with config_prefix {self._prefix!r} already: for a second database "
                "make another extension object with a config_prefix of its own"
            )
        known[self._prefix] = _App(app, self._open, self._prefix, self._key)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} configured by {self._prefix}_DATABASE>"

    @property
    def connection(self) -> T:
        """The connection of the application context (of the request, of the command), or the wrapper around it.

        It is taken when it is first asked for, and the same until the context ends. What is not committed by then is
        rolled back; with a warning, unless the request failed (by an exception, or a status of 400 or more).

        Raises:
            RuntimeError: there is no application context; or the application was not given to `init_app`, or its
                configuration does not name the database.
            PoolTimeout, PoolFull, PoolClosed, Exception: as `ConnectionPool.connection`.
        """
        frame = sys._getframe(1)
        if frame.f_code.co_filename == __file__:
            frame = _beyond_proxy(frame)
        flask_context = _flask_context()
        of_context = flask_context.g.__dict__
        opened: _ContextScope[T] | None = of_context.get(self._key)
        if opened is None or opened.is_closed:
            scope = self._of_app(flask_context.app).source()[1]
            opened = of_context[self._key] = _ContextScope(scope, frame)
        while True:
            try:
                return opened._get(..., frame)
            except PoolClosed:
                known = self._of_app(flask_context.app)
                if known.has_open(opened):
                    raise
                opened._scope = known.source()[1]  # it was closed at exit just before we asked it

    @property
    def proxy(self) -> T:
        """Stands for `connection` wherever it is used, so that other modules can import it by name.

            conn = db.proxy     # at the head of a module

            def count():
                return conn.execute("SELECT count(*) FROM visit").fetchone()[0]

        It is a `werkzeug.local.LocalProxy`.
        """
        return cast(T, LocalProxy(lambda: self.connection))

    def _current(self) -> S:
        return self._of_app(app_ctx.app).source()[0]

    def _of_app(self, app: Flask) -> _App[S]:
        try:
            known: _App[S] = app.extensions["sqlitepool"][self._prefix]
        except KeyError:
            raise RuntimeError(f"{app!r} does not know this database: call init_app(app) first") from None
        return known

    def _open(self, app: Flask) -> S:
        database = app.config.get(f"{self._prefix}_DATABASE", self._database)
        if not database:
            raise RuntimeError(f'which file? Set app.config["{self._prefix}_DATABASE"] to a path, or pass database=')
        return self._open_source(
            _locate(app, database), **{**self._options, **app.config.get(f"{self._prefix}_OPTIONS", {})}
        )


class SQLitePool(_Extension[ConnectionPool[Any], T]):
    """A `ConnectionPool` for each Flask application, and a connection of it for each of their contexts.

        db = SQLitePool()                           # db.connection is a sqlite3.Connection
        users = SQLitePool(wrap=UserDatabase)       # users.connection is a UserDatabase

    Opened when it is first used, so in a server that forks each process opens its own. Closed when the process ends.

    The file is `app.config["SQLITEPOOL_DATABASE"]`. A relative path is below `app.instance_path`, which is made if
    missing. Options of the pool may be in the dictionary `app.config["SQLITEPOOL_OPTIONS"]`. What is there counts for
    more than what is given here.

    Args:
        app: the application, if there is one already; else call `init_app`.
        database: a path, a `file:` URI or ":memory:", if the configuration has none.
        wrap: as in `ConnectionPool`.
        config_prefix: stands in the names of the configuration in the place of "SQLITEPOOL". Each database of an
            application is an extension object with a prefix of its own.
        **options: those of `ConnectionPool`.
    """

    @overload
    def __init__(
        self: SQLitePool[Connection],
        app: Flask | None = None,
        *,
        database: str | os.PathLike[str] | None = None,
        wrap: None = None,
        config_prefix: str = "SQLITEPOOL",
        **options: Unpack[PoolOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        app: Flask | None = None,
        *,
        database: str | os.PathLike[str] | None = None,
        wrap: Callable[[sqlite3.Connection], T],
        config_prefix: str = "SQLITEPOOL",
        **options: Unpack[PoolOptions],
    ) -> None: ...

    def __init__(
        self,
        app: Flask | None = None,
        *,
        database: str | os.PathLike[str] | None = None,
        wrap: Callable[[sqlite3.Connection], Any] | None = None,
        config_prefix: str = "SQLITEPOOL",
        **options: Any,
    ) -> None:
        super().__init__(app, ConnectionPool, database, {"wrap": wrap, **options}, config_prefix)

    @property
    def pool(self) -> ConnectionPool[T]:
        """The pool of the current application: for `stats()`, or a connection beside that of the context."""
        return self._current()


class SQLiteDatabase(_Extension[Database, Connection]):
    """A `Database` for each Flask application: one writer, many readers. The rest is as in `SQLitePool`.

        db = SQLiteDatabase()

        @app.post("/<page>")
        def visit(page):
            with db.database.write() as conn:       # committed at the end of the block
                conn.execute("INSERT INTO visit (page) VALUES (?)", (page,))
            return "", 204

    `connection` reads. Each of its statements sees the latest commit.

    Args:
        app, database, config_prefix: as in `SQLitePool`.
        **options: those of `Database`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        database: str | os.PathLike[str] | None = None,
        config_prefix: str = "SQLITEPOOL",
        **options: Unpack[DatabaseOptions],
    ) -> None:
        super().__init__(app, Database, database, cast("dict[str, Any]", options), config_prefix)

    @property
    def database(self) -> Database:
        """The `Database` of the current application."""
        return self._current()


def _locate(app: Flask, database: str | os.PathLike[str]) -> str:
    path = os.fspath(database)
    if path == ":memory:" or path.startswith("file:") or os.path.isabs(path):
        return path
    os.makedirs(app.instance_path, exist_ok=True)
    return os.path.join(app.instance_path, path)


def _beyond_proxy(frame: FrameType) -> FrameType:
    """The frame of the code that asks for the connection by the proxy."""
    while frame.f_code.co_filename in _PROXY and frame.f_back is not None:
        frame = frame.f_back
    return frame
