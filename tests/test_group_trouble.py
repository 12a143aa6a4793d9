"""Functions in a group commit that leave something behind, end the transaction of all, or close the connection."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from database_support import CREATE, await_queued, batch, database, held, in_order, insert
from pool_support import PATIENCE, eventually, start

from sqlitepool import Database, WriteTimeout
from sqlitepool.transaction import Transaction

db = database

Function = Callable[[sqlite3.Connection], object]


def add(number: int) -> Function:
    return lambda conn: insert(conn, number)


def counted(number: int, runs: list[int]) -> Function:
    def function(conn: sqlite3.Connection) -> int:
        runs.append(number)
        return insert(conn, number)

    return function


def submitted(db: Database, *functions: Function) -> list[Future[object]]:
    """Submit the functions so that they run in one group commit, and wait for them."""
    with db.write():
        futures = [db.submit(function) for function in functions]
    for future in futures:
        future.exception(PATIENCE)
    return futures


@pytest.fixture(params=[batch, submitted])
def run(request: pytest.FixtureRequest) -> Callable[..., list[Future[object]]]:
    """Runs functions in one group commit: for callers who wait, or for those who hold a future."""
    return request.param  # type: ignore[no-any-return]


Run = Callable[..., list[Future[object]]]


# -- what one leaves behind, the next does not find


def look(conn: sqlite3.Connection) -> object:
    return (
        conn.execute("SELECT upper('a'), 'a' LIKE 'A', n FROM t WHERE n = 0").fetchone(),
        conn.execute("PRAGMA query_only").fetchone()[0],
    )


LEFT_BEHIND: dict[str, Function] = {
    "temporary table": lambda conn: conn.execute("CREATE TEMP TABLE t AS SELECT 7 AS n").rowcount,
    "row factory": lambda conn: setattr(conn, "row_factory", sqlite3.Row),
    "text factory": lambda conn: setattr(conn, "text_factory", bytes),
    "function": lambda conn: conn.create_function("upper", 1, lambda text: "mine"),
    "PRAGMA": lambda conn: conn.execute("PRAGMA case_sensitive_like = 1").rowcount,
    "query_only": lambda conn: conn.execute("PRAGMA query_only = 1").rowcount,
}


@pytest.mark.parametrize("left", LEFT_BEHIND)
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_function_leaves_behind_the_next_one_does_not_find(db: Database, left: str, fails: bool) -> None:
    def leave(conn: sqlite3.Connection) -> None:
        LEFT_BEHIND[left](conn)
        if fails:
            raise KeyError(left)

    db.run_write(insert, 0)
    clean = db.run_write(look)
    seen, bad, later, last = batch(db, look, leave, look, add(1))
    assert seen.result() == clean
    assert isinstance(bad.exception(), KeyError) is fails
    assert later.result() == clean
    assert last.result() == 1
    assert in_order(db) == [0, 1]


def test_those_before_it_are_committed_with_it_and_those_after_it_run_once(db: Database) -> None:
    runs: list[int] = []
    before = db.stats()
    functions = [counted(1, runs), LEFT_BEHIND["row factory"], counted(2, runs), counted(3, runs)]
    for call in batch(db, *functions):
        call.result()
    after = db.stats()
    assert runs == [1, 2, 3]
    assert (after.batches - before.batches, after.jobs - before.jobs) == (2, 4)


# -- closing the connection, or ending the transaction


@pytest.mark.parametrize(
    "end",
    [
        lambda conn: conn.close(),
        lambda conn: setattr(conn, "isolation_level", None),
        lambda conn: setattr(conn, "isolation_level", "IMMEDIATE"),
    ],
    ids=["close", "isolation_level", "isolation_level begins"],
)
def test_what_would_end_the_transaction_is_refused(db: Database, run: Run, end: Function) -> None:
    runs: list[int] = []
    one, bad, two = run(db, counted(1, runs), end, counted(2, runs))
    assert (one.result(), two.result()) == (1, 2)
    with pytest.raises(sqlite3.ProgrammingError, match="Database"):
        bad.result()
    assert runs == [1, 2]
    with pytest.raises(sqlite3.ProgrammingError, match="Database"), db.write() as conn:
        end(conn)
    assert in_order(db) == [1, 2]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there is no such attribute")
def test_autocommit_is_refused(db: Database) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="autocommit"):
        db.run_write(lambda conn: setattr(conn, "autocommit", True))


def test_who_closes_it_after_the_block_harms_nobody(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
    with pytest.raises(sqlite3.ProgrammingError, match="Database"):
        conn.close()
    with pytest.raises(sqlite3.OperationalError, match="has ended"):
        conn.executescript("INSERT INTO t (n) VALUES (3)")
    assert db.run_write(insert, 2) == 2
    assert in_order(db) == [1, 2]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "end",
    [sqlite3.Connection.close, lambda conn: conn.__init__(":memory:")],
    ids=["close", "init"],
)
def test_if_it_is_closed_all_the_same_the_others_are_run_again(
    db: Database, run: Run, place: int, end: Function
) -> None:
    runs: list[int] = []
    functions = [counted(1, runs), counted(2, runs)]
    functions.insert(place, end)
    calls = run(db, *functions)
    bad = calls.pop(place)
    assert [call.result() for call in calls] == [1, 2]
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        bad.result()
    assert in_order(db) == [1, 2]
    assert runs.count(1) == 1 + (place > 0)
    assert runs.count(2) == 1 + (place > 1)


def commit_by_script(conn: sqlite3.Connection) -> None:
    sqlite3.Cursor(conn).executescript("")


def commit_and_begin(conn: sqlite3.Connection) -> None:
    sqlite3.Cursor(conn).executescript("BEGIN IMMEDIATE -- sqlitepool")


def commit_and_fail(conn: sqlite3.Connection) -> None:
    sqlite3.Connection.commit(conn)
    raise KeyError("mine")


@pytest.mark.parametrize("end", [commit_by_script, sqlite3.Connection.commit, commit_and_begin, commit_and_fail])
def test_what_somebody_has_committed_past_us_is_not_written_twice(db: Database, run: Run, end: Function) -> None:
    runs: list[int] = []
    one, two, bad, three = run(db, counted(1, runs), counted(2, runs), end, counted(3, runs))
    for call in (one, two):
        with pytest.raises(sqlite3.OperationalError, match=r"another function .* cannot be known"):
            call.result()
    error = bad.exception()
    assert "may be committed" in str(error) + "".join(getattr(error, "__notes__", ()))
    assert isinstance(error, KeyError) is (end is commit_and_fail)
    assert three.result() == 3
    assert runs == [1, 2, 3]
    assert in_order(db) == [1, 2, 3]


@pytest.mark.parametrize("end", [commit_by_script, sqlite3.Connection.commit, commit_and_fail])
def test_who_commits_past_us_alone_is_told_that_it_may_be_written(db: Database, end: Function) -> None:
    def both(conn: sqlite3.Connection) -> None:
        insert(conn, 1)
        end(conn)

    with pytest.raises((sqlite3.OperationalError, KeyError)) as caught:
        db.run_write(both)
    assert "may be committed" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    with pytest.raises((sqlite3.OperationalError, KeyError)) as caught, db.write() as conn:
        end(conn)
    assert "may be committed" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert in_order(db) == [1]


def test_after_or_rollback_nothing_is_in_doubt(db: Database) -> None:
    db.run_write(insert, 0)
    for function in (
        lambda conn: conn.execute("INSERT OR ROLLBACK INTO t (n) VALUES (0)"),
        lambda conn: conn.cursor().execute("INSERT OR ROLLBACK INTO t (n) VALUES (0)"),
        lambda conn: conn.executemany("INSERT OR ROLLBACK INTO t (n) VALUES (?)", [(0,)]),
        lambda conn: conn.cursor().executemany("INSERT OR ROLLBACK INTO t (n) VALUES (?)", [(0,)]),
        lambda conn: conn.executescript("INSERT OR ROLLBACK INTO t (n) VALUES (0)"),
    ):
        with pytest.raises(sqlite3.IntegrityError) as caught:
            db.run_write(function)
        assert "may be committed" not in "".join(getattr(caught.value, "__notes__", ()))
        with pytest.raises(sqlite3.IntegrityError) as caught, db.write() as conn:
            function(conn)
        assert "may be committed" not in "".join(getattr(caught.value, "__notes__", ()))


# -- a half-read RETURNING


RETURNING = "INSERT INTO t (n) VALUES (?), (?) RETURNING n"


def test_a_half_read_returning_is_no_error_in_company(db: Database, run: Run) -> None:
    kept = []

    def half_read(first: int) -> Function:
        def function(conn: sqlite3.Connection) -> object:
            cursor = conn.execute(RETURNING, (first, first + 1))
            kept.append(cursor)
            return cursor.fetchone()

        return function

    calls = run(db, half_read(1), half_read(3), half_read(5))
    assert [call.result() for call in calls] == [(1,), (3,), (5,)]
    assert in_order(db) == [1, 2, 3, 4, 5, 6]


def test_a_half_read_returning_in_a_nested_block_leaves_the_outer_ones_cursors_alone(db: Database) -> None:
    db.run_write(insert, 1)
    db.run_write(insert, 2)
    with db.write() as conn:
        outer = conn.execute("SELECT n FROM t ORDER BY n")
        assert outer.fetchone() == (1,)
        with db.write() as inner:
            cursor = inner.execute(RETURNING, (3, 4))
            other = inner.execute(RETURNING, (5, 6))
            assert (cursor.fetchone(), other.fetchone()) == ((3,), (5,))
        assert outer.fetchone() == (2,)
    assert in_order(db) == [1, 2, 3, 4, 5, 6]


# -- functions that are none


def test_a_generator_or_coroutine_function_is_refused(db: Database, run: Run) -> None:
    def generator(conn: sqlite3.Connection) -> Iterator[int]:
        yield insert(conn, 1)

    async def coroutine(conn: sqlite3.Connection) -> int:
        return insert(conn, 2)

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match="plain function"):
            db.run_write(function)
        one, bad, two = run(db, lambda conn: conn.in_transaction, function, lambda conn: conn.in_transaction)
        assert one.result() is two.result() is True
        with pytest.raises(TypeError, match="plain function"):
            bad.result()
        with pytest.raises(TypeError, match="plain function"), db.write():
            db.run_write(function)
    with pytest.raises(TypeError, match="not None"):
        db.submit(None)  # type: ignore[arg-type]
    assert in_order(db) == []


# -- time is up


def test_the_time_of_what_was_submitted_is_up_behind_a_slow_function(tmp_path: Path) -> None:
    began, go = threading.Event(), threading.Event()

    def slow(conn: sqlite3.Connection) -> str:
        began.set()
        assert go.wait(PATIENCE)
        return "slow"

    with Database(tmp_path / "app.db", timeout=PATIENCE) as db:
        db.execute_write(CREATE)
        first = db.submit(slow)
        assert began.wait(PATIENCE)
        db._timeout = 0.05
        late = [db.submit(insert, n) for n in range(3)]
        db._timeout = PATIENCE
        last = db.submit(insert, 3)
        time.sleep(0.06)
        go.set()
        assert first.result(PATIENCE) == "slow"
        for future in late:
            with pytest.raises(WriteTimeout, match="not begun"):
                future.result(PATIENCE)
        assert last.result(PATIENCE) == 3
        assert in_order(db) == [3]


def test_the_time_of_what_was_submitted_is_up_behind_a_caller_who_leads(db: Database) -> None:
    with held(db):
        leader = start(db.run_write, insert, 1)
        await_queued(db, 1)
        db._timeout = 0.05
        late = db.submit(insert, 2)
        db._timeout = PATIENCE
        time.sleep(0.06)
    assert leader.result(PATIENCE) == 1
    with pytest.raises(WriteTimeout, match="not begun"):
        late.result(PATIENCE)
    assert in_order(db) == [1000, 1]


def test_with_a_timeout_of_nothing_what_was_submitted_is_tried(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", timeout=0) as db:
        db.execute_write(CREATE)
        assert db.submit(insert, 1).result(PATIENCE) == 1


# -- nothing ends the thread of the futures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_exits_does_not_end_the_thread(db: Database) -> None:
    def leave(future: Future[int]) -> None:
        raise SystemExit

    with db.write():
        first, second = db.submit(insert, 1), db.submit(insert, 2)
        first.add_done_callback(leave)
    assert second.result(PATIENCE) == 2
    assert db.submit(insert, 3).result(PATIENCE) == 3
    assert db._group.flush(time.monotonic() + PATIENCE)


@pytest.mark.parametrize("step", ["release", "commit", "end", "begin"])
def test_an_error_that_nobody_has_foreseen_fails_one_future_and_the_rest_goes_on(
    db: Database, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    right = getattr(Transaction, step)
    times: list[int] = []

    def wrong(self: Transaction, *args: object) -> object:
        if not times and threading.current_thread() is db._group._thread:
            times.append(1)
            if step == "end":
                right(self)
            raise MemoryError(step)
        return right(self, *args)

    monkeypatch.setattr(Transaction, step, wrong)
    with db.write():
        futures = [db.submit(insert, n) for n in range(3)]
    errors = [future.exception(PATIENCE) for future in futures]
    assert times
    assert len([error for error in errors if error is not None]) == (0 if step == "end" else 1)
    assert in_order(db) == [n for n in range(3) if errors[n] is None]
    assert db.submit(insert, 3).result(PATIENCE) == 3


def test_an_unforeseen_error_of_a_leader_leaves_nobody_behind(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Transaction.end
    times: list[int] = []

    def wrong(self: Transaction) -> None:
        right(self)
        if type(self) is Transaction and not times:
            times.append(1)
            raise MemoryError

    with db.write():
        calls = []
        for n in range(3):
            calls.append(start(db.run_write, insert, n))
            await_queued(db, n + 1)
        monkeypatch.setattr(Transaction, "end", wrong)
    assert isinstance(calls[0].exception(PATIENCE), MemoryError)
    assert [call.result(PATIENCE) for call in calls[1:]] == [1, 2]
    assert in_order(db) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*rolled back a transaction:RuntimeWarning", "ignore::ResourceWarning")
def test_a_block_that_nobody_ended_makes_the_next_one_wait_for_the_right_to_write(db: Database) -> None:
    conn = db.write().__enter__()
    with pytest.raises(WriteTimeout), db.write(timeout=0.05):
        pass
    del conn
    eventually(lambda: not held_up(db))


def held_up(db: Database) -> bool:
    try:
        with db.write(timeout=0.05):
            return False
    except WriteTimeout:
        return True
