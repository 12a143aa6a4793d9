"""What becomes of the write-ahead log must not show in the writes: a commit that succeeded is never an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits the size of files")

PROGRAM = """
import resource, signal, sqlite3, sys
from sqlitepool import Database, wal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
wal.MOST_BYTES, wal._LOOK_EVERY = 4_000_000, 0.0
with Database(sys.argv[1], pragmas={"wal_autocheckpoint": 0}) as db:
    with db.write() as conn:
        conn.execute("CREATE TABLE t (x INTEGER PRIMARY KEY, y BLOB)")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, resource.RLIM_INFINITY))
    acknowledged = 0
    try:
        while True:
            with db.write() as conn:
                conn.execute("INSERT INTO t (y) VALUES (zeroblob(500000))")
            acknowledged += 1
    except sqlite3.Error as error:
        reason = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(acknowledged, db.execute("SELECT count(*) FROM t")[0][0], reason)
"""


def test_a_log_that_cannot_be_cut_is_no_error_of_the_commit(tmp_path: Path) -> None:
    """The database may not grow, so each try to cut the log fails: what was committed is acknowledged all the same."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "app.db")], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    acknowledged, rows = ended.stdout.split()[:2]
    assert int(acknowledged) == int(rows) > 7, ended.stdout
    assert "could not be cut" in ended.stderr, "the test has not come to that point"
