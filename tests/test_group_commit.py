"""Group commit: who runs whose work, what is acknowledged when, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import pytest
from database_support import CREATE, batch, database, in_order, insert
from pool_support import PATIENCE, eventually, start

from sqlitepool import Database, PoolFull, WriteTimeout

db = database


# -- batches


@pytest.mark.usefixtures("one_batch")
def test_the_work_of_many_is_committed_at_once(db: Database) -> None:
    before = db.stats()
    calls = batch(db, *(lambda conn, n=n: insert(conn, n) for n in range(20)))
    assert [call.result() for call in calls] == list(range(20))
    after = db.stats()
    assert (after.batches - before.batches, after.jobs - before.jobs) == (1, 20)
    assert after.commits - before.commits == 2


@pytest.mark.usefixtures("one_batch")
def test_nothing_is_acknowledged_before_it_is_committed(db: Database) -> None:
    def see(conn: sqlite3.Connection, number: int) -> None:
        insert(conn, number)
        assert all(not future.done() for future in futures)
        assert (number,) not in db.execute("SELECT n FROM t")

    futures: list[Future[None]] = []
    with db.write():
        futures += [db.submit(see, n) for n in range(10)]
    for n, future in enumerate(futures):
        future.result(PATIENCE)
        assert (n,) in db.execute("SELECT n FROM t")


def test_a_function_that_fails_undoes_its_own_work_and_tells_its_own_caller(db: Database) -> None:
    def fail(conn: sqlite3.Connection) -> None:
        insert(conn, 1000)
        raise KeyError("mine")

    before = db.stats()
    good, first, second, other = batch(
        db, lambda conn: insert(conn, 1), fail, lambda conn: insert(conn, 1), lambda conn: insert(conn, 2)
    )
    assert (good.result(), other.result()) == (1, 2)
    with pytest.raises(KeyError, match="mine") as raised:
        first.result()
    assert "fail" in [entry.name for entry in raised.traceback]
    with pytest.raises(sqlite3.IntegrityError):
        second.result()
    assert in_order(db) == [1, 2]
    assert db.stats().jobs - before.jobs == 2, "those that were committed"


def test_the_first_of_a_batch_may_fail_too(db: Database) -> None:
    def fail(conn: sqlite3.Connection) -> None:
        insert(conn, 1000)
        raise KeyError

    bad, good = batch(db, fail, lambda conn: insert(conn, 1))
    assert isinstance(bad.exception(), KeyError)
    assert good.result() == 1
    assert in_order(db) == [1]


@pytest.mark.usefixtures("one_batch")
def test_if_the_commit_fails_each_is_run_again_alone(db: Database) -> None:
    db.execute_write("CREATE TABLE child (t REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED)")
    runs: list[int] = []

    def add(number: int) -> object:
        def work(conn: sqlite3.Connection) -> int:
            runs.append(number)
            if number == 1:
                conn.execute("INSERT INTO child VALUES (99)")  # seen by COMMIT only
            return insert(conn, number)

        return work

    before = db.stats()
    calls = batch(db, *(add(n) for n in range(3)))
    assert [call.exception() is None for call in calls] == [True, False, True]
    assert isinstance(calls[1].exception(), sqlite3.IntegrityError)
    assert runs == [0, 1, 2, 0, 1, 2]
    assert in_order(db) == [0, 2]
    assert db.stats().batches - before.batches == 2
    assert db.execute("SELECT count(*) FROM child") == [(0,)]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_if_one_loses_the_transaction_of_all_the_others_are_run_again(db: Database, place: int) -> None:
    db.run_write(insert, 0)

    def lose(conn: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.IntegrityError):
            conn.execute("INSERT OR ROLLBACK INTO t (n) VALUES (0)")

    works: list[object] = [lambda conn: insert(conn, 1), lambda conn: insert(conn, 2)]
    works.insert(place, lose)
    calls = batch(db, *works)
    bad = calls.pop(place)
    assert [call.result() for call in calls] == [1, 2]
    with pytest.raises(sqlite3.OperationalError, match="rolled its transaction back"):
        bad.result()
    assert in_order(db) == [0, 1, 2]


def test_a_function_cannot_commit_the_work_of_others(db: Database) -> None:
    one, bad, other = batch(
        db, lambda conn: insert(conn, 1), lambda conn: conn.commit(), lambda conn: conn.execute("ROLLBACK")
    )
    assert one.result() == 1
    for call in (bad, other):
        with pytest.raises(sqlite3.ProgrammingError, match="committed when the block or function ends"):
            call.result()
    assert in_order(db) == [1]


def test_a_batch_is_bounded_in_time_and_the_lead_is_passed_on(db: Database) -> None:
    before = db.stats()

    def slow(conn: sqlite3.Connection) -> str:
        time.sleep(0.006)
        return threading.current_thread().name

    calls = batch(db, *[slow] * 8)
    assert db.stats().batches - before.batches >= 4  # two at most in each; fewer on a busy machine
    assert len({call.result() for call in calls}) >= 4


def test_threads_share_evenly(db: Database) -> None:
    stop = threading.Event()
    counts = [0] * 16

    def work(number: int) -> None:
        while not stop.is_set():
            db.run_write(insert, number * 10**6 + counts[number])
            counts[number] += 1

    calls = [start(work, number) for number in range(16)]
    eventually(lambda: all(counts))  # a thread that has not begun yet has no share
    before = counts.copy()
    eventually(lambda: sum(counts) - sum(before) >= 4000)
    shares = [count - earlier for count, earlier in zip(counts, before, strict=True)]
    stop.set()
    for call in calls:
        call.result(PATIENCE)
    assert min(shares) > max(shares) * 0.25, shares  # on an idle machine 0.8
    assert sum(counts) == len(in_order(db))


# -- futures


def has_thread(db: Database) -> bool:
    return any(thread.name == f"sqlitepool-writer-{db.name}" for thread in threading.enumerate())


def test_what_one_thread_submits_is_run_and_done_in_this_order(db: Database) -> None:
    done: list[int] = []
    futures = []
    for n in range(500):
        future = db.submit(insert, n)
        future.add_done_callback(lambda future: done.append(future.result()))
        futures.append(future)
        if n % 100 == 50:
            assert db.run_write(insert, 1000 + n) == 1000 + n
            assert future.result(PATIENCE) == n  # came before, so is committed, too
    assert [future.result(PATIENCE) for future in futures] == list(range(500))
    eventually(lambda: done == list(range(500)))
    assert [n for n in in_order(db) if n < 1000] == list(range(500))


def test_a_future_can_be_cancelled_until_it_is_begun(db: Database) -> None:
    with db.write():
        first, second, third = (db.submit(insert, n) for n in range(3))
        assert second.cancel()
        assert second.cancel()
        assert not wait([second], PATIENCE).not_done
        assert db.stats().queued == 2
    assert (first.result(PATIENCE), third.result(PATIENCE)) == (0, 2)
    assert not first.cancel()
    with pytest.raises(CancelledError):
        second.result(0)
    assert in_order(db) == [0, 2]


def test_the_last_future_cancelled_leaves_nothing_to_wait_for(db: Database) -> None:
    with db.write():
        assert db.submit(insert, 1).cancel()
    assert db.run_write(insert, 2) == 2
    assert db._group.flush(time.monotonic() + PATIENCE)


def test_a_function_that_fails_gives_its_future_the_error(db: Database) -> None:
    def fail(conn: sqlite3.Connection) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        db.submit(fail).result(PATIENCE)
    assert db.submit(insert, 1).result(PATIENCE) == 1


def test_a_callback_may_write(db: Database) -> None:
    done: Future[int] = Future()
    with db.write():
        first = db.submit(insert, 1)
        db.submit(insert, 2)
        first.add_done_callback(lambda _: done.set_result(db.run_write(insert, 3)))
    assert done.result(PATIENCE) == 3
    assert sorted(in_order(db)) == [1, 2, 3]


def test_the_background_thread_ends_when_it_is_idle(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlitepool.group_queue._STAYS", 0.02)
    for n in range(3):
        assert db.submit(insert, n).result(PATIENCE) == n
        eventually(lambda: not has_thread(db))


def test_the_background_thread_ends_with_the_database(db: Database) -> None:
    db.submit(insert, 1).result(PATIENCE)
    assert has_thread(db)
    db.close()
    eventually(lambda: not has_thread(db))


def test_what_was_submitted_is_written_before_the_program_ends(tmp_path: Path) -> None:
    program = f"""
from sqlitepool import Database
db = Database({str(tmp_path / "app.db")!r})
db.execute_write("CREATE TABLE t (n)")
for n in range(2000):
    db.submit(lambda conn, n: conn.execute("INSERT INTO t VALUES (?)", (n,)).rowcount, n)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)
    with Database(tmp_path / "app.db") as db:
        assert db.execute("SELECT count(*) FROM t") == [(2000,)]


# -- the queue is bounded


def test_a_full_queue_makes_the_submitter_wait(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", max_queue=3) as db:
        db.execute_write(CREATE)
        with db.write():
            futures = [start(db.submit, insert, n).result(PATIENCE) for n in range(3)]
            late = start(db.submit, insert, 3)
            with pytest.raises(PoolFull, match="3 jobs"):
                db.submit(insert, 4)
            time.sleep(0.05)
            assert not late.done()
        assert late.result(PATIENCE).result(PATIENCE) == 3
        assert [future.result(PATIENCE) for future in futures] == [0, 1, 2]
        many = [start(lambda n=n: [db.run_write(insert, 100 * n + i) for i in range(20)]) for n in range(1, 9)]
        for call in many:
            call.result(PATIENCE)
        assert len(in_order(db)) == 4 + 160


def test_who_waits_for_room_in_vain_is_told_so(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", max_queue=1) as db:
        db.execute_write(CREATE)
        with db.write():
            queued = start(db.submit, insert, 0).result(PATIENCE)
            db._timeout = 0.05
            with pytest.raises(WriteTimeout, match="was full: 1 jobs"):
                start(db.submit, insert, 1).result(PATIENCE)
        db._timeout = PATIENCE
        assert queued.result(PATIENCE) == 0
        assert db.run_write(insert, 2) == 2
