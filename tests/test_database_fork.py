"""Fork while others read and write: nothing changes in the parent, and no child is told what is not so."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from pool_support import PATIENCE, eventually, start
from test_fork import in_child

from sqlitepool import Database, PoolError, WriteTimeout
from sqlitepool.gate import Gate
from sqlitepool.turn import Turn

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()"),
    # What we test is what this warning, of Python 3.12, is about.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]

TIMEOUT = 2.0

# A program of its own: its children end as Python ends, finalizers, atexit and all, which those of pytest must not.
PARENT = """
import gc, json, os, signal, sys, threading, time, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
from sqlitepool import Database

FORKS = 20
db = Database(sys.argv[1], readers=2, timeout=20)
with db.write() as conn:
    conn.executescript("CREATE TABLE a (id INTEGER PRIMARY KEY); CREATE TABLE b (id INTEGER PRIMARY KEY)")
stop = threading.Event()
acknowledged, errors = [], []


def write_both(conn, number):
    conn.execute("INSERT INTO a VALUES (?)", (number,))
    conn.execute("INSERT INTO b VALUES (?)", (number,))


def in_block(number):
    with db.write() as conn:
        write_both(conn, number)


def in_two_levels(number):
    with db.write() as conn:
        conn.execute("INSERT INTO a VALUES (?)", (number,))
        with db.write() as inner:
            inner.execute("INSERT INTO b VALUES (?)", (number,))


def read(number):
    with db.read() as conn:
        a, b = conn.execute("SELECT (SELECT max(id) FROM a), (SELECT max(id) FROM b)").fetchone()
    assert a == b, (a, b)
    return True


def repeat(work, first):
    number = first
    while not stop.is_set():
        number += 1
        try:
            if work(number) is None:
                acknowledged.append(number)
        except BaseException as error:
            errors.append(repr(error))
            return


works = [
    lambda number: db.run_write(write_both, number),
    lambda number: db.run_write(write_both, number),
    lambda number: db.submit(write_both, number).result(20),
    in_block,
    in_two_levels,
    read,
    read,
]
threads = [threading.Thread(target=repeat, args=(work, at * 1000000)) for at, work in enumerate(works)]
for thread in threads:
    thread.start()


def child(at):
    leave, collect = sys.exit, gc.collect
    if at % 3 == 1:
        db.close()
    elif at % 3 == 2:
        globals().clear()
        collect()
    leave(0)  # finalizers of what was inherited, atexit and all


def wait_for(pid):
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        errors.append(f"a child ended with {code}")


for at in range(FORKS):
    time.sleep(0.02)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        child(at)
    wait_for(pid)

with db.write() as conn:  # out of the midst of a transaction
    conn.execute("INSERT INTO a VALUES (90000000)")
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    wait_for(pid)
    conn.execute("INSERT INTO b VALUES (90000000)")
acknowledged.append(90000000)
before = len(acknowledged)
while len(acknowledged) < before + 100 and not errors:
    time.sleep(0.001)
stop.set()
for thread in threads:
    thread.join(20)
stuck = sum(thread.is_alive() for thread in threads)
left = db.close()
print(json.dumps({"acknowledged": acknowledged, "errors": errors, "stuck": stuck, "left": len(left)}))
"""


def test_forks_in_the_thick_of_it_change_nothing_for_the_parent(tmp_path: Path) -> None:
    database = tmp_path / "app.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", PARENT, str(database)], env=environment, capture_output=True, text=True, timeout=90
    )
    assert (run.returncode, run.stderr) == (0, "")
    told = json.loads(run.stdout)
    assert (told["errors"], told["stuck"], told["left"]) == ([], 0, 0)
    with closing(sqlite3.connect(database)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        a, b = ([number for (number,) in conn.execute(f"SELECT id FROM {table} ORDER BY id")] for table in "ab")
    assert a == b == sorted(told["acknowledged"])


@pytest.fixture(name="db")
def _db(tmp_path: Path) -> Iterator[Database]:
    db = Database(tmp_path / "app.db", readers=2, timeout=TIMEOUT)
    db.execute_write("CREATE TABLE t (x)")
    yield db
    db.close()


def values(db: Database) -> list[int]:
    return [x for (x,) in db.execute("SELECT x FROM t ORDER BY x")]


def insert(conn: sqlite3.Connection, x: int) -> None:
    conn.execute("INSERT INTO t VALUES (?)", (x,))


@pytest.mark.parametrize("raises", [False, True])
def test_a_block_that_was_entered_in_the_parent_may_be_left_in_the_child(db: Database, raises: bool) -> None:
    home = os.getpid()
    pid = -1
    try:
        with db.write() as conn, db.read() as reader:
            insert(conn, 1)
            del conn, reader
            pid = os.fork()
            if pid == 0 and raises:
                raise ValueError
            if pid != 0:
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    except ValueError:
        pass
    except BaseException:
        if os.getpid() != home:
            os._exit(1)
        raise
    if os.getpid() != home:
        os._exit(0)
    assert values(db) == [1]
    db.run_write(insert, 2)
    assert values(db) == [1, 2]


# ---- what a child may do


def test_what_a_child_is_told_is_committed_stays_when_the_parent_closes(db: Database, tmp_path: Path) -> None:
    """It may be refused, but not lose anything. The parent is idle at the fork, as a server that preloads is.

    What happens without care: SQLite's counts of locks are inherited, the locks are not. The parent, closing last as it
    thinks, deletes the `-wal` that the child writes to.
    """
    told, closed = os.pipe(), os.pipe()

    def work() -> None:
        try:
            db.run_write(insert, 0)
            os.write(told[1], b"\0")
            os.read(closed[0], 1)
            for x in range(1, 5):
                db.run_write(insert, x)
                os.write(told[1], bytes([x]))
        except BaseException as error:
            os.write(told[1], b"\xff")
            if not isinstance(error, PoolError):
                raise

    child = start(in_child, work)
    acknowledged = os.read(told[0], 1)
    db.close()
    os.write(closed[1], b"x")
    child.result(PATIENCE)
    os.set_blocking(told[0], False)
    try:
        acknowledged += os.read(told[0], 100)
    except BlockingIOError:
        pass
    for end in (*told, *closed):
        os.close(end)
    with closing(sqlite3.connect(tmp_path / "app.db")) as conn:
        rows = [x for (x,) in conn.execute("SELECT x FROM t ORDER BY x")]
    assert rows == [x for x in acknowledged if x != 255]


@pytest.mark.parametrize("way", ["run_write", "write"])
def test_a_child_forked_while_the_parent_writes_can_write_when_that_has_ended_or_is_told_in_time(
    db: Database, way: str
) -> None:
    """SQLite believes in the child that the right to write is taken, and nobody will give it back there."""
    reading, writing = os.pipe()

    def work() -> None:
        began = time.monotonic()
        told = ""
        os.write(writing, b"x")
        try:
            if way == "write":
                with db.write() as conn:
                    insert(conn, 2)
            else:
                db.run_write(insert, 2)
        except PoolError as error:
            told = str(error)
        assert not told or "the process that forked this one" in told
        assert time.monotonic() - began < TIMEOUT + 1

    with db.write() as conn:
        child = start(in_child, work)
        assert os.read(reading, 1) == b"x"
        insert(conn, 1)
    child.result(PATIENCE)
    assert values(db)[0] == 1
    db.run_write(insert, 3)
    os.close(reading)
    os.close(writing)


def queued_nothing(db: Database) -> None:
    assert db.stats().queued == 0
    assert db.close(timeout=0) == []


def test_queued_writes_are_those_of_the_parent_only(db: Database) -> None:
    with db.write():
        queued = [db.submit(insert, x) for x in range(5)] + [start(db.run_write, insert, 5)]
        eventually(lambda: db.stats().queued == 6)
        in_child(lambda: queued_nothing(db))
    for one in queued:
        one.result(PATIENCE)
    assert values(db) == [0, 1, 2, 3, 4, 5]


def has_one_right_to_write(gate: Gate, inherited: Turn) -> None:
    inherited.leave()
    with gate.turn(), pytest.raises(WriteTimeout), gate.turn(time.monotonic()):
        pass


def test_a_child_that_leaves_its_parents_turn_has_no_second_right_to_write() -> None:
    gate = Gate(None)
    with gate.turn() as turn:
        in_child(lambda: has_one_right_to_write(gate, turn))
