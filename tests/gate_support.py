"""What the tests of the write gate share."""

from __future__ import annotations

import threading
from time import monotonic

from pool_support import PATIENCE, eventually, start

from sqlitepool.file_lock import FileLock
from sqlitepool.gate import Gate


def use(gate: Gate, seconds: float = PATIENCE) -> None:
    with gate.turn(monotonic() + seconds):
        assert gate.holder() is not None


def hold_until(gate: Gate, got: threading.Event, go: threading.Event) -> None:
    with gate.turn() as turn:
        turn.note_sql("INSERT INTO t VALUES (1)")
        got.set()
        assert go.wait(PATIENCE)


class Holder:
    """Another thread that has the right to write during the block."""

    def __init__(self, gate: Gate) -> None:
        self._go = threading.Event()
        got = threading.Event()
        self._thread = start(hold_until, gate, got, self._go, name="the holder")
        assert got.wait(PATIENCE)

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *error: object) -> None:
        self._go.set()
        self._thread.result(PATIENCE)


def assert_sound(gate: Gate) -> None:
    """Nobody has or wants the right to write, anybody can have it at once, other processes as well."""
    start(use, gate, PATIENCE / 2).result(PATIENCE)
    assert gate.holder() is None
    assert gate.waiting() == 0
    assert len(gate._free) == 1
    if gate.database is not None:
        eventually(lambda: other_process_can_write(gate.database))


def other_process_can_write(database: str | None) -> bool:
    """Another open file is to `flock` as another process."""
    lock = FileLock(str(database))
    lock.open()
    try:
        return lock.try_to_queue()
    finally:
        lock.close()
