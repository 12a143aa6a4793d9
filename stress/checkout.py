"""What a checkout and its return cost with nobody waiting: sqlitepool and its peers, measured in one run.

    pip install sqlalchemy DBUtils peewee sqlspec
    python stress/checkout.py                    # some 7 seconds; needs sqlitepool importable
    python stress/checkout.py --quick --check    # 2 seconds; exit status 1 if a target is missed

One thread, a pool of 4, a database file in WAL mode, the connections usable from any thread, garbage collection on.
The contestants take turns: in each round each of them, in a new order, runs a batch of about 20 ms. The figures are
medians over the rounds, and the ratios are medians of the ratios within a round, so that a machine that is slow for
a while is slow for all. A ratio below 1 means that sqlitepool's ConnectionPool, used with `with pool.connection()`, is
the cheaper one. Each peer is used as its own documentation says; what it does when a connection is returned stands
beside it, because it is not the same for all.
"""

import argparse
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from queue import LifoQueue, SimpleQueue
from typing import Any

POOL_SIZE = 4
OURS = "sqlitepool.ConnectionPool"
TARGETS = {"SQLAlchemy QueuePool": 0.25, "DBUtils PooledDB": 0.70}
QUERY = "SELECT name FROM users WHERE id = ?"

Batch = Callable[[int], None]
"""Takes and returns a connection that many times."""


# ---- the contestants. Each is a generator that opens, yields (checkout, checkout with one read), and closes.


def connection_pool(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from sqlitepool import ConnectionPool

    with ConnectionPool(path, max_size=POOL_SIZE) as pool:

        def checkout(times: int) -> None:
            for _ in repeat(None, times):
                with pool.connection():
                    pass

        def read(times: int) -> None:
            for _ in repeat(None, times):
                with pool.connection() as connection:
                    connection.execute(QUERY, (7,)).fetchone()

        yield checkout, read


def connection_pool_acquire(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from sqlitepool import ConnectionPool

    with ConnectionPool(path, max_size=POOL_SIZE) as pool:

        def checkout(times: int) -> None:
            for _ in repeat(None, times):
                connection = pool.acquire()
                pool.release(connection)

        def read(times: int) -> None:
            for _ in repeat(None, times):
                connection = pool.acquire()
                connection.execute(QUERY, (7,)).fetchone()
                pool.release(connection)

        yield checkout, read


def plain_pool(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from sqlitepool import Pool

    class Plain:
        pass

    with Pool(Plain, max_size=POOL_SIZE) as pool:

        def checkout(times: int) -> None:
            for _ in repeat(None, times):
                with pool.connection():
                    pass

        yield checkout, None


def sqlalchemy_queue_pool(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from sqlalchemy.pool import QueuePool

    pool = QueuePool(lambda: connect(path), pool_size=POOL_SIZE, max_overflow=0)

    def checkout(times: int) -> None:
        for _ in repeat(None, times):
            connection = pool.connect()
            connection.close()

    def read(times: int) -> None:
        for _ in repeat(None, times):
            connection = pool.connect()
            cursor = connection.cursor()
            cursor.execute(QUERY, (7,))
            cursor.fetchone()
            cursor.close()
            connection.close()

    yield checkout, read
    pool.dispose()


def dbutils_pooled_db(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from dbutils.pooled_db import PooledDB

    # maxshared stays 0: each borrower has a connection to itself.
    pool = PooledDB(
        sqlite3, maxcached=POOL_SIZE, maxconnections=POOL_SIZE, blocking=True, database=path, check_same_thread=False
    )

    def checkout(times: int) -> None:
        for _ in repeat(None, times):
            connection = pool.connection()
            connection.close()

    def read(times: int) -> None:
        for _ in repeat(None, times):
            connection = pool.connection()
            cursor = connection.cursor()
            cursor.execute(QUERY, (7,))
            cursor.fetchone()
            cursor.close()
            connection.close()

    yield checkout, read
    pool.close()


def peewee_pooled(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from playhouse.pool import PooledSqliteDatabase

    database = PooledSqliteDatabase(path, max_connections=POOL_SIZE, timeout=30, check_same_thread=False)

    def checkout(times: int) -> None:
        for _ in repeat(None, times):
            database.connect()
            database.close()

    def read(times: int) -> None:
        for _ in repeat(None, times):
            database.connect()
            database.execute_sql(QUERY, (7,)).fetchone()
            database.close()

    yield checkout, read
    database.close_all()


def sqlspec_pool(path: str) -> Iterator[tuple[Batch, Batch | None]]:
    from sqlspec.adapters.sqlite.pool import SqliteConnectionPool

    # No bound and nothing to wait for: it keeps one connection for each thread.
    pool = SqliteConnectionPool({"database": path, "check_same_thread": False})

    def checkout(times: int) -> None:
        for _ in repeat(None, times):
            with pool.get_connection():
                pass

    def read(times: int) -> None:
        for _ in repeat(None, times):
            with pool.get_connection() as connection:
                connection.execute(QUERY, (7,)).fetchone()

    yield checkout, read
    pool.close()


def stdlib_queue(
    make_queue: "Callable[[], LifoQueue[sqlite3.Connection] | SimpleQueue[sqlite3.Connection]]",
) -> "Contest":
    def contest(path: str) -> Iterator[tuple[Batch, Batch | None]]:
        queue = make_queue()
        for _ in range(POOL_SIZE):
            queue.put(connect(path))

        def checkout(times: int) -> None:
            for _ in repeat(None, times):
                connection = queue.get()
                queue.put(connection)

        def read(times: int) -> None:
            for _ in repeat(None, times):
                connection = queue.get()
                connection.execute(QUERY, (7,)).fetchone()
                queue.put(connection)

        yield checkout, read
        while not queue.empty():
            queue.get().close()

    return contest


Contest = Callable[[str], Iterator[tuple[Batch, Batch | None]]]


def connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, check_same_thread=False)


@dataclass
class Contestant:
    name: str
    contest: Contest
    on_return: str
    problem: str = ""
    missing: bool = False
    checkout: list[float] = field(default_factory=list)
    """Microseconds for each checkout and return, one figure a round."""
    read: list[float] = field(default_factory=list)


def contestants() -> list[Contestant]:
    return [
        Contestant(OURS, connection_pool, "commit or rollback; whatever a borrower can leave behind is undone"),
        Contestant("  the same, acquire/release", connection_pool_acquire, "rollback; otherwise the same"),
        Contestant("sqlitepool.Pool", plain_pool, "nothing to reset: plain objects"),
        Contestant("SQLAlchemy QueuePool", sqlalchemy_queue_pool, "rollback(), always"),
        Contestant("DBUtils PooledDB", dbutils_pooled_db, "rollback(), always (reset=True)"),
        Contestant("peewee PooledSqliteDatabase", peewee_pooled, "rollback() if in a transaction"),
        Contestant(
            "sqlspec SqliteConnectionPool", sqlspec_pool, "commit or rollback if in one; no bound, thread-local"
        ),
        Contestant("queue.LifoQueue", stdlib_queue(LifoQueue), "nothing"),
        Contestant("queue.SimpleQueue", stdlib_queue(SimpleQueue), "nothing"),
    ]


# ---- measuring


def measure(everybody: list[Contestant], path: str, rounds: int, batch_seconds: float) -> None:
    """Run all rounds; the figures, and the problems of those that could not take part, are noted in the contestants."""
    with running(everybody, path) as batches:
        lengths = {(name, kind): calibrate(batch, batch_seconds) for (name, kind), batch in batches.items()}
        order = random.Random(1)
        for _ in range(rounds):
            for kind in ("checkout", "read"):
                turn = [one for one in everybody if (one.name, kind) in batches]
                order.shuffle(turn)
                for one in turn:
                    times = lengths[one.name, kind]
                    getattr(one, kind).append(timed(batches[one.name, kind], times) / times * 1e6)


@contextmanager
def running(everybody: list[Contestant], path: str) -> Iterator[dict[tuple[str, str], Batch]]:
    """Open all contestants; gives the batches that can be run, by contestant's name and "checkout" or "read"."""
    batches: dict[tuple[str, str], Batch] = {}
    opened = []
    for one in everybody:
        opening = one.contest(path)
        try:
            checkout, read = next(opening)
            checkout(100)
            batches[one.name, "checkout"] = checkout
            if read:
                read(100)
                batches[one.name, "read"] = read
        except ModuleNotFoundError as error:
            one.missing, one.problem = True, f"missing: {error}"
        except Exception as error:  # one that fails is named in the table, and the others go on
            one.problem = f"failed: {type(error).__name__}: {error}"
        opened.append(opening)
    try:
        yield batches
    finally:
        for opening in opened:
            next(opening, None)


def calibrate(batch: Batch, seconds: float) -> int:
    """How many times fit into `seconds`."""
    times = 100
    while (took := timed(batch, times)) < seconds / 4:
        times *= 2
    return max(1, int(times * seconds / took))


def timed(batch: Batch, times: int) -> float:
    started = time.perf_counter()
    batch(times)
    return time.perf_counter() - started


def create_database(path: str) -> None:
    connection = connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)")
    with connection:
        connection.executemany("INSERT INTO users (name) VALUES (?)", ((f"user {n}",) for n in range(1000)))
    connection.close()


# ---- showing


def ratio(ours: list[float], theirs: list[float]) -> float | None:
    """The median of what ours took in each round, as a share of theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if ours and theirs else None


def judge(everybody: list[Contestant]) -> list[dict[str, Any]]:
    """Each target with what was reached; `met` is None where it could not be measured."""
    by_name = {one.name: one for one in everybody}
    verdicts = []
    for peer, at_most in TARGETS.items():
        reached = ratio(by_name[OURS].checkout, by_name[peer].checkout)
        verdicts.append(
            {"peer": peer, "at_most": at_most, "ratio": reached, "met": None if reached is None else reached <= at_most}
        )
    return verdicts


def show_table(title: str, everybody: list[Contestant], kind: str) -> None:
    ours: list[float] = getattr(everybody[0], kind)
    print(f"{title}\n  {'':<30} {'median us':>9} {'least':>7} {'ours/it':>8}   on return")
    for one in everybody:
        figures: list[float] = getattr(one, kind)
        share = ratio(ours, figures)
        if one.problem:
            print(f"  {one.name:<30} {one.problem}")
        elif figures:
            shown = "" if share is None or one is everybody[0] else f"{share:.2f}"
            print(
                f"  {one.name:<30} {statistics.median(figures):9.2f} {min(figures):7.2f} {shown:>8}   {one.on_return}"
            )
    print()


def show(everybody: list[Contestant], verdicts: list[dict[str, Any]], rounds: int) -> None:
    print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {rounds} rounds\n")
    show_table("Checkout and return, nobody waiting", everybody, "checkout")
    show_table("The same with one point read for each checkout", everybody, "read")
    for verdict in verdicts:
        said = {True: "met", False: "NOT MET", None: "not measured"}[verdict["met"]]
        reached = "" if verdict["ratio"] is None else f", reached {verdict['ratio']:.2f}"
        print(f"target: {OURS} at most {verdict['at_most']:.2f} of {verdict['peer']}{reached}: {said}")


def as_json(everybody: list[Contestant], verdicts: list[dict[str, Any]], rounds: int) -> str:
    rows = []
    for one in everybody:
        row: dict[str, Any] = {"name": one.name.strip(), "on_return": one.on_return, "problem": one.problem or None}
        for kind in ("checkout", "read"):
            figures: list[float] = getattr(one, kind)
            row[f"{kind}_us"] = statistics.median(figures) if figures else None
            row[f"{kind}_ratio"] = ratio(getattr(everybody[0], kind), figures)
        rows.append(row)
    versions = {"python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version}
    return json.dumps({**versions, "rounds": rounds, "contestants": rows, "targets": verdicts}, indent=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each contestant runs (default: 15)")
    parser.add_argument("--quick", action="store_true", help="5 rounds of shorter batches")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds, batch_seconds = (5, 0.01) if options.quick else (options.rounds, 0.02)

    everybody = contestants()
    with tempfile.TemporaryDirectory(prefix="sqlitepool-checkout-") as folder:
        path = str(Path(folder, "users.db"))
        create_database(path)
        measure(everybody, path, rounds, batch_seconds)
    verdicts = judge(everybody)
    if options.json:
        print(as_json(everybody, verdicts, rounds))
    else:
        show(everybody, verdicts, rounds)
    failed = any(one.problem and not one.missing for one in everybody) or everybody[0].missing
    missed = any(not verdict["met"] for verdict in verdicts)
    return 1 if failed or (options.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
