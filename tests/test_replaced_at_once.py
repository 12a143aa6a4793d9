"""A file is replaced between two writes of a program that does one thing after the other: not even a microsecond."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pool_support import PATIENCE

from sqlitepool import Database


def make(path: Path, value: int) -> None:
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA journal_mode = wal")
        conn.execute("CREATE TABLE t (x)")
        conn.execute("INSERT INTO t VALUES (?)", (value,))
        conn.commit()


def by_block(db: Database, sql: str) -> None:
    with db.write() as conn:
        conn.execute(sql)


def by_block_in_vain(db: Database, sql: str) -> None:
    with contextlib.suppress(KeyError), db.write() as conn:
        conn.execute(sql)
        raise KeyError


WAYS: dict[str, Callable[[Database, str], object]] = {
    "write": by_block,
    "write, rolled back": by_block_in_vain,
    "execute_write": lambda db, sql: db.execute_write(sql),
    "run_write": lambda db, sql: db.run_write(lambda conn: conn.execute(sql).rowcount),
    "submit": lambda db, sql: db.submit(lambda conn: conn.execute(sql).rowcount).result(PATIENCE),
}


@pytest.mark.filterwarnings("ignore:.*was replaced:RuntimeWarning")
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", [way for way in WAYS if way != "write, rolled back"])
def test_the_next_write_goes_to_the_new_file(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "app.db"
    for number in range(5):
        make(path, 1)
        make(tmp_path / "new.db", 2)
        with Database(path, timeout=PATIENCE) as db:
            for _ in range(number):
                WAYS[first](db, "UPDATE t SET x = 1")
            WAYS[first](db, "UPDATE t SET x = 1")
            os.replace(tmp_path / "new.db", path)
            WAYS[second](db, "UPDATE t SET x = x + 5")
        with closing(sqlite3.connect(path)) as conn:
            assert conn.execute("SELECT x FROM t").fetchone() == (7,)
        for left in tmp_path.iterdir():
            left.unlink()
