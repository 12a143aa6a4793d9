"""The pools that are compared, each opened and used as its own documentation says, with the same PRAGMAs on all.

The use of a pool is a piece of text with the line HOLD in it, which `pasted` puts into a loop, as `timeit` does: so the
loop is the same for all, and none of them pays for a function call that another does not have.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from queue import LifoQueue, SimpleQueue
from textwrap import dedent, indent
from typing import Any

POOL_SIZE = 4
OURS = "sqlitepool.ConnectionPool"
SQLALCHEMY = "SQLAlchemy QueuePool"
DBUTILS = "DBUtils PooledDB"
PEEWEE = "peewee PooledSqliteDatabase"
LIFO_QUEUE = "queue.LifoQueue"
PER_THREAD = "a connection per thread"

QUERY = "SELECT name FROM users WHERE id = ?"
PRAGMAS = {"synchronous": "NORMAL", "foreign_keys": "ON", "journal_size_limit": 64 * 1024 * 1024}
"""What sqlitepool sets by itself and could cost or save time. WAL is set once, in the file."""


@dataclass(frozen=True)
class Peer:
    """A pool that takes part.

    Attributes:
        open: makes the pool, given the path of the database. Imports the package that it needs.
        use: takes a connection from `pool`, holds it (the line HOLD), and gives it back.
        read: one point read while it is held; None for a pool of other things than connections.
        close: called with the pool at the end.
        on_return: what happens to a connection that comes back, for the reader of a table.
        bounded: whether there are never more than POOL_SIZE connections.
    """

    name: str
    open: Callable[[str], Any]
    use: str
    read: str | None
    close: Callable[[Any], object]
    on_return: str
    bounded: bool = True


def connect(path: str) -> sqlite3.Connection:
    """Open a connection as the peers that take a function get it."""
    connection = sqlite3.connect(path, check_same_thread=False)
    for name, value in PRAGMAS.items():
        connection.execute(f"PRAGMA {name} = {value}")
    return connection


def create_database(path: str) -> None:
    connection = connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)")
    with connection:
        connection.executemany("INSERT INTO users (name) VALUES (?)", ((f"user {n}",) for n in range(1000)))
    connection.close()


# ---- sqlitepool. Imported late, as the others: the programs can say what is missing.


def open_connection_pool(path: str) -> Any:
    from sqlitepool import ConnectionPool

    return ConnectionPool(path, max_size=POOL_SIZE)


class Plain:
    """Something to lend that has nothing to reset or close."""


def open_plain_pool(path: str) -> Any:
    from sqlitepool import Pool

    return Pool(Plain, max_size=POOL_SIZE)


# ---- the peers


def open_sqlalchemy(path: str) -> Any:
    from sqlalchemy.pool import QueuePool

    creator: Callable[[], Any] = partial(connect, path)
    return QueuePool(creator, pool_size=POOL_SIZE, max_overflow=0)


def open_dbutils(path: str) -> Any:
    from dbutils.pooled_db import PooledDB

    # maxshared stays 0: each borrower has a connection to itself.
    session = [f"PRAGMA {name} = {value}" for name, value in PRAGMAS.items()]
    return PooledDB(
        sqlite3,
        maxcached=POOL_SIZE,
        maxconnections=POOL_SIZE,
        blocking=True,
        setsession=session,
        database=path,
        check_same_thread=False,
    )


def open_peewee(path: str) -> Any:
    from playhouse.pool import PooledSqliteDatabase

    # With a timeout (seconds) it waits for a connection when all are out; without one it raises.
    return PooledSqliteDatabase(path, max_connections=POOL_SIZE, timeout=30, pragmas=PRAGMAS, check_same_thread=False)


def open_sqlspec(path: str) -> Any:
    from sqlspec.adapters.sqlite.pool import SqliteConnectionPool

    # No bound and nothing to wait for: it keeps one connection for each thread.
    return SqliteConnectionPool({"database": path, "check_same_thread": False})


def open_queue(make: "Callable[[], LifoQueue[Any] | SimpleQueue[Any]]") -> Callable[[str], Any]:
    def open_it(path: str) -> Any:
        pool = make()
        for _ in range(POOL_SIZE):
            pool.put(connect(path))
        return pool

    return open_it


def close_queue(pool: Any) -> None:
    while not pool.empty():
        pool.get().close()


class PerThread(threading.local):
    """`threading.local` calls `__init__` in each thread that comes: a connection for each, and no bound."""

    def __init__(self, path: str, opened: list[sqlite3.Connection]) -> None:
        self.opened = opened
        self.connection = connect(path)
        opened.append(self.connection)


def open_per_thread(path: str) -> PerThread:
    return PerThread(path, [])


def close_per_thread(pool: PerThread) -> None:
    for connection in pool.opened:
        connection.close()


EXECUTE = "connection.execute(QUERY, (7,)).fetchone()"
CURSOR = "cursor = connection.cursor()\ncursor.execute(QUERY, (7,))\ncursor.fetchone()\ncursor.close()"

WITH_BLOCK = "with pool.connection() as connection:\n    HOLD"
ACQUIRE = "connection = pool.acquire()\ntry:\n    HOLD\nfinally:\n    pool.release(connection)"
QUEUE_GET = "connection = pool.get()\ntry:\n    HOLD\nfinally:\n    pool.put(connection)"

CONNECTION_POOL = Peer(
    OURS,
    open_connection_pool,
    WITH_BLOCK,
    EXECUTE,
    lambda pool: pool.close(),
    "commit or rollback; whatever a borrower can leave behind is undone",
)
CONNECTION_POOL_ACQUIRE = Peer(
    "  the same, acquire/release",
    open_connection_pool,
    ACQUIRE,
    EXECUTE,
    lambda pool: pool.close(),
    "rollback; otherwise the same",
)
PLAIN_POOL = Peer(
    "sqlitepool.Pool",
    open_plain_pool,
    WITH_BLOCK,
    None,
    lambda pool: pool.close(),
    "nothing to reset: plain objects",
)
SQLALCHEMY_QUEUE_POOL = Peer(
    SQLALCHEMY,
    open_sqlalchemy,
    "connection = pool.connect()\ntry:\n    HOLD\nfinally:\n    connection.close()",
    CURSOR,
    lambda pool: pool.dispose(),
    "rollback(), always",
)
DBUTILS_POOLED_DB = Peer(
    DBUTILS,
    open_dbutils,
    "connection = pool.connection()\ntry:\n    HOLD\nfinally:\n    connection.close()",
    CURSOR,
    lambda pool: pool.close(),
    "rollback(), always (reset=True)",
)
PEEWEE_POOLED = Peer(
    PEEWEE,
    open_peewee,
    "pool.connect()\ntry:\n    HOLD\nfinally:\n    pool.close()",
    "pool.execute_sql(QUERY, (7,)).fetchone()",
    lambda pool: pool.close_all(),
    "rollback() if in a transaction",
)
SQLSPEC_POOL = Peer(
    "sqlspec SqliteConnectionPool",
    open_sqlspec,
    "with pool.get_connection() as connection:\n    HOLD",
    EXECUTE,
    lambda pool: pool.close(),
    "commit or rollback if in one; no bound, thread-local",
    bounded=False,
)
STDLIB_LIFO_QUEUE = Peer(LIFO_QUEUE, open_queue(LifoQueue), QUEUE_GET, EXECUTE, close_queue, "nothing")
STDLIB_SIMPLE_QUEUE = Peer("queue.SimpleQueue", open_queue(SimpleQueue), QUEUE_GET, EXECUTE, close_queue, "nothing")
CONNECTION_PER_THREAD = Peer(
    PER_THREAD,
    open_per_thread,
    "connection = pool.connection\nHOLD",
    EXECUTE,
    close_per_thread,
    "nothing; never comes back",
    bounded=False,
)


# ---- loops


def pasted(loop: str, names: Mapping[str, object], **pieces: str) -> Any:
    """Compile `loop`, the text of a function, with each word of `pieces` replaced by its text, and return the function.

    Args:
        loop: its lines that consist of one of the words of `pieces` are replaced, in the order given.
        names: what the function finds as its globals, with QUERY.
        pieces: the texts; their lines are indented as the word was.
    """
    text = dedent(loop)
    for word, piece in pieces.items():
        lines = []
        for line in text.splitlines():
            margin = line[: len(line) - len(line.lstrip())]
            lines.append(indent(piece, margin) if line.strip() == word else line)
        text = "\n".join(lines)
    made: dict[str, Any] = {}
    exec(text, {"QUERY": QUERY, **names}, made)
    (function,) = made.values()
    return function


def calibrate(batch: Callable[[int], None], seconds: float) -> int:
    """How many times fit into `seconds`."""
    times = 100
    while (took := timed(batch, times)) < seconds / 4:
        times *= 2
    return max(1, int(times * seconds / took))


def timed(batch: Callable[[int], None], times: int) -> float:
    started = time.perf_counter()
    batch(times)
    return time.perf_counter() - started
