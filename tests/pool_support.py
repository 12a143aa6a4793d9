"""What the tests of the pool share: items that count themselves, a clock that stands still, threads with a result."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sqlitepool.connection import Connection

R = TypeVar("R")

#: Opens a connection; the arguments are those of the fixture `opened`.
Open = Callable[..., Connection]

#: Longer than anything here takes, so that a test that would hang fails instead.
PATIENCE = 20.0


class Item:
    """An item that knows what was done to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rollbacks = 0
        self.closed = False

    def rollback(self) -> None:
        self.rollbacks += 1

    def close(self) -> None:
        assert not self.closed, f"{self!r} was closed twice"
        self.closed = True

    def __repr__(self) -> str:
        return f"item {self.number}"


class Factory:
    """Makes items and counts by itself how many are alive: from before one is opened until after it is closed."""

    def __init__(self, before_open: Callable[[int], object] | None = None) -> None:
        self._lock = threading.Lock()
        self._before_open = before_open
        self.calls = self.alive = self.most = 0
        self.made: list[Item] = []

    def __call__(self) -> Item:
        with self._lock:
            self.calls += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            number = self.calls
        try:
            if self._before_open is not None:
                self._before_open(number)
        except BaseException:
            with self._lock:
                self.alive -= 1
            raise
        item = Item(number)
        self.made.append(item)
        return item

    def close(self, item: Item) -> None:
        item.close()
        with self._lock:
            self.alive -= 1


class Clock:
    """Stands in for `time.monotonic` in the pool's modules. Stands still unless told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in ("pool", "lending", "books", "lease", "watched_pool"):
            monkeypatch.setattr(f"sqlitepool.{module}.monotonic", self)

    def __call__(self) -> float:
        return self.now


def start(call: Callable[..., R], *args: Any, name: str | None = None) -> Future[R]:
    """Run `call(*args)` on a thread of its own; `.result(PATIENCE)` of what is returned gives its result or error."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def least(measure: Callable[[], float], enough: float) -> float:
    """Return the least of what `measure()` tells (seconds) in five tries, or the first that is less than `enough`.

    Other programs can make anything last longer, so a time is of the code only if it is the least of several.
    """
    found = measure()
    for _ in range(4):
        if found < enough:
            break
        found = min(found, measure())
    return found


def hold(pool: Any, got: threading.Event, go: threading.Event, **options: Any) -> None:
    """Borrow an item in a `with` block and keep it until `go`."""
    with pool.connection(**options):
        got.set()
        assert go.wait(PATIENCE)


@contextmanager
def held(pool: Any, count: int = 1) -> Iterator[threading.Event]:
    """Have other threads hold `count` items during the block, or until the event is set."""
    go = threading.Event()
    holders = []
    for number in range(count):
        got = threading.Event()
        holders.append(start(hold, pool, got, go, name=f"holder-{number}"))
        assert got.wait(PATIENCE)
    try:
        yield go
    finally:
        go.set()
        for holder in holders:
            holder.result(PATIENCE)


def open_files(folder: Path) -> list[str]:
    """The files below `folder` that this process has open."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        if name.startswith(str(folder)):
            names.append(os.path.basename(name))
    return sorted(names)


def rows(conn: sqlite3.Connection, sql: str, *parameters: object) -> list[Any]:
    return conn.execute(sql, parameters).fetchall()
