"""The work of one caller in a group commit, and its future if nobody waits for it on the spot."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any

from sqlitepool.limits import NEVER

#: What a function returns that has not begun to run.
NOT_BEGUN = frozenset((AsyncGeneratorType, CoroutineType, GeneratorType))


class Job:
    """One function to be run in a group commit.

    Attributes:
        timeout: how long, in seconds, it may wait for its beginning, since `since`; None for ever.
        is_atomic: it does all it does, or nothing, by itself: it needs no savepoint.
        future: for a job that was submitted; no thread waits for it.
        wake: the lock that its thread sleeps on, held until there is something to see.
        is_done: `result` or `error` is what came of it.
        alone: it gets a transaction of its own.
        at_home: only its own thread runs it, because it ended another's call.
        expires: if it was submitted and not begun until this monotonic time, it is not begun any more.
        ended_all: it has ended the transaction, past `Database`: nobody knows whether the others are committed.
    """

    future: WriteFuture | None = None
    wake: threading.Lock | None = None
    frame: FrameType | None = None
    is_done = False
    alone = False
    at_home = False
    expires = NEVER
    ended_all = False
    result: Any = None
    error: BaseException | None = None

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float | None, is_atomic: bool = False
    ) -> None:
        if not callable(function):
            raise TypeError(f"a write is a function that takes the connection, not {function!r}")
        self.function = function
        self.args = args
        self.timeout = timeout
        self.since = monotonic()
        self.is_atomic = is_atomic

    @property
    def deadline(self) -> float | None:
        """Until when it has to be begun, None for ever."""
        return None if self.timeout is None else self.since + self.timeout

    def ring(self) -> None:
        """Wake its thread, if it sleeps or is about to."""
        wake = self.wake
        if wake is not None and wake.locked():
            try:
                wake.release()
            except RuntimeError:  # somebody else has done so
                pass

    def outcome(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        error, self.error = self.error, None
        if error is None:
            return self.result
        try:
            raise error
        finally:
            del error


def not_run(function: Callable[..., Any], result: Any) -> TypeError:
    """Make the error for a function whose result is one of `NOT_BEGUN`."""
    if not isinstance(result, AsyncGeneratorType):
        result.close()  # a coroutine that is never awaited warns of it
    return TypeError(
        f"{function!r} returned a generator or coroutine, and nothing of that has run: a write is a plain function, "
        "which returns rows or numbers"
    )


def call(function: Callable[..., Any], conn: sqlite3.Connection, args: tuple[Any, ...]) -> Any:
    """Call a function that is a part of a write block, and return what it returns."""
    result = function(conn, *args)
    if type(result) in NOT_BEGUN:
        raise not_run(function, result)
    return result


class WriteFuture(Future[Any]):
    """The future of a submitted job. `cancel()` succeeds until the job is begun."""

    def __init__(self, take_back: Callable[[], bool]) -> None:
        super().__init__()
        self._take_back: Callable[[], bool] | None = take_back

    def cancel(self) -> bool:
        """Take the job out of the queue, if it has not been begun; tell whether it is cancelled."""
        take_back = self._take_back
        if take_back is not None and not take_back():
            return self.cancelled()
        if super().cancel():
            self.set_running_or_notify_cancel()
        return self.cancelled()
