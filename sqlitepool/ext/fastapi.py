"""FastAPI: a connection for each request that asks for one, as a dependency.

    from sqlitepool.ext.fastapi import PoolDependency

    db = PoolDependency(lambda: ConnectionPool("app.db", wrap=UserDatabase))
    app = FastAPI(lifespan=db.lifespan)
    Users = Annotated[UserDatabase, Depends(db)]

    @app.get("/{name}")
    def show(name: str, users: Users):
        return users.profile(name)

A request waits for its connection in the event loop, and on no thread. Were it to wait on one, a bounded pool could
come to a standstill: the server has a limited number of threads (40), and when all of them wait for a connection, those
who have one find no thread to run on and to give it back.

This is for endpoints that are plain functions, which FastAPI runs on threads. In one that is `async` a query would stop
the event loop. What runs queries for those does not belong here, but into a layer of its own.
"""

# No `from __future__ import annotations`: FastAPI reads those of `__call__`.

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, Generic, TypeVar, cast, overload

from anyio import CancelScope, CapacityLimiter, WouldBlock, move_on_after, to_thread
from anyio.lowlevel import RunVar
from starlette.requests import HTTPConnection

from sqlitepool.connection_pool import ConnectionPool
from sqlitepool.database import Database
from sqlitepool.errors import PoolFull, PoolTimeout
from sqlitepool.pool import Pool, logger
from sqlitepool.scope import OpenScope, Scope
from sqlitepool.tracking import Connection

S = TypeVar("S")
T = TypeVar("T")
U = TypeVar("U")

# How long the end of the application waits for requests that still have a connection (seconds).
_PATIENCE_AT_END = 3.0
# How many of the longest holders a `PoolTimeout` names.
_HOLDERS_NAMED = 3


class PoolDependency(Generic[S, T]):
    """A pool or `Database` that lives as long as an application, and a dependency that lends from it.

        db = PoolDependency(lambda: ConnectionPool("app.db"))
        app = FastAPI(lifespan=db.lifespan)

        @app.post("/{page}")
        def visit(page: str, conn: Annotated[Connection, Depends(db)]):
            with conn:      # committed at the end of the block, before the answer
                conn.execute("INSERT INTO visit (page) VALUES (?)", (page,))

    A request has the same connection in all its dependencies and in its endpoint; it goes back when the response has
    been sent and background tasks have run, or, with `Depends(db, scope="function")`, before the response is sent. What
    is not committed then is rolled back, with a warning unless the request failed.

    Args:
        open: called when the application starts, to open a `ConnectionPool`, a `Pool` or a `Database`. Of a `Database`
            a request gets a connection that reads; `db.pool.write()` writes.
    """

    @overload
    def __init__(self: "PoolDependency[Database, Connection]", open: Callable[[], Database]) -> None: ...
    @overload
    def __init__(self: "PoolDependency[ConnectionPool[U], U]", open: Callable[[], ConnectionPool[U]]) -> None: ...
    @overload
    def __init__(self: "PoolDependency[Pool[U], U]", open: Callable[[], Pool[U]]) -> None: ...
    def __init__(self, open: Callable[[], Any]) -> None:
        if not callable(open):
            raise TypeError(f"open must be callable, such as `lambda: ConnectionPool(path)`, not {open!r}")
        self._open = open
        self._opened: _Opened | None = None

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Open the pool for the time that the application runs: `FastAPI(lifespan=db.lifespan)`.

        In a lifespan of your own it is `async with db.lifespan(app):`.

        Raises:
            RuntimeError: it is open already, for another application.
            Exception: whatever `open` raised.
        """
        if self._opened is not None:
            raise RuntimeError(
                "this pool is open: an application that runs beside another one needs a PoolDependency of its own"
            )
        self._opened = opened = _Opened(await to_thread.run_sync(self._open))
        try:
            yield
        finally:
            self._opened = None
            with CancelScope(shield=True):
                await to_thread.run_sync(opened.close)

    @property
    def pool(self) -> S:
        """What `open` returned, while the application runs.

        Raises:
            RuntimeError: it is not running.
        """
        return cast(S, self._running().source)

    async def __call__(self, connection: HTTPConnection) -> AsyncIterator[T]:
        """Lend a connection to a request. Called by FastAPI.

        Raises:
            PoolTimeout: no connection came free in time.
            PoolFull: `max_waiting` requests wait already.
            PoolClosed, Exception: as `Pool.connection`.
        """
        opened = self._running()
        place = _place(connection)
        request: OpenScope[T] = OpenScope(opened.scope, place)
        turns = opened.turns()
        timeout = opened.pool._limits.timeout
        began = monotonic()
        has_turn = has_failed = False
        waited = 0.0
        try:
            try:
                turns.acquire_on_behalf_of_nowait(request)
                has_turn = True
            except WouldBlock:
                pass
            if not has_turn:
                with opened.in_line(request), move_on_after(timeout):
                    await turns.acquire_on_behalf_of(request)
                    has_turn = True
                waited = monotonic() - began
                if not has_turn:
                    raise await _on_a_thread(opened.timed_out, waited)
            item = await _on_a_thread(opened.lend, request, place, waited)
            yield item
        except BaseException:
            has_failed = True
            raise
        finally:
            with CancelScope(shield=True):
                await _on_a_thread(partial(request.close, failed=has_failed))
            if has_turn:
                turns.release_on_behalf_of(request)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection. (`pool.stats().waiting` counts threads, and no request.)

        Raises:
            RuntimeError: the application is not running.
        """
        return len(self._running().line)

    def __repr__(self) -> str:
        opened = self._opened
        return f"<PoolDependency, {'not open' if opened is None else f'open: {opened.source!r}'}>"

    def _running(self) -> "_Opened":
        opened = self._opened
        if opened is None:
            raise RuntimeError(
                "the pool is not open: pass lifespan=db.lifespan to the application. A mounted application has no "
                "lifespan of its own: pass it to the outer one. A TestClient runs it in a `with` block"
            )
        return opened


class _Opened:
    """What there is while the application runs.

    Attributes:
        line: the requests that wait for their turn.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.scope: Scope[Any] = Scope(source)
        self.pool: Pool[Any] = self.scope._pool
        self.line: set[OpenScope[Any]] = set()
        self._turns: RunVar[CapacityLimiter] = RunVar("sqlitepool.turns")

    def turns(self) -> CapacityLimiter:
        """Who may ask the pool, in this event loop: as many as find a connection there."""
        most = self.pool._max_size
        turns = self._turns.get(None)
        if turns is None:
            turns = CapacityLimiter(most)
            self._turns.set(turns)
        elif turns.total_tokens != most:
            turns.total_tokens = most
        return turns

    @contextmanager
    def in_line(self, request: OpenScope[Any]) -> Iterator[None]:
        """Count a request as one that waits."""
        limits = self.pool._limits
        if limits.max_waiting is not None and len(self.line) >= limits.max_waiting and limits.timeout != 0:
            raise PoolFull(f"{self._state()}: as many requests wait already as max_waiting allows")
        self.line.add(request)
        try:
            yield
        finally:
            self.line.discard(request)

    def lend(self, request: OpenScope[T], place: FrameType, waited: float) -> T:
        """Take a connection for a request that has waited so long (seconds) for its turn."""
        timeout = self.pool._limits.timeout
        if not waited:
            return request._get(timeout, place)
        try:
            item = request._get(None if timeout is None else max(0.0, timeout - waited), place)
        except PoolTimeout as error:
            raise PoolTimeout(f"{error}. Before that, the request had waited {waited:.3f} s for others") from None
        with self.pool._lock:
            self.pool._counts.count_wait(waited)
        return item

    def timed_out(self, waited: float) -> PoolTimeout:
        """Return the error for a request whose turn did not come in so many seconds."""
        with self.pool._lock:
            self.pool._counts.timeouts += 1
        holders = "; ".join(map(str, self.pool.leases()[:_HOLDERS_NAMED])) or "nobody at this moment"
        return PoolTimeout(f"{self._state()}: nothing came free in {waited:.3f} s. Held longest by: {holders}")

    def _state(self) -> str:
        most, waiting = self.pool._max_size, len(self.line)
        return f"pool {self.pool.name!r} (at most {most} in use at once, {waiting} other requests waiting)"

    def close(self) -> None:
        for lease in self.source.close(_PATIENCE_AT_END):
            logger.warning("the application ends while %r has an item lent: %s", self.pool.name, lease)


async def _on_a_thread(function: Callable[..., T], *args: object) -> T:
    """Run a function that may block. Whoever has a turn need not wait for a thread."""
    return await to_thread.run_sync(function, *args, limiter=CapacityLimiter(1))


class _Place:
    """Stands for the frame of an endpoint that is not running yet: errors say which one has the connection."""

    def __init__(self, endpoint: Any) -> None:
        self.f_code = endpoint.__code__
        self.f_lasti = 0


def _place(connection: HTTPConnection) -> FrameType:
    try:
        return cast(FrameType, _Place(connection.scope["endpoint"]))
    except (KeyError, AttributeError):  # no plain function, or none that Starlette knows of
        return sys._getframe(1)
