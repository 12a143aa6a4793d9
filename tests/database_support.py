"""What the tests of `Database` share: one with a table of numbers, and threads that write there together.

Who wants the fixture writes `db = database`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest
from pool_support import PATIENCE, eventually, start

from sqlitepool import Database

CREATE = "CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER UNIQUE)"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "app.db", timeout=PATIENCE, name=tmp_path.name) as db:
        db.execute_write(CREATE)
        yield db


def insert(conn: sqlite3.Connection, number: int) -> int:
    conn.execute("INSERT INTO t (n) VALUES (?)", (number,))
    return number


def numbers(db: Database) -> list[int]:
    """The numbers in the table, the smallest first."""
    return [n for (n,) in db.execute("SELECT n FROM t ORDER BY n")]


def in_order(db: Database) -> list[int]:
    """The numbers in the table, in the order in which they were written."""
    return [n for (n,) in db.execute("SELECT n FROM t ORDER BY id")]


def await_queued(db: Database, count: int) -> None:
    eventually(lambda: db.stats().queued == count)


def batch(db: Database, *functions: object) -> list[Future[object]]:
    """Have the functions run in one group commit, in this order, each called by a thread of its own."""
    calls: list[Future[object]] = []
    with db.write():
        for number, function in enumerate(functions):
            assert callable(function)
            calls.append(start(db.run_write, function))
            await_queued(db, number + 1)
    wait(calls, PATIENCE)
    return calls


def hold(db: Database, entered: threading.Event, go: threading.Event) -> None:
    with db.write() as conn:
        insert(conn, 1000)
        entered.set()
        assert go.wait(PATIENCE)


@contextlib.contextmanager
def held(db: Database) -> Iterator[None]:
    """Have another thread, "the holder", hold the right to write."""
    entered, go = threading.Event(), threading.Event()
    holder = start(hold, db, entered, go, name="the holder")
    assert entered.wait(PATIENCE)
    try:
        yield
    finally:
        go.set()
        holder.result(PATIENCE)
