"""A platform without `fcntl` (Windows, WebAssembly) has everything but the lock between processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys, warnings
sys.modules["fcntl"] = None  # so that importing it fails

from sqlitepool import ConnectionPool, Database

with ConnectionPool("app.db") as pool, pool.connection() as conn:
    conn.execute("CREATE TABLE t (n INTEGER)")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with Database("app.db") as db:
        db.execute_write("INSERT INTO t VALUES (1)")
        with db.write() as conn:
            conn.execute("INSERT INTO t VALUES (2)")
        print(db.execute("SELECT n FROM t"))
print([warning.category.__name__ for warning in caught])
print(str(caught[0].message))
"""


def test_without_fcntl_a_warning_says_what_is_missing_and_the_rest_works(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = result.stdout.splitlines()
    assert lines[:2] == ["[(1,), (2,)]", "['RuntimeWarning']"], result.stderr
    assert "fair within this process only" in lines[2]
