"""The ways to write that are compared, each as its own documentation says, with the same PRAGMAs on all.

Each is a class: made with the path of the database and the level of `synchronous`, it has `insert(number)`, which
returns when that row is committed and that any thread may call, and `close()`. They import what they need when they
are made, so that the programs can say what is missing.
"""

import asyncio
import itertools
import sqlite3
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from _crowd import Result, Tally, crowd, summary
from _peers import Peer

BUSY_TIMEOUT = "busy_timeout"
SQLALCHEMY = "SQLAlchemy QueuePool"
PEEWEE = "peewee SqliteQueueDatabase"
DATASETTE = "Datasette Database"
RUN_WRITE = "sqlitepool run_write"
WRITE = "sqlitepool write()"
SUBMIT = "sqlitepool submit"
OURS = (RUN_WRITE, WRITE, SUBMIT)

PATIENCE = 30.0
"""Seconds for which each of them may wait to write."""
SEED = 1000
"""The database begins with rows of these numbers; what the contestants write comes after."""
SCHEMA = "CREATE TABLE log (id INTEGER PRIMARY KEY, text TEXT NOT NULL)"
INSERT = "INSERT INTO log VALUES (?, ?)"
TEXT = "what happened, in so many words: " + "x" * 67


class Way(Protocol):
    """A way to write."""

    def insert(self, number: int) -> object: ...
    def close(self) -> object: ...


def connect(path: str, synchronous: str) -> sqlite3.Connection:
    """Open a connection that waits for others as SQLite does it: it asks again and again."""
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(f"PRAGMA journal_size_limit = {64 * 1024 * 1024}")
    return connection


def create_log(path: str) -> None:
    connection = connect(path, "FULL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN")
    connection.execute(SCHEMA)
    connection.executemany(INSERT, ((number, TEXT) for number in range(SEED)))
    connection.execute("COMMIT")
    connection.close()


def insert_in_transaction(connection: Any, number: int) -> None:
    """What everybody does who writes by hand. A COMMIT that fails leaves the transaction open."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(INSERT, (number, TEXT))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


# ---- the peers


class BusyTimeout(threading.local):
    """A connection for each thread: `threading.local` calls `__init__` in each thread that comes."""

    def __init__(self, path: str, synchronous: str, opened: list[sqlite3.Connection]) -> None:
        self.opened = opened
        self.connection = connect(path, synchronous)
        opened.append(self.connection)

    def insert(self, number: int) -> None:
        insert_in_transaction(self.connection, number)

    def close(self) -> None:
        for connection in self.opened:
            connection.close()


class SqlalchemyQueuePool:
    """As it comes: five connections, ten more at need."""

    def __init__(self, path: str, synchronous: str) -> None:
        from sqlalchemy.pool import QueuePool

        creator: Callable[[], Any] = partial(connect, path, synchronous)
        self.pool = QueuePool(creator, timeout=PATIENCE)

    def insert(self, number: int) -> None:
        connection = self.pool.connect()
        try:
            insert_in_transaction(connection.driver_connection, number)
        finally:
            connection.close()

    def close(self) -> None:
        self.pool.dispose()


class PeeweeQueue:
    """One thread writes for all. It commits each statement by itself; transactions are not supported.

    `execute_sql` returns at once, before anything is written; to ask for the result waits for the commit.
    """

    def __init__(self, path: str, synchronous: str) -> None:
        from playhouse.sqliteq import SqliteQueueDatabase

        self.database = SqliteQueueDatabase(
            path, pragmas={"synchronous": synchronous}, timeout=PATIENCE, results_timeout=PATIENCE
        )

    def insert(self, number: int) -> None:
        self.database.execute_sql(INSERT, (number, TEXT)).fetchall()

    def close(self) -> None:
        self.database.stop()
        self.database.close()


class DatasetteDatabase:
    """One thread writes for all who await it, in an event loop: so tasks take part here, not threads."""

    def __init__(self, path: str, synchronous: str) -> None:
        from datasette.app import Datasette
        from datasette.database import Database

        self.datasette = Datasette([])
        self.database = self.datasette.add_database(Database(self.datasette, path=path, is_mutable=True), name="log")
        self.synchronous = synchronous

    async def begin(self) -> None:
        await self.database.execute_write_fn(
            lambda connection: connection.execute(f"PRAGMA synchronous = {self.synchronous}").fetchall()
        )

    async def insert(self, number: int) -> None:
        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute(INSERT, (number, TEXT))

        await self.database.execute_write_fn(write, block=True)

    def close(self) -> None:
        self.database.close()


# ---- sqlitepool


def insert(connection: sqlite3.Connection, number: int) -> None:
    connection.execute(INSERT, (number, TEXT))


class Ours:
    def __init__(self, path: str, synchronous: str) -> None:
        from sqlitepool import Database

        self.database = Database(path, durable=synchronous == "FULL", timeout=PATIENCE)

    def close(self) -> None:
        self.database.close()


class OursRunWrite(Ours):
    def insert(self, number: int) -> None:
        self.database.run_write(insert, number)


class OursWrite(Ours):
    def insert(self, number: int) -> None:
        with self.database.write() as connection:
            connection.execute(INSERT, (number, TEXT))


class OursSubmit(Ours):
    def insert(self, number: int) -> None:
        self.database.submit(insert, number).result()


WAYS: dict[str, Callable[[str, str], Any]] = {
    BUSY_TIMEOUT: lambda path, synchronous: BusyTimeout(path, synchronous, []),
    SQLALCHEMY: SqlalchemyQueuePool,
    PEEWEE: PeeweeQueue,
    DATASETTE: DatasetteDatabase,
    RUN_WRITE: OursRunWrite,
    WRITE: OursWrite,
    SUBMIT: OursSubmit,
}


# ---- who keeps count


class Recorded:
    """A way to write, with what it acknowledged.

    Attributes:
        acknowledged: the numbers of the rows that it said were committed.
        busy: the errors by which SQLite said that another connection has the database.
    """

    def __init__(self, way: Way, first: int = SEED) -> None:
        self.way = way
        self.numbers = itertools.count(first)
        self.acknowledged: list[int] = []
        self.busy: list[str] = []

    def write(self) -> None:
        number = next(self.numbers)
        try:
            self.way.insert(number)
        except Exception as error:
            self.note(error)
            raise
        self.acknowledged.append(number)

    async def write_in_task(self) -> None:
        number = next(self.numbers)
        try:
            await self.way.insert(number)  # type: ignore[misc]
        except Exception as error:
            self.note(error)
            raise
        self.acknowledged.append(number)

    def note(self, error: Exception) -> None:
        # those of peewee and others have a sqlite3 error inside, or its words
        code = getattr(error.__cause__ or error, "sqlite_errorcode", 0) or 0
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or "database is locked" in str(error):
            self.busy.append(str(error))


@dataclass(frozen=True)
class Written(Result):
    """What came of one run: see `Result`.

    Attributes:
        busy: how many of the errors were "database is locked", or another SQLITE_BUSY.
        lost: how many rows that were acknowledged are not in the file.
    """

    busy: int = 0
    lost: int = 0


def lost(path: str, acknowledged: "list[int]") -> int:
    """How many of the rows that were acknowledged are not in the file."""
    connection = sqlite3.connect(path)
    try:
        found = {number for (number,) in connection.execute("SELECT id FROM log")}
    finally:
        connection.close()
    return len(set(acknowledged) - found)


def as_written(result: Result, recorded: Recorded, path: str) -> Written:
    return Written(**vars(result), busy=len(recorded.busy), lost=lost(path, recorded.acknowledged))


def write_all(name: str, path: str, synchronous: str, writers: int, seconds: float) -> Written:
    """Have that many threads, or tasks, write one row after another, each waiting for its commit, for `seconds`."""
    way = WAYS[name](path, synchronous)
    recorded = Recorded(way)
    if isinstance(way, DatasetteDatabase):
        result = asyncio.run(crowd_of_tasks(way.begin, recorded.write_in_task, writers, seconds))
        way.close()
    else:
        result = crowd(as_peer(name, recorded), path, "pass", writers, seconds)
    return as_written(result, recorded, path)


def as_peer(name: str, recorded: Recorded) -> Peer:
    """As `crowd` takes it. A wait lasts until the row is committed."""
    return Peer(name, lambda path: recorded, "pool.write()\nHOLD", None, lambda pool: pool.way.close(), "")


Call = Callable[[], Coroutine[Any, Any, None]]


async def crowd_of_tasks(begin: Call, write: Call, tasks: int, seconds: float) -> Result:
    """What `crowd` does, with tasks of an event loop."""
    await begin()
    await write()
    tallies = [Tally(seconds) for _ in range(tasks)]
    end = perf_counter() + seconds

    async def task(tally: Tally) -> None:
        tally.longest = 0.0
        while (asked := perf_counter()) < end:
            try:
                await write()
            except Exception as error:
                tally.note(error)
                continue
            got = min(perf_counter(), end)
            tally.longest = max(tally.longest, got - asked)
            tally.served += got < end

    await asyncio.gather(*(task(tally) for tally in tallies))
    return summary(tallies, seconds)


# ---- the disk


def file_system(folder: str) -> str:
    """Say what kind of file system a folder is on."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return f"unknown ({sys.platform})"
    here = Path(folder).resolve()
    found = dict(mounts)  # of two mounts at one place the later one is seen
    return next((found[str(above)] for above in (here, *here.parents) if str(above) in found), "unknown")


def syncs_for_nothing(kind: str) -> bool:
    """Tell whether a file system keeps files in memory, so that a sync costs nothing there."""
    return kind in ("tmpfs", "ramfs")
