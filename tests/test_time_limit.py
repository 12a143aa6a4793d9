"""Time limits of queries, the unusual ones."""

from __future__ import annotations

import sqlite3

import pytest
from database_support import database
from pool_support import PATIENCE, rows, start

from sqlitepool import Database, QueryTimeout

db = database

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.mark.parametrize("endless", [float("inf"), 1e10, 1e300])
def test_a_limit_beyond_all_clocks_never_comes_and_leaves_the_others_in_force(db: Database, endless: float) -> None:
    with db.read(time_limit=endless) as conn:
        assert rows(conn, "SELECT 1") == [(1,)]
        for _ in range(2):
            interrupted = start(lambda: db.execute(FOREVER, time_limit=0.05))
            with pytest.raises(QueryTimeout):
                interrupted.result(PATIENCE)


def test_endless_timeouts_are_those_of_none(db: Database) -> None:
    endless = float("inf")
    with db.isolated(timeout=endless) as conn:
        assert rows(conn, "SELECT 1") == [(1,)]
    with db.read(timeout=endless), db.write(timeout=endless):
        pass
    assert db.checkpoint(timeout=endless).is_complete


def test_who_catches_the_interruption_has_dealt_with_it(db: Database) -> None:
    with db.read(time_limit=0.05) as conn, pytest.raises(sqlite3.OperationalError, match="interrupted"):
        conn.execute(FOREVER)
    assert db.execute("SELECT 1") == [(1,)]
