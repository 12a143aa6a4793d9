"""Promise 8, on the file: what SQLite believes to have locked in a forked child is locked, so nothing is lost."""

from __future__ import annotations

import os
import signal
import sqlite3
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from test_fork import in_child

from sqlitepool import ConnectionPool

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()"),
    # What we test is what this warning, of Python 3.12, is about.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA journal_mode = WAL")
        conn.execute("CREATE TABLE t (x INTEGER PRIMARY KEY)")
    return path


def insert(pool: ConnectionPool[sqlite3.Connection], numbers: range) -> None:
    for number in numbers:
        with pool.connection() as conn:
            conn.execute("INSERT INTO t VALUES (?)", (number,))


def rows(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [number for (number,) in conn.execute("SELECT x FROM t ORDER BY x")]


class Child:
    """A forked child that runs `work(pause)`; at `pause()` it waits until the parent calls `go_on`."""

    def __init__(self, work: Callable[[Callable[[], object]], object]) -> None:
        paused, self._go = os.pipe(), os.pipe()
        self._paused = paused[0]
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                signal.alarm(20)
                work(lambda: (os.write(paused[1], b"."), os.read(self._go[0], 1)))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(paused[1])

    def await_pause(self) -> None:
        assert os.read(self._paused, 1) == b".", "the child has failed"

    def go_on(self) -> None:
        os.write(self._go[1], b".")
        assert os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]) == 0


@pytest.mark.parametrize("lent", [False, True], ids=["idle at the fork", "lent at the fork"])
def test_what_a_child_commits_stays_when_the_parent_closes(path: Path, lent: bool) -> None:
    """The parent's last close would delete the journal that the child writes to, if the child's locks were missing."""
    pool = ConnectionPool(path)
    insert(pool, range(1))
    held = pool.acquire() if lent else None

    def work(pause: Callable[[], object]) -> None:
        insert(pool, range(1, 2))
        pause()
        insert(pool, range(2, 12))

    child = Child(work)
    child.await_pause()
    if held is not None:
        pool.release(held)
    pool.close()
    child.go_on()
    assert rows(path) == list(range(12))


def test_a_reader_in_a_child_keeps_its_snapshot_while_the_parent_checkpoints(path: Path) -> None:
    """A checkpoint may begin the journal anew only if no reader needs it; in the child nobody would see the reader."""
    with ConnectionPool(path, isolation_level=None) as pool:
        insert(pool, range(100))
        reader = pool.acquire()  # a reader of the parent at the fork: its mark is what the child's reader shares
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM t").fetchone()

        def work(pause: Callable[[], object]) -> None:
            with pool.connection() as conn:
                conn.execute("BEGIN")
                assert conn.execute("SELECT count(*), sum(x) FROM t").fetchone() == (100, 4950)
                pause()
                conn.execute("PRAGMA cache_size = 1")
                conn.execute("PRAGMA shrink_memory")
                assert conn.execute("SELECT count(*), sum(x) FROM t").fetchone() == (100, 4950)
                conn.execute("ROLLBACK")

        child = Child(work)
        child.await_pause()
        reader.execute("ROLLBACK")
        pool.release(reader)
        for number in range(100, 130):
            with pool.connection() as conn:
                conn.execute("INSERT INTO t VALUES (?)", (number,))
                conn.execute("PRAGMA wal_checkpoint")
        with pool.connection() as conn:
            conn.execute("DELETE FROM t WHERE x < 100")
            conn.execute("PRAGMA wal_checkpoint")
        child.go_on()
    assert rows(path) == list(range(100, 130))


def test_a_grandchild_has_the_locks_too(path: Path) -> None:
    """What it believes to have locked, it has from its grandparent."""
    pool = ConnectionPool(path)
    insert(pool, range(1))

    def work(pause: Callable[[], object]) -> None:
        insert(pool, range(1, 2))

        def work_of_grandchild() -> None:
            insert(pool, range(2, 3))
            pause()
            insert(pool, range(3, 12))

        in_child(work_of_grandchild)

    child = Child(work)
    child.await_pause()
    pool.close()
    child.go_on()
    assert rows(path) == list(range(12))
