"""Threads that write to a `Database` and read from it all the time, and what they were told."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pool_support import PATIENCE, eventually, start

from sqlitepool import Database, PoolError


class Load:
    """Threads that write and read all the time, and what the writers were told.

    Attributes:
        after: the rows that were asked for after `mark` and acknowledged.
        errors: what else they and the readers got.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.stop, self.marked = threading.Event(), threading.Event()
        self.served = 0
        self.after: list[str] = []
        self.errors: list[BaseException] = []
        works = [self.run_write, self.write, self.submit, self.read, self.read]
        self.threads = [start(self.repeat, work, number) for number, work in enumerate(works)]

    def repeat(self, work: Callable[[str], object], thread: int) -> None:
        number = 0
        while not self.stop.is_set():
            number += 1
            text, marked = f"{thread}-{number}", self.marked.is_set()
            try:
                work(text)
            except (sqlite3.Error, PoolError, FileNotFoundError) as error:
                self.errors.append(error)
                time.sleep(0.002)
            else:
                self.served += 1
                if marked and work != self.read:
                    self.after.append(text)

    def run_write(self, text: str) -> None:
        self.db.run_write(insert_text, text)

    def write(self, text: str) -> None:
        with self.db.write() as conn:
            insert_text(conn, text)

    def submit(self, text: str) -> None:
        self.db.submit(insert_text, text).result(PATIENCE)

    def read(self, text: str) -> None:
        with self.db.read() as conn:
            conn.execute("SELECT max(rowid), x FROM t").fetchall()

    def until_more(self) -> None:
        goal = self.served + 30
        eventually(lambda: self.served >= goal)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.result(PATIENCE)


def insert_text(conn: sqlite3.Connection, text: str) -> None:
    conn.execute("INSERT INTO t VALUES (?)", (text,))


@contextmanager
def under_load(path: Path) -> Iterator[Load]:
    with Database(path, timeout=PATIENCE) as db:
        load = Load(db)
        try:
            load.until_more()
            yield load
        finally:
            load.end()


def in_file(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {text for (text,) in conn.execute("SELECT x FROM t")}
