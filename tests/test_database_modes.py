"""A database without WAL, and one in memory: nobody hears "database is locked" there either."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from database_support import CREATE, database, held, insert, numbers
from pool_support import PATIENCE, eventually, start

from sqlitepool import Database, PoolDeadlock, PoolTimeout, WriteTimeout

db = database


@pytest.mark.parametrize("mode", ["delete", "memory"])
def test_without_wal_nobody_hears_that_the_database_is_locked(tmp_path: Path, mode: str) -> None:
    path = ":memory:" if mode == "memory" else str(tmp_path / "app.db")
    with Database(path, pragmas={} if mode == "memory" else {"journal_mode": "delete"}) as db:
        db.execute_write(CREATE)
        stop = threading.Event()

        def read() -> int:
            count = 0
            while not stop.is_set():
                with db.read() as conn:
                    first = conn.execute("SELECT count(*) FROM t").fetchall()
                    assert conn.execute("SELECT count(*) FROM t").fetchall() == first
                db.execute("SELECT 1 FROM t LIMIT 1")
                count += 1
            return count

        def write(base: int) -> None:
            for n in range(base, base + 30, 3):
                db.run_write(insert, n)
                with db.write() as conn:
                    insert(conn, n + 1)
                db.submit(insert, n + 2).result(PATIENCE)

        readers = [start(read) for _ in range(3)]
        for writer in [start(write, base) for base in (0, 30, 60)]:
            writer.result(PATIENCE)
        stop.set()
        for reader in readers:
            assert reader.result(PATIENCE)
        assert numbers(db) == list(range(90))
        assert db.stats().wal_bytes == 0
        assert db.checkpoint().is_complete


def test_without_wal_a_commit_that_waits_for_a_reader_in_vain_names_it(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", pragmas={"journal_mode": "delete"}) as db:
        db.execute_write(CREATE)
        reading, go = threading.Event(), threading.Event()

        def read() -> None:
            with db.read():
                reading.set()
                assert go.wait(PATIENCE)

        reader = start(read, name="the reader")
        assert reading.wait(PATIENCE)
        with pytest.raises(WriteTimeout, match="the reader"), db.write(timeout=0.1) as conn:
            insert(conn, 1)
        late = start(db.run_write, insert, 2)
        eventually(lambda: db.stats().holder is not None)
        go.set()
        reader.result(PATIENCE)
        assert late.result(PATIENCE) == 2
        assert numbers(db) == [2]


def test_in_memory_reading_inside_of_a_write_block_is_an_error_at_once() -> None:
    with Database(":memory:") as db:
        db.execute_write(CREATE)
        with db.write() as conn:
            insert(conn, 1)
            with pytest.raises(PoolDeadlock, match="in memory"):
                db.execute("SELECT 1")
            with pytest.raises(PoolTimeout):
                start(lambda: db.execute("SELECT n FROM t", timeout=0.1)).result(PATIENCE)
        assert numbers(db) == [1]


def test_two_databases_in_memory_are_two() -> None:
    with Database(":memory:") as one, Database(":memory:") as other:
        one.execute_write(CREATE)
        assert one.execute("SELECT count(*) FROM sqlite_master WHERE name = 't'") == [(1,)]
        assert other.execute("SELECT count(*) FROM sqlite_master") == [(0,)]


@pytest.mark.parametrize("is_open", [True, False], ids=["an open connection", "one to be opened"])
@pytest.mark.parametrize("mode", ["delete", "memory"])
def test_without_wal_a_reader_waits_for_a_lock_no_longer_than_its_timeout(
    tmp_path: Path, mode: str, is_open: bool
) -> None:
    path = ":memory:" if mode == "memory" else str(tmp_path / "app.db")
    with Database(path, pragmas={} if mode == "memory" else {"journal_mode": "delete"}) as db:
        db.execute_write(CREATE)
        if is_open:
            assert numbers(db) == []
        with exclusive(db):
            for call in (lambda: db.execute("SELECT n FROM t", timeout=0.2), lambda: read(db, 0.2)):
                began = time.monotonic()
                with pytest.raises(PoolTimeout):
                    call()
                assert 0.2 <= time.monotonic() - began < 3  # SQLite would wait for 5 seconds
            late = start(numbers, db)
        assert late.result(PATIENCE) in ([], [1000])


def read(db: Database, timeout: float) -> None:
    with db.read(timeout=timeout):
        pass


@contextmanager
def exclusive(db: Database) -> Iterator[None]:
    """Keep everybody from reading."""
    if db._opener.target.memory:
        with held(db):
            yield
    else:
        with closing(sqlite3.connect(str(db._opener.target.file), isolation_level=None)) as foreign:
            foreign.execute("BEGIN EXCLUSIVE")
            yield
