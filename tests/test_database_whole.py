"""What concerns a whole `Database`: isolated connections, backups, checkpoints, statistics, the end."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from database_support import CREATE, database, insert, numbers
from pool_support import PATIENCE, eventually, start

import sqlitepool.wal
from sqlitepool import CheckpointResult, Database, GateHolder, PoolClosed, PoolDeadlock

db = database


def test_an_isolated_connection_is_in_autocommit_and_closed_at_the_end(db: Database, tmp_path: Path) -> None:
    db.run_write(insert, 1)
    with db.isolated() as conn:
        conn.execute("VACUUM")
        conn.execute("ATTACH ? AS other", (str(tmp_path / "other.db"),))
        conn.execute("CREATE TABLE other.copy AS SELECT * FROM t")
        conn.execute("BEGIN")
        insert(conn, 2)
    assert numbers(db) == [1, 2]
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        conn.execute("SELECT 1")


def test_an_isolated_block_holds_the_right_to_write(db: Database) -> None:
    with db.isolated() as conn:
        conn.execute("BEGIN IMMEDIATE")
        late = start(db.run_write, insert, 1)
        eventually(lambda: db.stats().gate_waiting == 1)
        holder = db.stats().holder
        assert holder is not None
        assert holder.thread_name == threading.current_thread().name
    assert late.result(PATIENCE) == 1


def test_what_would_wait_for_its_own_write_block_is_an_error_at_once(db: Database) -> None:
    with db.write():
        with pytest.raises(PoolDeadlock, match="isolated"), db.isolated():
            pass
        with pytest.raises(PoolDeadlock, match="checkpoint"):
            db.checkpoint()


def test_a_backup_is_of_one_moment_and_replaces_the_file_at_one_stroke(db: Database, tmp_path: Path) -> None:
    db.executemany_write("INSERT INTO t (n) VALUES (?)", [(n,) for n in range(5000)])
    db.execute_write("CREATE TABLE big AS SELECT zeroblob(10000) AS x FROM t")
    copy = tmp_path / "copy.db"
    copy.write_bytes(b"the backup of yesterday")
    calls: list[tuple[int, int]] = []

    def progress(status: int, remaining: int, total: int) -> None:
        calls.append((remaining, total))
        db.run_write(insert, 10_000 + len(calls))
        assert copy.read_bytes() == b"the backup of yesterday"

    db.backup(copy, progress=progress)
    assert len(calls) > 5
    assert calls[-1][0] == 0
    with Database(copy) as restored:
        assert numbers(restored) == list(range(5000))
        assert restored.execute("PRAGMA integrity_check") == [("ok",)]
    assert sorted(path.name for path in tmp_path.glob("copy*") if "gate" not in path.name) == ["copy.db"]


def test_a_backup_that_fails_leaves_the_old_one(db: Database, tmp_path: Path) -> None:
    db.run_write(insert, 1)
    copy = tmp_path / "copy.db"
    copy.write_bytes(b"yesterday")

    def progress(*_: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        db.backup(copy, progress=progress)
    assert [path.name for path in tmp_path.glob("copy*")] == ["copy.db"]
    assert copy.read_bytes() == b"yesterday"


def test_a_backup_overwrites_nothing_that_is_in_use(db: Database, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its own backup"):
        db.backup(tmp_path / "app.db")
    with Database(tmp_path / "other.db") as other:
        other.execute_write("CREATE TABLE t (x)")
        with pytest.raises(FileExistsError):
            db.backup(tmp_path / "other.db")


def test_a_backup_into_a_connection(db: Database) -> None:
    db.run_write(insert, 1)
    copy = sqlite3.connect(":memory:")
    db.backup(copy)
    assert copy.execute("SELECT n FROM t").fetchall() == [(1,)]
    copy.close()


def test_a_checkpoint_empties_the_log(db: Database) -> None:
    db.run_write(insert, 1)
    assert db.stats().wal_bytes > 0
    assert db.checkpoint().is_complete
    assert db.stats().wal_bytes == 0


def test_a_checkpoint_that_a_reader_blocks_names_the_reader_and_lets_others_write(db: Database) -> None:
    db.run_write(insert, 1)
    reading, go = threading.Event(), threading.Event()

    def read() -> None:
        with db.read() as conn:
            conn.execute("SELECT * FROM t").fetchall()
            reading.set()
            assert go.wait(PATIENCE)

    reader = start(read, name="the reader")
    assert reading.wait(PATIENCE)
    db.run_write(insert, 2)
    result = db.checkpoint(timeout=0.1)
    assert isinstance(result, CheckpointResult)
    assert not result.is_complete
    assert result.blocked_by is not None
    assert result.blocked_by.thread_name == "the reader"
    assert result.blocked_by.where.endswith(".read")
    patient = start(lambda: db.checkpoint(timeout=PATIENCE))
    for n in range(3, 30):
        db.run_write(insert, n)
    assert not patient.done()
    go.set()
    reader.result(PATIENCE)
    assert patient.result(PATIENCE).is_complete


def test_the_log_stays_bounded_while_readers_come_and_go(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlitepool.wal, "MOST_BYTES", 5_000_000)
    monkeypatch.setattr(sqlitepool.wal, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(sqlitepool.wal, "_TRY_EVERY", 0.01)
    monkeypatch.setattr(sqlitepool.wal, "_PATIENCE", PATIENCE)  # on a busy machine a reader takes longer than 50 ms
    db.execute_write("CREATE TABLE big (x)")
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with db.read() as conn:
                for _ in conn.execute("SELECT x FROM big LIMIT 20"):
                    stop.wait(0.0005)

    readers = [start(read) for _ in range(3)]
    most = 0
    for _ in range(600):
        db.execute_write("INSERT INTO big VALUES (zeroblob(100000))")
        most = max(most, db.stats().wal_bytes)
    stop.set()
    for reader in readers:
        reader.result(PATIENCE)
    assert 1_000_000 < most < 40_000_000


def test_stats_tell_what_was_done(db: Database) -> None:
    before = db.stats()
    for n in range(3):
        db.run_write(insert, n)
    with db.write() as conn:
        insert(conn, 10)
        conn.execute("SELECT 'the last one'")
        holder = db.stats().holder
    stats = db.stats()
    assert (stats.commits - before.commits, stats.jobs - before.jobs, stats.queued) == (4, 3, 0)
    assert stats.mean_batch == stats.jobs / stats.batches
    assert stats.wait_seconds.count == stats.commits
    assert stats.job_wait_seconds.count == stats.jobs
    assert stats.readers.in_use == 0
    assert stats.holder is None
    assert isinstance(holder, GateHolder)
    assert "the last one" in str(holder)
    assert "test_stats_tell_what_was_done" in holder.where
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.jobs = 3  # type: ignore[misc]


# -- the end


def test_close_finishes_what_was_submitted_and_leaves_no_log(tmp_path: Path) -> None:
    db = Database(tmp_path / "app.db")
    db.execute_write(CREATE)
    futures: list[Future[int]] = []
    with db.write():
        futures += [db.submit(insert, n) for n in range(100)]
    assert numbers(db) is not None
    assert db.close() == []
    assert [future.result(0) for future in futures] == list(range(100))
    assert sorted(path.name for path in tmp_path.iterdir() if "gate" not in path.name) == ["app.db"]
    assert db.close() == []
    with Database(tmp_path / "app.db") as again:
        assert numbers(again) == list(range(100))


def test_close_refuses_new_work(db: Database) -> None:
    db.close()
    for call in (
        lambda: db.execute("SELECT 1"),
        lambda: db.run_write(insert, 1),
        lambda: db.submit(insert, 1),
        lambda: db.write(),
        lambda: db.read(),
        lambda: db.isolated(),
        lambda: db.checkpoint(),
    ):
        with pytest.raises(PoolClosed):
            call()


def test_close_reports_what_is_still_out_and_fails_what_it_cannot_finish(tmp_path: Path) -> None:
    db = Database(tmp_path / "app.db")
    db.execute_write(CREATE)
    entered, go = threading.Event(), threading.Event()

    def write() -> None:
        with db.write() as conn:
            insert(conn, 1)
            entered.set()
            assert go.wait(PATIENCE)

    writer = start(write, name="the writer")
    assert entered.wait(PATIENCE)
    future = db.submit(insert, 2)
    still_out = start(lambda: db.close(timeout=0.05)).result(PATIENCE)
    assert [lease.thread_name for lease in still_out] == ["the writer"]
    with pytest.raises(PoolClosed):
        future.result(PATIENCE)
    go.set()
    writer.result(PATIENCE)
    assert db.close() == []
    with Database(tmp_path / "app.db") as again:
        assert numbers(again) == [1]


def test_close_inside_of_a_write_block_does_not_wait_for_it(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)
        assert len(db.close()) == 1
    with Database(os.path.realpath(db._opener.target.file or "")) as again:
        assert numbers(again) == [1]


def test_called_by_no_python_code_as_atexit_does_it_writes_and_closes_all_the_same(tmp_path: Path) -> None:
    script = """
import atexit, sys
from sqlitepool import Database
db = Database(sys.argv[1])
db.execute_write("CREATE TABLE t (n)")
atexit.register(db.close)
atexit.register(db.checkpoint)
atexit.register(db.execute, "SELECT n FROM t")
atexit.register(db.execute_write, "INSERT INTO t VALUES (1)")
"""
    path = tmp_path / "app.db"
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not Path(f"{path}-wal").exists()
    with Database(path) as db:
        assert db.execute("SELECT n FROM t") == [(1,)]
