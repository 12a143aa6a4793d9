"""What `stats()` tells can be used as it is declared."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

from database_support import held

from sqlitepool import Database, DatabaseStats, GateHolder, LeaseInfo


def test_the_holder_is_declared_with_its_last_statement(tmp_path: Path) -> None:
    assert get_type_hints(DatabaseStats)["holder"] == GateHolder | None
    assert issubclass(GateHolder, LeaseInfo)
    with Database(tmp_path / "app.db") as db:
        db.execute_write("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER)")
        assert db.stats().holder is None
        with held(db):
            holder = db.stats().holder
            assert holder is not None
            assert holder.last_sql == "INSERT INTO t (n) VALUES (?)"
            assert str(holder).startswith("thread 'the holder' for ")
            assert str(holder).endswith("last statement 'INSERT INTO t (n) VALUES (?)'")
