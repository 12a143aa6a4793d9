"""Promise 8: in a forked child a pool is empty and usable; what was inherited is left alone for ever."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, eventually, held, start

from sqlitepool import ConnectionPool, Pool, PoolClosed

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()"),
    # What we test is what this warning, of Python 3.12, is about.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


class Reporter:
    """An item that writes to a pipe what is done to it, in whatever process that happens."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.home = os.getpid()

    def _report(self, what: str) -> None:
        whose = "own" if os.getpid() == self.home else "INHERITED"
        os.write(self.pipe, f"{whose} {what}\n".encode())

    def rollback(self) -> None:
        self._report("reset")

    def close(self) -> None:
        self._report("close")

    def __del__(self) -> None:
        self._report("del")


class Reports:
    """A pipe of reports, and a pool whose items write to it."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)

    def pool(self, **options: Any) -> Pool[Reporter]:
        return Pool(lambda: Reporter(self.writing), **{"max_size": 3, "timeout": PATIENCE, **options})

    def read(self) -> list[str]:
        try:
            return os.read(self.reading, 100_000).decode().split("\n")[:-1]
        except BlockingIOError:
            return []

    @property
    def inherited(self) -> list[str]:
        return [line for line in self.read() if line.startswith("INHERITED")]


@pytest.fixture
def reports() -> Iterator[Reports]:
    made = Reports()
    yield made
    gc.collect()
    os.close(made.reading)  # the other end stays open: items may still be finalized
    del made


def in_child(work: Callable[[], object], fork: Callable[[], int] = os.fork) -> None:
    """Run `work` in a forked child, and fail if it failed."""
    pid = fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(20)
            work()
            gc.collect()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    _, result = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(result) == 0


def borrow_all(pool: Pool[Any], count: int = 3) -> list[int]:
    """Borrow `count` items at once and return them; tell their `id`s."""
    items = [pool.acquire(timeout=1) for _ in range(count)]
    ids = [id(item) for item in items]
    for item in items:
        pool.release(item)
    return ids


def test_in_a_child_the_pool_is_empty_and_usable_at_once(reports: Reports) -> None:
    pool = reports.pool()
    borrow_all(pool)

    def work() -> None:
        stats = pool.stats()
        assert (stats.size, stats.idle, stats.in_use, stats.opened, stats.checkouts) == (0, 0, 0, 0, 0)
        with pool.connection() as item:
            assert item.home == os.getpid()
        borrow_all(pool)
        assert pool.close() == []

    in_child(work)
    assert reports.inherited == []
    assert pool.stats().idle == 3
    pool.close()


@pytest.mark.parametrize("fairness", [0, 0.005])
def test_a_fork_in_the_thick_of_it(reports: Reports, fairness: float) -> None:
    """While other threads hold items, wait, and are inside the factory."""
    opening, go = threading.Event(), threading.Event()
    home = os.getpid()

    def factory() -> Reporter:
        if os.getpid() == home and threading.current_thread().name == "opener":
            opening.set()
            assert go.wait(PATIENCE)
        return Reporter(reports.writing)

    pool = Pool(factory, max_size=3, timeout=PATIENCE, fairness=fairness)
    with held(pool, 2):
        opener = start(lambda: pool.release(pool.acquire()), name="opener")
        assert opening.wait(PATIENCE)
        waiters = [start(lambda: pool.release(pool.acquire())) for _ in range(3)]
        eventually(lambda: pool.stats().waiting == 3)
        for _ in range(3):
            in_child(lambda: borrow_all(pool))
        go.set()
        for waiter in [opener, *waiters]:
            waiter.result(PATIENCE)
    assert reports.inherited == []
    pool.close()


def test_forks_while_others_borrow_as_fast_as_they_can(reports: Reports) -> None:
    """The lock may be held, and every list half way through a change, at the moment of the fork."""
    pool = reports.pool(max_size=2)
    stop, finished = threading.Event(), threading.Event()

    def borrow() -> None:
        while not stop.is_set():
            with pool.connection() as item:
                del item

    def read() -> None:
        while not finished.wait(0.01):  # as long as anybody writes: a full pipe would hold them up
            inherited.extend(reports.inherited)

    inherited: list[str] = []
    reader = start(read)
    borrowers = [start(borrow) for _ in range(4)]
    try:
        for _ in range(20):
            in_child(lambda: borrow_all(pool, 2))
    finally:
        stop.set()
    for borrower in borrowers:
        borrower.result(PATIENCE)
    finished.set()
    reader.result(PATIENCE)
    assert inherited == []
    pool.close()


def test_what_was_entered_in_the_parent_may_be_left_in_the_child(reports: Reports) -> None:
    pool = reports.pool()
    for leave in ("block", "release", "discard"):
        item = pool.acquire()
        lease = pool.connection()
        lease.__enter__()

        def work(item: Reporter = item, lease: Any = lease, leave: str = leave) -> None:
            if leave == "block":
                lease.__exit__(None, None, None)
            elif leave == "release":
                pool.release(item)
            else:
                pool.discard(item)
            del item, lease
            borrow_all(pool)

        in_child(work)
        lease.__exit__(None, None, None)
        pool.release(item)
    assert reports.inherited == []
    pool.close()


def test_a_child_may_close_drain_and_resize_and_a_closed_pool_stays_closed(reports: Reports) -> None:
    pool = reports.pool()
    borrow_all(pool)
    for change in (pool.close, pool.drain, lambda: pool.resize(1)):
        in_child(change)
    pool.close()
    assert reports.inherited == []

    def work() -> None:
        with pytest.raises(PoolClosed):
            pool.acquire()

    in_child(work)


def test_a_grandchild_starts_anew_as_well(reports: Reports) -> None:
    pool = reports.pool()
    borrow_all(pool)

    def child() -> None:
        ids = borrow_all(pool)
        in_child(lambda: borrow_all(pool))
        in_child(lambda: borrow_all(pool), fork=ctypes.PyDLL(None).fork)
        assert set(borrow_all(pool)) == set(ids)

    in_child(child)
    in_child(child, fork=ctypes.PyDLL(None).fork)
    assert reports.inherited == []
    pool.close()


ACTIONS: dict[str, Callable[[Pool[Any], Any], object]] = {
    "borrow": lambda pool, lease: borrow_all(pool),
    "leave": lambda pool, lease: lease.__exit__(None, None, None),
    "close": lambda pool, lease: pool.close(),
    "drain": lambda pool, lease: pool.drain(),
    "resize": lambda pool, lease: pool.resize(1),
    "stats": lambda pool, lease: pool.stats(),
    "leases": lambda pool, lease: pool.leases(),
}


@pytest.mark.parametrize("first", ACTIONS.values(), ids=ACTIONS.keys())
def test_a_fork_that_python_does_not_know_of_is_noticed(reports: Reports, first: Callable[..., object]) -> None:
    """As a server that embeds Python does it. The lock is held by another thread at that moment."""
    pool = reports.pool()
    lease = pool.connection()
    lease.__enter__()
    go, taken = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with pool._lock:
            taken.set()
            assert go.wait(PATIENCE)

    def work() -> None:
        first(pool, lease)
        if not pool._closed:
            borrow_all(pool, pool.stats().max_size)
        assert all(slot.item.home == os.getpid() for slot in pool._slots)

    holder = start(hold_the_lock)
    assert taken.wait(PATIENCE)
    in_child(work, fork=ctypes.PyDLL(None).fork)
    go.set()
    holder.result(PATIENCE)
    lease.__exit__(None, None, None)
    assert reports.inherited == []
    pool.close()


PARENT = """
import os, sqlite3, sys, threading
sys.path[:0] = {path!r}
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
from sqlitepool import ConnectionPool

class Database:
    def __init__(self, conn):
        self.conn = conn

pool = ConnectionPool({database!r}, max_size=3, **{options})
with pool.connection() as item:
    getattr(item, "conn", item).execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)")
items = [pool.acquire() for _ in range(3)]
if "pragmas" not in {options}:  # a reader keeps a writer waiting, but not in WAL mode
    half_read = getattr(items[2], "conn", items[2]).execute("SELECT * FROM sqlite_master")
pool.release(items.pop(0))
children = []
with pool.connection() as item:
    conn = getattr(item, "conn", item)
    for number in range(3000):
        conn.execute("INSERT INTO t VALUES (?, ?)", (number, "row %d" % number))
        if number % 500 == 100:
            pid = os.fork()
            if pid == 0:
                sys.exit(0)  # finalizers, atexit and all, out of the midst of a transaction
            os.waitpid(pid, 0)
        if number % 50 == 0:
            conn.commit()
"""


@pytest.mark.parametrize("options", ["{}", "{'wrap': Database}", "{'pragmas': {'journal_mode': 'DELETE'}}"])
def test_children_that_exit_while_the_parent_writes_change_nothing(options: str, tmp_path: Path) -> None:
    """What happens without: 9 of 3,000 rows changed, and `integrity_check` said ok."""
    database = str(tmp_path / "app.db")
    script = PARENT.format(path=sys.path, database=database, options=options)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", script], dict(os.environ))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    conn = sqlite3.connect(database)
    try:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert conn.execute("SELECT * FROM t").fetchall() == [(number, f"row {number}") for number in range(3000)]
    finally:
        conn.close()


def write_in_process(pool: ConnectionPool[Any], numbers: range) -> None:
    for number in numbers:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (?)", (number,))
    pool.close()


def test_multiprocessing_by_fork(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with ConnectionPool(tmp_path / "app.db", max_size=2, pragmas={"busy_timeout": 10_000}) as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE t (a)")
        processes = [
            context.Process(target=write_in_process, args=(pool, range(first, first + 50))) for first in (0, 50, 100)
        ]
        with pool.connection() as conn:
            for process in processes:
                process.start()
            del conn
        for number in range(150, 200):
            with pool.connection() as conn:
                conn.execute("INSERT INTO t VALUES (?)", (number,))
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
        with pool.connection() as conn:
            assert conn.execute("SELECT a FROM t ORDER BY a").fetchall() == [(number,) for number in range(200)]


def test_a_database_in_memory_is_a_new_one_in_the_child() -> None:
    with ConnectionPool(":memory:", max_size=2) as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE t (a)")

        def work() -> None:
            with pool.connection() as conn:
                assert conn.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
                conn.execute("CREATE TABLE t (a)")
            with pool.connection() as conn:
                assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)

        in_child(work)
        with pool.connection() as conn:
            assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
