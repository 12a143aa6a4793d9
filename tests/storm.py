"""A harness that interrupts a pool anywhere: what the tests of interruptions share."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from pool_support import PATIENCE, start

from sqlitepool import Pool

PACKAGE = str(Path(Pool.connection.__code__.co_filename).parent)
AnyPool = Pool[Any]


class Interruption(BaseException):
    """What a signal handler may raise."""


class Item:
    closed = False

    def close(self) -> None:
        self.closed = True


class Factory:
    """Makes items, and knows which of them nobody has closed or dropped."""

    def __init__(self) -> None:
        self.made: weakref.WeakSet[Item] = weakref.WeakSet()
        self.most = 0

    def __call__(self) -> Item:
        item = Item()
        self.made.add(item)
        self.most = max(self.most, self.open)
        return item

    @property
    def open(self) -> int:
        return sum(not item.closed for item in self.made)


def at_opcode(number: int, action: Callable[[], object], run: Callable[[], object], file: str = PACKAGE) -> int:
    """Call `run` on a new thread, and `action` before the opcode of that number that it runs below `file`.

    Return how many there were. A new thread, because an exception between two opcodes can leave a thread of CPython
    with a stale `sys.exc_info()`; nothing but a trace function can raise there.
    """
    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(file):
            return None
        if event == "call":
            frame.f_trace, frame.f_trace_lines, frame.f_trace_opcodes = trace, False, True
        if event == "opcode":
            seen += 1
            if seen == number:
                action()
        return trace

    def traced() -> None:
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at this when tracing begins
        sys.settrace(trace)
        try:
            run()
        except Interruption:
            pass
        finally:
            sys.settrace(None)

    gc.disable()  # the finalizers of what other tests left are not to be interrupted
    try:
        start(traced).result(PATIENCE)
    finally:
        gc.enable()
    return seen


def count_up(step: int = 1) -> Iterator[int]:
    """0, 0, 1, 1 + step, ...: number 0 never comes; Python 3.13 traces opcodes from the second call of a function on.

    Set EVERY_OPCODE in the environment to have every step be 1: that takes minutes.
    """
    yield 0
    yield 0
    yield from itertools.count(1, 1 if "EVERY_OPCODE" in os.environ else step)


def interrupt() -> None:
    raise Interruption


def lock_is_free(pool: AnyPool) -> bool:
    def take() -> bool:
        taken = pool._lock.acquire(timeout=PATIENCE / 2)
        if taken:
            pool._lock.release()
        return taken

    return start(take).result(PATIENCE)


def assert_sound(pool: AnyPool, max_size: int) -> None:
    """The lock is free, every item is accounted for, and all of them can be borrowed at once by new threads."""
    assert lock_is_free(pool)
    stats = pool.stats()
    assert (stats.idle + stats.in_use + stats.opening, stats.in_use, stats.opening) == (stats.size, 0, 0), stats
    assert stats.size <= max_size, stats
    assert stats.waiting == 0
    all_out = threading.Barrier(max_size)

    def borrow() -> object:
        with pool.connection(timeout=PATIENCE / 2) as item:
            assert item is not None
            assert not getattr(item, "closed", False), "a closed item was lent"
            all_out.wait(PATIENCE)
            return item

    items = [future.result(PATIENCE) for future in [start(borrow) for _ in range(max_size)]]
    assert len(set(map(id, items))) == max_size, "an item was lent twice at the same time"
    assert pool.stats().waiting == 0
