"""Which write block is inside of which, and who waits for whom until when."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from database_support import CREATE, database, held, insert, numbers
from pool_support import PATIENCE, eventually, least, start

import sqlitepool.wal
from sqlitepool import Database, PoolDeadlock, QueryTimeout, WriteTimeout

db = database

FOREVER = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r"


# -- nesting


def test_a_write_block_inside_of_another_is_a_savepoint(db: Database) -> None:
    def fail() -> None:
        with db.write() as inner:
            insert(inner, 3)
            with db.write() as innermost:
                insert(innermost, 4)
            raise KeyError

    with db.write() as conn:
        insert(conn, 1)
        with db.write() as inner:
            assert inner is conn
            insert(inner, 2)
        with pytest.raises(KeyError):
            fail()
        assert numbers(db) == []
    assert numbers(db) == [1, 2]


def test_the_outer_block_takes_the_inner_one_with_it(db: Database) -> None:
    def work() -> None:
        with db.write() as conn:
            insert(conn, 1)

    def fail() -> None:
        with db.write():
            work()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert numbers(db) == []


def test_functions_and_statements_inside_of_a_write_block_are_part_of_it(db: Database) -> None:
    with db.write() as conn:
        assert db.run_write(insert, 1) == 1
        assert db.execute_write("INSERT INTO t (n) VALUES (2)").rowcount == 1
        with pytest.raises(sqlite3.IntegrityError):
            db.executemany_write("INSERT INTO t (n) VALUES (?)", [(3,), (1,)])
        assert conn.execute("SELECT n FROM t").fetchall() == [(1,), (2,)]
        assert numbers(db) == []
    assert numbers(db) == [1, 2]


def test_write_blocks_inside_of_a_function_are_savepoints_of_it(db: Database) -> None:
    def work(conn: sqlite3.Connection) -> None:
        insert(conn, 1)
        with contextlib.suppress(KeyError), db.write() as inner:
            assert inner is conn
            insert(conn, 2)
            raise KeyError
        db.run_write(insert, 3)

    db.run_write(work)
    assert numbers(db) == [1, 3]
    db.execute_write("DELETE FROM t")
    db.submit(work).result(PATIENCE)
    assert numbers(db) == [1, 3]


def test_a_suspended_block_on_the_same_thread_is_never_joined(db: Database) -> None:
    def request(number: int) -> Generator[None]:
        with db.write() as conn:
            insert(conn, number)
            yield

    first = request(1)
    next(first)
    with pytest.raises(WriteTimeout, match=r"That is this very thread.*\n?"), db.write(timeout=0.05) as conn:
        insert(conn, 2)
    with pytest.raises(KeyError):
        first.throw(KeyError())
    assert numbers(db) == []
    for _ in request(3):
        with pytest.raises(WriteTimeout), db.write(timeout=0):
            pass
    assert numbers(db) == [3]


def test_a_generator_that_runs_joins_its_own_block(db: Database) -> None:
    def request() -> Generator[None]:
        with db.write():
            yield
            with db.write() as conn:
                insert(conn, 1)

    list(request())
    assert numbers(db) == [1]


def test_nothing_is_written_in_the_savepoint_of_a_suspended_block(db: Database) -> None:
    def inner() -> Generator[None]:
        with db.write() as conn:
            insert(conn, 1)
            yield

    with db.write() as conn:
        suspended = inner()
        next(suspended)
        with pytest.raises(PoolDeadlock, match="suspended"), db.write():
            pass
        for _ in suspended:
            pass
        with db.write():
            insert(conn, 2)
    assert numbers(db) == [1, 2]


def test_a_block_that_ends_before_the_one_inside_of_it_is_rolled_back(db: Database) -> None:
    def inner() -> Generator[None]:
        with db.write() as conn:
            insert(conn, 1)
            yield

    def outer() -> None:
        with db.write() as conn:
            insert(conn, 2)
            next(suspended)

    suspended = inner()
    with pytest.raises(RuntimeError, match="ends before the one inside"):
        outer()
    suspended.close()
    assert numbers(db) == []
    assert db.run_write(insert, 3) == 3


def test_a_block_that_was_entered_by_no_with_statement_is_not_joined(db: Database) -> None:
    with contextlib.ExitStack() as stack:
        insert(stack.enter_context(db.write()), 1)
        with pytest.raises(WriteTimeout, match="no `with` statement"), db.write(timeout=0.01):
            pass
    assert numbers(db) == [1]


def test_a_write_block_is_entered_once_at_a_time(db: Database) -> None:
    block = db.write()
    with block, pytest.raises(RuntimeError, match=r"db\.write\(\) once for each"), block:
        pass
    with block as conn:
        insert(conn, 1)
    assert numbers(db) == [1]


# -- what cannot be joined


def in_isolated(db: Database, work: Callable[[sqlite3.Connection], object]) -> None:
    with db.isolated() as conn:
        work(conn)


def in_another(db: Database, work: Callable[[sqlite3.Connection], object]) -> None:
    """In a write block of another `Database` on the same file."""
    file = Path(str(db._opener.target.file))
    link = file.with_name("link.db")
    link.symlink_to(file)
    with Database(link, timeout=PATIENCE) as other, other.write() as conn:
        work(conn)


@pytest.mark.parametrize("in_block", [in_isolated, in_another])
def test_who_would_wait_for_a_block_around_it_is_told_at_once(
    db: Database, in_block: Callable[[Database, Callable[[sqlite3.Connection], object]], None]
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: db.write().__enter__(),
        lambda: db.run_write(insert, 1),
        lambda: db.execute_write("DELETE FROM t"),
        lambda: db.isolated().__enter__(),
        lambda: db.checkpoint(),
    ]
    queued = []

    def work(conn: sqlite3.Connection) -> None:
        began = time.monotonic()
        for call in calls:
            with pytest.raises(PoolDeadlock):
                call()
        queued.append(db.submit(insert, 2))  # waits for nothing
        with pytest.raises(WriteTimeout):
            start(lambda: db.write(timeout=0.01).__enter__()).result(PATIENCE)
        conn.execute("INSERT INTO t (n) VALUES (3)")
        assert time.monotonic() - began < PATIENCE / 2

    in_block(db, work)
    assert queued[0].result(PATIENCE) == 2
    assert db.run_write(insert, 1) == 1
    assert numbers(db) == [1, 2, 3]


def test_what_may_not_be_around_it_is_waited_for(db: Database) -> None:
    def suspended() -> Generator[None]:
        with db.isolated():
            yield

    generator = suspended()
    next(generator)
    with pytest.raises(WriteTimeout), db.write(timeout=0.01):
        pass
    generator.close()
    with contextlib.ExitStack() as stack:
        stack.enter_context(db.isolated())
        with pytest.raises(WriteTimeout), db.write(timeout=0.01):
            pass
    assert db.run_write(insert, 1) == 1


def test_close_inside_of_an_isolated_block_does_not_wait_for_it(db: Database) -> None:
    with db.isolated() as conn:
        insert(conn, 1)
        began = time.monotonic()
        db.close()
        assert time.monotonic() - began < PATIENCE / 2


def test_the_place_of_a_block_that_an_exit_stack_entered_is_the_line_of_its_caller(db: Database) -> None:
    for block in (db.write(), db.isolated()):
        with contextlib.ExitStack() as stack:
            stack.enter_context(block)
            holder = db.stats().holder
            assert holder is not None
            assert Path(__file__).name in holder.where
    with contextlib.ExitStack() as stack:
        stack.enter_context(db.read())
        assert [Path(__file__).name in lease.where for lease in db._readers.leases()] == [True]


# -- timeouts


def test_a_write_timeout_names_the_holder_and_its_last_statement(db: Database) -> None:
    def time_out() -> float:
        began = time.monotonic()
        with pytest.raises(WriteTimeout, match=r"'the holder' for .* in hold.*'INSERT INTO t \(n\) VALUES"):
            db.write(timeout=0.1).__enter__()
        return time.monotonic() - began

    with held(db):
        assert 0.1 <= least(time_out, 0.2) < 0.2
        with pytest.raises(WriteTimeout), db.write(timeout=0):
            pass


def test_a_job_that_waits_in_vain_is_taken_back(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", timeout=PATIENCE) as db:
        db.execute_write(CREATE)
        with held(db):
            db._timeout = 0.1
            calls = [start(db.run_write, insert, n) for n in range(5)]
            future = db.submit(insert, 5)
            for call in [*calls, future]:
                with pytest.raises(WriteTimeout, match="the holder"):
                    call.result(PATIENCE)
        db._timeout = PATIENCE
        assert db.run_write(insert, 6) == 6
        assert numbers(db) == [6, 1000]
        assert db.stats().queued == 0


def test_a_foreign_writer_is_waited_for_and_then_said_to_be_one(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlitepool.wal, "has_wal_reset_bug", lambda version: False)
    foreign = sqlite3.connect(tmp_path / "app.db", isolation_level=None, check_same_thread=False)
    foreign.execute("BEGIN IMMEDIATE")
    with pytest.raises(WriteTimeout, match="does not come through the gate"), db.write(timeout=0.1):
        pass
    late = start(db.run_write, insert, 1)
    time.sleep(0.05)
    foreign.execute("COMMIT")
    assert late.result(PATIENCE) == 1
    foreign.close()


@pytest.mark.parametrize(
    ("version", "has_bug"),
    [((3, 6, 23), False), ((3, 40, 1), True), ((3, 44, 5), True), ((3, 44, 6), False), ((3, 50, 6), True),
     ((3, 50, 7), False), ((3, 51, 2), True), ((3, 51, 3), False), ((3, 53, 0), False)],
)  # fmt: skip
def test_who_writes_past_the_gate_is_warned_of_once_where_sqlite_has_the_wal_reset_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], has_bug: bool
) -> None:
    assert sqlitepool.wal.has_wal_reset_bug(version) == has_bug
    monkeypatch.setattr(sqlitepool.wal, "has_wal_reset_bug", lambda _: has_bug)
    with Database(tmp_path / "app.db") as db:
        foreign = sqlite3.connect(tmp_path / "app.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seconds in (0.1, 1.0, 10.0):  # on a busy machine it takes longer until somebody else is suspected
                with pytest.raises(WriteTimeout), db.write(timeout=seconds):
                    pass
                if caught or not has_bug:
                    break
        assert ["walresetbug" in str(warning.message) for warning in caught] == [True] * has_bug
        with pytest.raises(WriteTimeout), db.write(timeout=0.1):
            pass
        foreign.close()


# -- time limits


def test_a_query_over_its_time_limit_is_interrupted_and_its_connection_goes_on(db: Database) -> None:
    began = time.monotonic()
    with pytest.raises(QueryTimeout, match=r"0\.1 s") as raised:
        db.execute(FOREVER, time_limit=0.1)
    assert isinstance(raised.value, TimeoutError)
    assert time.monotonic() - began < 2
    with pytest.raises(QueryTimeout), db.read(time_limit=0.05) as conn:
        conn.execute(FOREVER).fetchall()
    readers = db.stats().readers
    assert (readers.in_use, readers.discarded, readers.size) == (0, 0, 1)


def test_the_time_limit_of_one_borrower_never_hits_the_next(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", readers=1) as db:
        db.execute_write(CREATE)
        deadline = time.monotonic() + 1
        passed = 0
        while time.monotonic() < deadline:
            try:
                db.execute("WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 3000) SELECT * FROM r",
                           time_limit=0.0005)  # fmt: skip
            except QueryTimeout:
                passed += 1
            assert db.execute("VALUES (1), (2), (3)") == [(1,), (2,), (3,)]
        assert passed
        assert db.stats().readers.discarded == 0


def test_a_block_that_ends_well_is_no_error_though_its_limit_has_passed(db: Database) -> None:
    with db.read(time_limit=0.5) as conn:
        conn.execute("SELECT 1").fetchall()
        time.sleep(0.6)
    with pytest.raises(sqlite3.OperationalError, match="no such table"), db.read(time_limit=5) as conn:
        conn.execute("SELECT * FROM nowhere")


def test_an_interrupt_of_the_callers_own_is_no_timeout(db: Database) -> None:
    connections: list[sqlite3.Connection] = []

    def read() -> None:
        with db.read(time_limit=2 * PATIENCE) as conn:
            connections.append(conn)
            conn.execute(FOREVER)

    reader = start(read)
    eventually(lambda: connections)
    while not reader.done():
        connections[0].interrupt()
        time.sleep(0.001)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        reader.result()


def test_many_limits_that_were_kept_are_forgotten(db: Database) -> None:
    from sqlitepool.time_limit import _watchdog

    for _ in range(500):
        db.execute("SELECT 1", time_limit=100)
    assert len(_watchdog._heap) < 200
