"""WSGI: a scope for each request, and pools that are closed when the server stops.

    from sqlitepool import ConnectionPool, Scope
    from sqlitepool.ext.wsgi import ScopeMiddleware, close_at_exit

    pool = close_at_exit(ConnectionPool("app.db"))
    db = Scope(pool)

    def hello(environ, start_response):
        (count,) = db.get().execute("SELECT count(*) FROM visit").fetchone()
        ...

    application = ScopeMiddleware(hello, db)

Nothing but the standard library is needed. https://peps.python.org/pep-3333/ has the rules that this keeps.
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from sqlitepool import limits
from sqlitepool.scope import OpenScope, Scope

logger = logging.getLogger("sqlitepool")


class Closeable(Protocol):
    """What can be closed at exit: a `Pool`, a `ConnectionPool`, a `Database`."""

    name: str

    def close(self, timeout: float | None = ...) -> list[Any]:
        """Close it; return what is still lent."""
        ...


C = TypeVar("C", bound=Closeable)


def close_at_exit(pool: C, *, timeout: float | None = 3.0) -> C:
    """Have `pool` closed when the process or the interpreter ends, and return it.

    Without that the last connection is never closed in order, and an SQLite database keeps its `-wal` file. In a forked
    process this closes what is its own. In a process that is killed nothing of it runs.

    It is `atexit` that closes, after the last request. Under mod_wsgi, `mod_wsgi.subscribe_shutdown` is earlier, while
    requests are running: a pool is drained then. That is all that can be had where Apache does not end Python in order
    (`WSGIDestroyInterpreter Off`).

        pool = close_at_exit(ConnectionPool("app.db"))

    Args:
        pool: a `Pool`, a `ConnectionPool` or a `Database`. One that nobody refers to any more is not kept for this.
        timeout: seconds to wait for what is still lent then (None: for ever).

    Raises:
        TypeError, ValueError: `pool` is nothing that can be closed, such as a `Scope`; or `timeout` is no such number.
    """
    if not (hasattr(pool, "name") and callable(getattr(pool, "close", None))):
        raise TypeError(f"what can be closed at exit is a Pool, a ConnectionPool or a Database, not {pool!r}")
    limits.optional_seconds("timeout", timeout)
    known = weakref.ref(pool)

    def close() -> None:
        pool = known()
        if pool is not None:
            for lease in pool.close(timeout):
                logger.warning("the process ends while %r has an item lent: %s", pool.name, lease)

    def drain(*event: object, **details: object) -> None:
        drain = getattr(known(), "drain", None)
        if drain is not None:
            drain()

    atexit.register(close)
    under_mod_wsgi = sys.modules.get("mod_wsgi")  # the server makes it; one that was installed lacks the function
    subscribe = getattr(under_mod_wsgi, "subscribe_shutdown", None)
    if subscribe is not None:
        subscribe(drain)
    return pool


class ScopeMiddleware:
    """A WSGI application around another one, that opens a scope for each request.

    In the application, and while its response is iterated over, `scope.get()` is the item of the request: the same one
    in every function, taken at its first use. It is returned when the server closes the response, which it does also
    when the client has gone away; or at once if the application raises, or returns a list or a file
    (`wsgi.file_wrapper`).

    What is uncommitted then is rolled back, with a warning unless the application raised. By that time the client has
    its answer, so a commit must come before: `with conn:`, or `conn.commit()`.

    Args:
        application: the WSGI application.
        scope: whose scopes are opened.
        environ_key: a key under which the item itself stands in `environ`, for applications that look there. It is
            taken when the request begins then, needed or not. None: the item is had by `scope.get()` alone.

    Example::

        application = ScopeMiddleware(application, scope, environ_key="app.database")
    """

    def __init__(self, application: WSGIApplication, scope: Scope[Any], *, environ_key: str | None = None) -> None:
        if not callable(application):
            raise TypeError(f"application must be a WSGI application, not {application!r}")
        if not isinstance(scope, Scope):
            raise TypeError(f"scope must be a Scope, such as Scope(pool), not {scope!r}")
        if environ_key is not None and not isinstance(environ_key, str):
            raise TypeError(f"environ_key must be a string or None, not {environ_key!r}")
        self._application = application
        self._scope = scope
        self._environ_key = environ_key

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        current = self._scope._current
        request = OpenScope(self._scope, sys._getframe())
        token = current.set(request)
        try:
            if self._environ_key is not None:
                environ[self._environ_key] = request.get()
            response = self._application(environ, start_response)
            # In these cases nobody needs the item any more.
            if type(response) in (list, tuple) or _is_complete(response) or _is_file(response, environ):
                request.is_closed = True
                if request._lease is not None:
                    request._end(None)
                return response
            return _Response(response, request)
        except BaseException:
            request.close(failed=True)
            raise
        finally:
            current.reset(token)

    def __repr__(self) -> str:
        return f"<ScopeMiddleware around {self._application!r}, {self._scope!r}>"


class _Response:
    """What an application returned, each step of it taken in the scope of its request."""

    def __init__(self, response: Iterable[bytes], request: OpenScope[Any]) -> None:
        self._response = response
        self._request = request
        self._chunks: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        self._chunks = self._request.run(iter, self._response)
        return self

    def __next__(self) -> bytes:
        assert self._chunks is not None
        return self._request.run(next, self._chunks)

    def close(self) -> None:
        try:
            close = getattr(self._response, "close", None)
            if close is not None:
                self._request.run(close)
        finally:
            self._request.close()


def _is_complete(response: object) -> bool:
    """Tell whether a response is of a kind of list that does nothing by itself while it is read or closed."""
    if not isinstance(response, (list, tuple)) or hasattr(response, "close"):
        return False
    return type(response).__iter__ in (list.__iter__, tuple.__iter__)


def _is_file(response: object, environ: WSGIEnvironment) -> bool:
    """Tell whether the server sends a file by itself. It looks at the type to know, so this must not be wrapped."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(response, wrapper)
