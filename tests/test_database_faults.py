"""Faults, with real parts: a full disk, a read-only folder, a file that is taken away, a COMMIT that fails.

Whatever happens, the one it happened to gets an error, the others go on, what was acknowledged is in the file and what
failed is not.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fault_scenario import FAULTS, write_both
from pool_support import PATIENCE, eventually, open_files, start
from test_files import make_database
from test_fork import in_child

from sqlitepool import Database, PoolError

HERE = Path(__file__).parent
NOBODY = 65534


# ---- the disk


@pytest.fixture(scope="session", name="shim")
def _shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler (cc) and Linux, to make single writes to the disk fail")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    source = HERE / "fault_shim.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(source)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True, timeout=PATIENCE)
    return library


def play(fault: str, database: Path, cache: int, preload: Path | None) -> dict[str, Any]:
    """Run the scenario in a process of its own, and return what the writers and readers there were told."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    command = [sys.executable, "-W", "error", str(HERE / "fault_scenario.py"), fault, str(database), str(cache)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    told: dict[str, Any] = json.loads(run.stdout)
    return told


def check_file(database: Path, acknowledged: list[int], failed: list[int]) -> None:
    with closing(sqlite3.connect(database)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        a, b = ({number for (number,) in conn.execute(f"SELECT id FROM {table}")} for table in "ab")
    assert a == b, "something is half there"
    assert a == set(acknowledged)
    assert not a & set(failed)


MESSAGES = {
    "disk full": "OperationalError: database or disk is full",
    "disk full in the midst of a commit": "OperationalError: database or disk is full",
    "write error": "OperationalError: disk I/O error",
    "sync error": "OperationalError: disk I/O error",
    "file-size limit": "OperationalError: disk I/O error",
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits or LD_PRELOAD")
@pytest.mark.parametrize("cache", [10, 20_000], ids=["statements fail", "commits fail"])
@pytest.mark.parametrize("fault", FAULTS)
def test_while_the_disk_fails_writers_get_errors_and_readers_none_and_then_all_go_on(
    fault: str, cache: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    preload = None if fault == "file-size limit" else request.getfixturevalue("shim")
    database = tmp_path / "app.db"
    told = play(fault, database, cache, preload)
    assert len(told["errors"]) == 1
    assert told["errors"][0].startswith(MESSAGES[fault])
    assert [note for note in told["notes"] if str(database) not in note] == [], "errors name the file"
    assert told["reader_errors"] == []
    assert (told["stuck"], told["left"]) == (0, 0)
    check_file(database, told["acknowledged"], told["failed"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("cache", [100, 50_000], ids=["its statement fails", "its commit fails"])
def test_of_a_group_only_the_write_that_is_too_big_for_the_disk_fails(cache: int, tmp_path: Path) -> None:
    def too_big(conn: sqlite3.Connection, number: int) -> None:
        conn.execute("INSERT INTO a VALUES (?, zeroblob(20000000))", (number,))
        conn.execute("INSERT INTO b VALUES (?, '')", (number,))

    def work() -> None:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
        with Database(tmp_path / "app.db", pragmas={"cache_size": -cache}) as db:
            with db.write() as conn:
                conn.executescript("CREATE TABLE a (id INTEGER PRIMARY KEY, t); CREATE TABLE b (id, t)")
            with together(db, 9):
                small = [start(db.run_write, write_both, number) for number in range(1, 5)]
                big = start(db.run_write, too_big, 5)
                small += [db.submit(write_both, number) for number in range(6, 10)]
            for one in small:
                one.result(PATIENCE)
            with pytest.raises(sqlite3.OperationalError):
                big.result(PATIENCE)
            db.run_write(write_both, 10)

    in_child(work)
    check_file(tmp_path / "app.db", [1, 2, 3, 4, 6, 7, 8, 9, 10], [5])


def assert_nothing_is_open(folder: Path) -> None:
    """But for the lock of the gate, which belongs to the process."""
    assert [name for name in open_files(folder) if "-gate" not in name] == []


# ---- COMMIT


@contextmanager
def together(db: Database, count: int) -> Iterator[None]:
    """Hold the right to write until that many writes are queued, so that they come into one group."""
    with db.write():
        yield
        eventually(lambda: db.stats().queued == count)


@pytest.fixture(name="db")
def _db(tmp_path: Path) -> Iterator[Database]:
    db = Database(tmp_path / "app.db", timeout=PATIENCE)
    with db.write() as conn:
        conn.executescript("""
            CREATE TABLE parent (id INTEGER PRIMARY KEY);
            CREATE TABLE child (id INTEGER PRIMARY KEY, parent REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
            INSERT INTO parent VALUES (1);
        """)
    yield db
    assert db.close() == []
    assert_nothing_is_open(tmp_path)


def insert_child(conn: sqlite3.Connection, number: int, parent: int) -> int:
    conn.execute("INSERT INTO child VALUES (?, ?)", (number, parent))
    return number


def children(db: Database) -> list[int]:
    return [number for (number,) in db.execute("SELECT id FROM child ORDER BY id")]


def test_a_commit_that_fails_is_the_error_of_the_block_and_of_nobody_else(db: Database) -> None:
    waiting: list[Future[int]] = []

    def fail() -> None:
        with db.write() as conn:
            insert_child(conn, 1, parent=99)
            waiting.extend(start(db.run_write, insert_child, number, 1) for number in (2, 3))
            waiting.extend(db.submit(insert_child, number, 1) for number in (4, 5))

    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        fail()
    assert [one.result(PATIENCE) for one in waiting] == [2, 3, 4, 5]
    with db.write() as conn:
        insert_child(conn, 6, parent=1)
    assert children(db) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("guilty", range(8))
def test_a_commit_that_fails_for_a_group_is_the_error_of_the_one_whose_fault_it_was(db: Database, guilty: int) -> None:
    def parent(number: int) -> int:
        return 99 if number == guilty else 1

    with together(db, 8):
        waiting = []
        for number in range(8):
            if number % 2:
                waiting.append(start(db.run_write, insert_child, number, parent(number)))
            else:
                waiting.append(db.submit(insert_child, number, parent(number)))
            eventually(lambda: db.stats().queued == len(waiting))
    for number, one in enumerate(waiting):
        if number == guilty:
            with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
                one.result(PATIENCE)
        else:
            assert one.result(PATIENCE) == number
    assert children(db) == [number for number in range(8) if number != guilty]
    db.execute_write("INSERT INTO child VALUES (100, 1)")


# ---- the folder and the file


@pytest.fixture(name="folder")
def _folder() -> Iterator[Path]:
    """A folder that others than its owner may enter, which those of `tmp_path` are not."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


def as_nobody(work: Callable[[], object]) -> None:
    """Run `work` in a process that may not do what root may."""

    def drop_rights_and_work() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    in_child(drop_rights_and_work)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the rights of Unix")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_database_in_a_folder_that_may_not_be_written_says_so_at_once(folder: Path, journal: str) -> None:
    path = folder / "app.db"
    make_database(path, "old")
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"PRAGMA journal_mode = {journal}")
    path.chmod(0o444)
    folder.chmod(0o555)

    def work() -> None:
        began = time.monotonic()
        with pytest.raises((PoolError, sqlite3.Error), match=r"(?i)read-?only|may not|permission|write") as caught:
            Database(path)
        assert str(path) in str(caught.value)
        assert time.monotonic() - began < 5
        assert_nothing_is_open(folder)

    as_nobody(work)
    assert sorted(os.listdir(folder)) == ["app.db"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs the rights of Unix")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_folder_that_becomes_read_only_does_not_end_what_is_open(folder: Path) -> None:
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)

    def work() -> None:
        with Database(folder / "app.db") as db:
            db.execute_write("CREATE TABLE t (x)")
            folder.chmod(0o555)
            try:
                db.execute_write("INSERT INTO t VALUES (1)")
                with db.write() as conn:
                    conn.execute("INSERT INTO t VALUES (2)")
                assert db.execute("SELECT x FROM t") == [(1,), (2,)]
            finally:
                folder.chmod(0o755)

    as_nobody(work)
