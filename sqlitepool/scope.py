"""`Scope`: one item per request or thread, taken at its first use and kept until the scope ends.

Which scope is open here and now is a context variable. What is open is an object of its own, an `OpenScope`, because a
web request may begin on one thread, run on a second and end on a third, where no variable of the first is seen.

What is bound to a thread is in its local storage, and returned by the finalizer of the scope. Finalizers may run
anywhere, in the middle of anything; but one with no Python frame below it runs because the thread is ending, which is
never inside of a critical section. Any other leaves the item to the pool, which finds it lost.
"""

from __future__ import annotations

import sys
import threading
import warnings
from _thread import RLock
from collections.abc import Callable
from contextvars import ContextVar
from types import EllipsisType, FrameType, TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

from sqlitepool import fork
from sqlitepool.database import Database
from sqlitepool.errors import PoolClosed
from sqlitepool.fork import same_process
from sqlitepool.lease import Lease, note_place, place
from sqlitepool.pool import Pool
from sqlitepool.tracking import Connection

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
_new = object.__new__


class _ScopedLease(Lease[T]):
    """A loan that ends with a scope, and not with a block."""

    __slots__ = ()

    @property
    def is_out(self) -> bool:
        """Tell whether the item is on this loan still: not discarded, and not left to the parent of this process."""
        slot = self._slot
        try:
            return slot is not None and slot.loan[0] is self._loan
        except IndexError:
            return False


class OpenScope(Generic[T]):
    """One scope that is open: that of one request, say. Made by `Scope.open`, to be used and closed on any thread.

        request = scope.open()
        try:
            answer = request.run(handle, ...)    # scope.get() in there is this scope's item
        finally:
            request.close()

    Attributes:
        is_closed: it has ended.
    """

    __slots__ = (
        "__weakref__", "_code", "_frame", "_instruction", "_is_of_thread", "_item", "_lease", "_lock", "_outer",
        "_scope", "is_closed",
    )  # fmt: skip

    def __init__(
        self, scope: Scope[T], frame: FrameType, outer: OpenScope[T] | None = None, is_of_thread: bool = False
    ) -> None:
        self.is_closed = False
        self._is_of_thread = is_of_thread
        self._scope = scope
        self._outer = outer
        self._code, self._instruction, self._frame = frame.f_code, frame.f_lasti, id(frame)
        self._lock = RLock()
        self._lease: _ScopedLease[T] | None = None
        self._item: T | None = None  # while a scope refers to it, nobody takes it for lost

    @property
    def where(self) -> str:
        """The line of code that opened it: `file:line in function`."""
        return place(self._code, self._instruction)

    def get(self, timeout: float | EllipsisType | None = ...) -> T:
        """Return the scope's item: the same one each time. Taken from the pool at the first call.

        One that was discarded meanwhile is replaced by another, and so is that of the parent in a forked child.

        Args:
            timeout: seconds to wait for an item, instead of the pool's own (`...`, the default); None: for ever; 0: try
                once.

        Raises:
            PoolClosed: the scope has ended, or the pool is closed.
            PoolTimeout, PoolFull, Exception: as `Pool.connection`.
        """
        return self._get(timeout, sys._getframe(1))

    def _get(self, timeout: float | EllipsisType | None, frame: FrameType) -> T:
        if not same_process[0]:
            fork.start_anew()
        lease, item = self._lease, self._item
        if lease is not None and item is not None and lease.is_out:
            return item
        with self._lock:
            lease, item = self._lease, self._item
            if lease is not None and item is not None and lease.is_out:
                return item
            if self.is_closed:
                raise PoolClosed(
                    f"the scope opened at {self.where} has ended: what outlives a request opens a scope of its own"
                )
            lease = _new(_ScopedLease)  # as in `Pool.connection`
            lease._pool = self._scope._pool
            lease._timeout = timeout
            lease._slot = None
            self._lease = lease
            item = lease.__enter__()
            slot = lease._slot
            assert slot is not None
            note_place(slot, frame)
            slot.frame = 0  # it ends with the scope, and not with this frame
            self._item = item
            return item

    def release(self) -> None:
        """Return the item before the scope ends; the next `get` takes one anew. What is uncommitted is rolled back."""
        self._end(None)

    def close(self, *, failed: bool = False) -> None:
        """End the scope, and return its item. May be called again, and on any thread.

        Args:
            failed: what was done in the scope has failed. What is uncommitted is rolled back in any case, but with a
                warning where it had not.
        """
        self.is_closed = True
        self._end(False if failed else None)

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return `function(*args, **kwargs)`, called with this as the scope that is open."""
        current = self._scope._current
        token = current.set(self)
        try:
            return function(*args, **kwargs)
        finally:
            current.reset(token)

    def _end(self, commit: bool | None) -> None:
        with self._lock:
            lease, self._lease = self._lease, None
            self._item = None
        if lease is not None and lease.is_out:
            slot, lease._slot = lease._slot, None
            lease._pool._return(slot, lease._loan, commit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_closed = True
        self._end(kind is None)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return f"<OpenScope of {self._scope._source!r}, {state}, opened at {self.where}>"

    def __del__(self) -> None:
        if getattr(self, "is_closed", True) or sys.is_finalizing():
            return
        try:
            if not self._is_of_thread:
                message = f"a scope of {self._scope._source.name!r}, opened at {self.where}, was never closed"
                warnings.warn(message, ResourceWarning, stacklevel=1, source=self)
        finally:
            if sys._getframe().f_back is None:
                self.close()


class Scope(Generic[T]):
    """Gives each request, or each thread, an item of its own: the same one all along, returned at the end.

        db = Scope(ConnectionPool("app.db"))

        with db:                # a request, a job, a command
            conn = db.get()     # taken here
            ...                 # db.get() is the same connection, in whatever function is called
        # returned here: committed if the block succeeded, rolled back if it raised

    Think of a cloakroom ticket: whoever shows it gets the same coat, and at the end of the evening the hook is free.

    A scope inside of another one has an item of its own, and at its end the outer one is current again. Where none is
    open, the item is bound to the thread, and returned when the thread ends or by `release()`; what is uncommitted
    then is rolled back, so commit it yourself (`with conn:`). Under asyncio, open a scope for each task: what is bound
    to a thread would be shared by all of them.

    A generator that is suspended in a `with db:` block has left the scope open for whoever goes on. `@contextmanager`
    makes use of that; any other generator takes `open()`.

    For frameworks, whose requests do not always end on the thread on which they began, there is `open()`.

    Args:
        pool: a `Pool`, a `ConnectionPool`, or a `Database`. Of a `Database` the scope holds a connection that reads.
            Outside of a transaction each statement sees the latest commit; to write there are `db.write()` and the
            like, as always.

    Raises:
        TypeError: `pool` is none of these.
    """

    @overload
    def __init__(self: Scope[Connection], pool: Database) -> None: ...
    @overload
    def __init__(self, pool: Pool[T]) -> None: ...
    def __init__(self, pool: Pool[Any] | Database) -> None:
        if not isinstance(pool, (Pool, Database)):
            raise TypeError(f"a scope is made over a Pool, a ConnectionPool or a Database, not {pool!r}")
        self._source = pool
        self._current: ContextVar[OpenScope[T] | None] = ContextVar("sqlitepool.scope", default=None)
        self._threads = threading.local()

    @property
    def _pool(self) -> Pool[Any]:
        source = self._source
        if isinstance(source, Pool):
            return source
        source._check_open()
        return source._readers

    def get(self, timeout: float | EllipsisType | None = ...) -> T:
        """Return the item of the scope that is open here, or of the thread. See `OpenScope.get`."""
        frame = sys._getframe(1)
        return (self._current.get() or self._of_thread(frame))._get(timeout, frame)

    def release(self) -> None:
        """Return the item that `get` returned here, before the scope or the thread ends. See `OpenScope.release`."""
        opened = self._current.get() or self._threads.__dict__.get("opened")
        if opened is not None:
            opened.release()

    def open(self) -> OpenScope[T]:
        """Open a scope that is current nowhere but in its own `run`, to be closed by `close()` or a `with` block."""
        return OpenScope(self, sys._getframe(1))

    def _of_thread(self, frame: FrameType) -> OpenScope[T]:
        known: dict[str, OpenScope[T]] = self._threads.__dict__
        return known.get("opened") or known.setdefault("opened", OpenScope(self, frame, is_of_thread=True))

    def __enter__(self) -> Self:
        self._current.set(OpenScope(self, sys._getframe(1), self._current.get()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        opened = self._take_off(sys._getframe(1))
        opened.__exit__(kind, error, traceback)

    def _take_off(self, frame: FrameType) -> OpenScope[T]:
        """Take the scope that `frame` opened out of those that are open here. It need not be the innermost.

        A generator that is suspended in its block leaves its scope open in whoever runs on.
        """
        innermost = opened = self._current.get()
        if innermost is None:
            raise RuntimeError(f"{self!r} is not open here: a block must end in the context in which it began")
        inner: OpenScope[T] | None = None
        while opened is not None and opened._frame != id(frame):
            inner, opened = opened, opened._outer
        if opened is None:  # not entered by a `with` statement, but by an `ExitStack`, say
            inner, opened = None, innermost
        if inner is None:
            self._current.set(opened._outer)
        else:
            inner._outer = opened._outer
        return opened

    def __repr__(self) -> str:
        return f"<Scope of {self._source!r}>"
