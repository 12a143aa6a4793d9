"""`close()` wakes who waits to write, and nobody gets the right to write for a closed database."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from database_support import CREATE, await_queued, database, held, in_order, insert
from pool_support import PATIENCE, eventually, start

from sqlitepool import Database, PoolClosed

db = database


def write(db: Database) -> None:
    with db.write() as conn:
        insert(conn, 1)


def isolated(db: Database) -> None:
    with db.isolated() as conn:
        insert(conn, 1)


WAYS: dict[str, Callable[[Database], object]] = {
    "write": write,
    "isolated": isolated,
    "checkpoint": lambda db: db.checkpoint(),
    "run_write": lambda db: db.run_write(insert, 1),
    "execute_write": lambda db: db.execute_write("INSERT INTO t (n) VALUES (1)"),
}


def fails_as_closed(call: Future[object], name: str) -> None:
    with pytest.raises(PoolClosed) as caught:
        call.result(PATIENCE)
    assert str(caught.value) == f"database {name!r} is closed"


@pytest.mark.parametrize("way", WAYS)
def test_close_wakes_who_waits_to_write(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("sqlitepool.gate._PATIENCE", PATIENCE)
    with Database(tmp_path / "app.db", timeout=PATIENCE) as other:
        with held(other):
            call = start(WAYS[way], db)
            neighbour = start(other.run_write, insert, 2)
            eventually(lambda: other.stats().gate_waiting == 2)
            began = time.monotonic()
            assert db.close(timeout=0.1) == []
            fails_as_closed(call, db.name)
            assert time.monotonic() - began < PATIENCE / 2
            assert not neighbour.done()
        assert neighbour.result(PATIENCE) == 2
        assert in_order(other) == [1000, 2]


def test_what_is_queued_is_written_before_blocks_that_wait_are_refused(db: Database, tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", timeout=PATIENCE) as other:
        with held(other):
            queued = [start(db.run_write, insert, 1)]
            await_queued(db, 1)
            queued.append(db.submit(insert, 2))
            block = start(write, db)
            eventually(lambda: other.stats().gate_waiting == 2)
            closing = start(db.close)
            fails_as_closed(block, db.name)
            assert not closing.done()
        assert closing.result(PATIENCE) == []
        assert [call.result(PATIENCE) for call in queued] == [1, 2]


def test_what_cannot_be_written_in_time_fails(db: Database, tmp_path: Path) -> None:
    with Database(tmp_path / "app.db", timeout=PATIENCE) as other, held(other):
        queued = [start(db.run_write, insert, 1), start(db.run_write, insert, 2)]
        await_queued(db, 2)
        queued.append(db.submit(insert, 3))
        db.close(timeout=0.1)
        for call in queued:
            fails_as_closed(call, db.name)


@pytest.mark.parametrize("way", ["write", "isolated"])
@pytest.mark.parametrize("is_held", [False, True])
def test_a_block_that_was_made_before_is_not_entered_after(
    db: Database, tmp_path: Path, way: str, is_held: bool
) -> None:
    block = db.write() if way == "write" else db.isolated()
    if is_held:
        with held(db):
            db.close(timeout=0.1)
    else:
        db.close()
    with pytest.raises(PoolClosed) as caught, block:
        pass
    assert str(caught.value) == f"database {db.name!r} is closed"
    with Database(tmp_path / "app.db") as other:
        assert in_order(other) == [1000] * is_held


def test_who_waits_for_room_is_woken(tmp_path: Path) -> None:
    db = Database(tmp_path / "app.db", timeout=PATIENCE, max_queue=1)
    db.execute_write(CREATE)
    with held(db):
        first = db.submit(insert, 1)
        late = start(db.submit, insert, 2)
        eventually(lambda: db._group._without_room)
        assert db.close(timeout=0.1)
        fails_as_closed(first, "app.db")
        fails_as_closed(late.result(PATIENCE), "app.db")
