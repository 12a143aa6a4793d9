"""A program for tests/test_database_faults.py: threads write and read while the disk fails, and after.

    python fault_scenario.py FAULT DATABASE CACHE_KIB

It prints what each writer was told, as JSON. All faults but the file-size limit need `fault_shim.c`, loaded by
LD_PRELOAD. Run as a program, because neither a preloaded library nor the limit could be taken back.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import resource
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlitepool import Database

PATIENCE = 20.0
TEXT = "x" * 1000
SCHEMA = "CREATE TABLE a (id INTEGER PRIMARY KEY, t); CREATE TABLE b (id INTEGER PRIMARY KEY, t)"
WRITE, SYNC = 0, 1


def limit_files(begin: bool) -> None:
    """No file may grow beyond 64 KiB. Python ignores SIGXFSZ."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024 if begin else hard, hard))


def failing(operation: int, code: int, after: int = 0, suffix: bytes = b"-wal") -> Callable[[bool], None]:
    def switch(begin: bool) -> None:
        ctypes.CDLL(None).fault(suffix if begin else b"", operation, code, ctypes.c_long(after))

    return switch


FAULTS: dict[str, Callable[[bool], None]] = {
    "file-size limit": limit_files,
    "disk full": failing(WRITE, errno.ENOSPC),
    "disk full in the midst of a commit": failing(WRITE, errno.ENOSPC, after=4),
    "write error": failing(WRITE, errno.EIO),
    "sync error": failing(SYNC, errno.EIO),
}


def write_both(conn: sqlite3.Connection, number: int) -> None:
    conn.execute("INSERT INTO a VALUES (?, ?)", (number, TEXT))
    conn.execute("INSERT INTO b VALUES (?, ?)", (number, TEXT))


class Writer:
    """One thread that writes, and what it was told."""

    numbers = itertools.count(1)

    def __init__(self, write: Callable[[int], object]) -> None:
        self.write = write
        self.acknowledged: list[int] = []
        self.failed: list[int] = []
        self.errors: set[str] = set()
        self.notes: set[str] = set()

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            number = next(self.numbers)
            try:
                self.write(number)
            except Exception as error:
                self.failed.append(number)
                self.errors.add(f"{type(error).__name__}: {error}")
                self.notes.update(getattr(error, "__notes__", ["no note"]))
                time.sleep(0.001)
            else:
                self.acknowledged.append(number)


class Reader:
    """One thread that reads."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.seen: list[int] = []
        self.errors: set[str] = set()

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                with self.db.read() as conn:
                    a, b = conn.execute("SELECT (SELECT max(id) FROM a), (SELECT max(id) FROM b)").fetchone()
                assert a == b, "half of a write was seen"
                self.seen.append(a)
            except Exception as error:
                self.errors.add(f"{type(error).__name__}: {error}")
            time.sleep(0.001)


def in_block(db: Database, number: int) -> None:
    with db.write() as conn:
        write_both(conn, number)


def until_more(lists: list[list[int]], what: str) -> None:
    """Wait until each of the lists, one of a thread each, has grown by three."""
    goals = [(numbers, len(numbers) + 3) for numbers in lists]
    deadline = time.monotonic() + PATIENCE
    while any(len(numbers) < goal for numbers, goal in goals):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all {what}: {[len(numbers) for numbers in lists]}")
        time.sleep(0.001)


def main(fault: str, path: str, cache: str) -> dict[str, Any]:
    switch = FAULTS[fault]
    db = Database(path, durable=True, readers=2, timeout=PATIENCE, pragmas={"cache_size": -int(cache)})
    with db.write() as conn:
        conn.executescript(SCHEMA)
    writers = [
        *(Writer(lambda number: db.run_write(write_both, number)) for _ in range(3)),
        *(Writer(lambda number: in_block(db, number)) for _ in range(2)),
        *(Writer(lambda number: db.submit(write_both, number).result(PATIENCE)) for _ in range(2)),
    ]
    readers = [Reader(db) for _ in range(2)]
    stop = threading.Event()
    works = [one.run for one in writers] + [one.run for one in readers]
    threads = [threading.Thread(target=work, args=(stop,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    acknowledged, failed = [one.acknowledged for one in writers], [one.failed for one in writers]
    until_more(acknowledged, "writers could write at first")
    switch(True)
    until_more(failed, "writers failed")
    until_more([one.seen for one in readers], "readers went on while no write was possible")
    until_more(failed, "writers failed again")
    switch(False)
    until_more(acknowledged, "writers could write again")
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    left = db.close(timeout=PATIENCE)
    return {
        "acknowledged": list(itertools.chain(*acknowledged)),
        "failed": list(itertools.chain(*failed)),
        "errors": sorted(set().union(*(one.errors for one in writers))),
        "notes": sorted(set().union(*(one.notes for one in writers))),
        "reader_errors": sorted(set().union(*(one.errors for one in readers))),
        "left": len(left),
        "stuck": sum(thread.is_alive() for thread in threads),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
