"""Exceptions that arrive anywhere (Ctrl-C, a signal handler that raises) while `Database` writes."""

from __future__ import annotations

import ctypes
import gc
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from database_support import await_queued, database, in_order, insert
from pool_support import PATIENCE, start
from storm import at_opcode, count_up, interrupt

from sqlitepool import Database
from sqlitepool.transaction import Transaction

db = database

# As in test_interruptions.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was lost without being returned:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*rolled back a transaction:RuntimeWarning"),
    # An interruption inside a finalizer, or a callback of a weak reference, cannot be passed on; Python says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Bang(BaseException):
    """What a signal handler may raise."""


@pytest.mark.usefixtures("one_batch")
def test_a_leader_that_is_interrupted_loses_nobody_elses_work(db: Database) -> None:
    def bang(conn: sqlite3.Connection) -> None:
        if threading.current_thread().name == "leader":
            raise Bang

    runs: list[str] = []

    def work(conn: sqlite3.Connection, number: int) -> int:
        runs.append(threading.current_thread().name)
        bang(conn)
        return insert(conn, number)

    with db.write():
        leader = start(db.run_write, insert, 0, name="leader")
        await_queued(db, 1)
        followers = []
        for n in range(1, 4):
            followers.append(start(db.run_write, work, n, name=f"follower-{n}"))
            await_queued(db, n + 1)
        future = db.submit(insert, 4)
    with pytest.raises(Bang) as raised:
        leader.result(PATIENCE)
    assert raised.value.__notes__ == ["sqlitepool: the write of this call has not been committed"]
    assert [call.result(PATIENCE) for call in followers] == [1, 2, 3]
    assert future.result(PATIENCE) == 4
    assert runs[:2] == ["leader", "follower-1"]
    assert sorted(in_order(db)) == [1, 2, 3, 4]


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_leader_that_is_interrupted_at_its_commit_tells_whether_it_was_committed(
    db: Database, monkeypatch: pytest.MonkeyPatch, is_committed: bool
) -> None:
    commit = Transaction.commit
    already: list[Transaction] = []

    def interrupted(transaction: Transaction) -> None:
        if transaction is outer or already:
            commit(transaction)
            return
        already.append(transaction)
        transaction._is_committing = True
        if is_committed:
            commit(transaction)
            transaction.is_committed = False  # as if the next step had not been taken
        raise Bang

    with db.write():
        current = db._writer._current
        outer = current and current()
        leader = start(db.run_write, insert, 0)
        await_queued(db, 1)
        follower = start(db.run_write, insert, 1)
        await_queued(db, 2)
        monkeypatch.setattr(Transaction, "commit", interrupted)
    with pytest.raises(Bang) as raised:
        leader.result(PATIENCE)
    said = "has been committed" if is_committed else "has not been committed"
    assert raised.value.__notes__ == [f"sqlitepool: the write of this call {said}"]
    assert follower.result(PATIENCE) == 1
    assert in_order(db) == ([0, 1] if is_committed else [1])


@pytest.mark.usefixtures("without_garbage")
def test_in_a_storm_of_interruptions_nothing_acknowledged_is_lost_and_nothing_is_half_there(db: Database) -> None:
    stop = threading.Event()
    ready: dict[int | None, bool] = {}  # by thread: none is on its way to it, and one that comes is caught
    acknowledged: set[int] = set()
    committed: set[int] = set()
    refused: set[int] = set()

    def write_both(conn: sqlite3.Connection, number: int) -> None:
        insert(conn, number)
        insert(conn, -number)

    def write(number: int) -> None:
        if number % 4 == 0:
            with db.write() as conn:
                write_both(conn, number)
        elif number % 4 == 1:
            db.submit(write_both, number).result(PATIENCE)
        else:
            db.run_write(write_both, number)
        acknowledged.add(number)

    def work(number: int) -> None:
        while True:
            try:
                ready[threading.get_ident()] = True
                is_last = False
                while not is_last:
                    is_last = stop.is_set()  # one more after that, for what was on its way then
                    number += 1
                    write(number)
                return
            except Bang as error:
                for note in getattr(error, "__notes__", ()):
                    if "has not been" in note:
                        refused.add(number)
                    elif "has been committed" in note:
                        committed.add(number)

    threads = [threading.Thread(target=work, args=(n * 10**6,), daemon=True) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        time.sleep(random.random() * 0.01)
        thread = random.choice(threads[1:])
        if ready.get(thread.ident):
            ready[thread.ident] = False
            raise_in(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Bang))
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert start(db.run_write, write_both, 1).exception(PATIENCE) is None
    with db.write():
        pass
    there = set(in_order(db))
    assert {-n for n in there} == there
    assert acknowledged <= there
    assert committed <= there
    assert not refused & there
    assert db.stats().queued == 0


@pytest.fixture
def without_garbage() -> Iterator[None]:
    """No finalizer of what other tests left runs meanwhile: an exception in there is not ours, and pytest keeps it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run_write(db: Database, number: int) -> None:
    db.run_write(write_both, number)


def write(db: Database, number: int) -> None:
    with db.write() as conn:
        insert(conn, number)
        with db.write():
            insert(conn, -number)


def submit(db: Database, number: int) -> None:
    db.submit(write_both, number)


def read(db: Database, number: int) -> None:
    with db.read(time_limit=PATIENCE) as conn:
        conn.execute("SELECT n FROM t").fetchone()


def write_both(conn: sqlite3.Connection, number: int) -> None:
    insert(conn, number)
    insert(conn, -number)


@pytest.mark.parametrize("work", [run_write, write, submit, read])
def test_interrupted_between_any_two_steps_it_is_all_or_nothing_and_the_next_one_goes_on(
    db: Database, work: Callable[[Database, int], None]
) -> None:
    expected: set[int] = set()
    for count, number in enumerate(count_up(7), 1):
        seen = at_opcode(number, interrupt, lambda n=2 * count: work(db, n))  # type: ignore[misc]
        run_write(db, 2 * count + 1)
        assert db._group.flush(time.monotonic() + PATIENCE)
        there = set(in_order(db))
        assert {-n for n in there} == there
        expected.add(2 * count + 1)
        assert expected <= there
        stats = db.stats()
        assert (stats.queued, stats.holder, stats.readers.in_use) == (0, None, 0)
        if seen < number:
            break
    assert lock_is_free(db._group._lock)


def lock_is_free(lock: threading.RLock) -> bool:
    def take() -> bool:
        taken = lock.acquire(timeout=PATIENCE / 2)
        if taken:
            lock.release()
        return taken

    return start(take).result(PATIENCE)
