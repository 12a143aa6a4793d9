"""A pool of your own database class: two ways, and which one to take.

    python examples/user_database.py

`UserDatabase` is what most applications have: a class with their queries in it, around one connection. Threads must
not share one, so each borrows one from a pool while it needs it.
"""

import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlitepool import ConnectionPool, Pool


class UserDatabase:
    """The application's queries. Takes a connection, or a path to open one of its own."""

    def __init__(self, database: sqlite3.Connection | Path) -> None:
        if isinstance(database, Path):
            # A pooled object moves from thread to thread, one at a time: sqlite3's own check has to be off.
            database = sqlite3.connect(database, timeout=30, isolation_level="IMMEDIATE", check_same_thread=False)
        self.connection = database

    def add(self, name: str) -> None:
        self.connection.execute("INSERT INTO users (name) VALUES (?)", (name,))

    def names(self) -> list[str]:
        return [name for (name,) in self.connection.execute("SELECT name FROM users ORDER BY name")]

    def rollback(self) -> None:
        self.connection.rollback()

    def close(self) -> None:
        self.connection.close()


def pool_opens_the_connection(path: Path) -> None:
    """The better way: WAL mode and the other defaults of a server, commit and rollback, nothing left behind."""
    with ConnectionPool(path, wrap=UserDatabase, max_size=4) as pool:

        def add(number: int) -> None:
            with pool.connection() as users:  # committed at the end of the block
                users.add(f"user {number}")

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(add, range(200)))

        try:
            with pool.connection() as users:
                users.add("nobody")
                raise LookupError("something went wrong")
        except LookupError:
            pass  # and "nobody" was rolled back

        with pool.connection() as users:
            print(f"wrap=UserDatabase: {len(users.names())} users, {pool.stats().opened} connections for 16 threads")


def wrapper_opens_its_own(path: Path) -> None:
    """For a class that you cannot change: the pool knows only that it has `rollback()` and `close()`.

    So committing stays with you; on return the pool calls `rollback()`, at the end `close()`.
    """
    with Pool(lambda: UserDatabase(path), max_size=4) as pool:

        def add(number: int) -> None:
            with pool.connection() as users, users.connection:  # sqlite3's own `with connection:` commits
                users.add(f"another user {number}")

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(add, range(200)))

        with pool.connection() as users:
            users.add("nobody")  # never committed

        with pool.connection() as users:
            print(f"Pool(lambda: ...): {len(users.names())} users, {pool.stats().opened} connections for 16 threads")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "users.db")
        with ConnectionPool(path) as pool, pool.connection() as connection:
            connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)")
        pool_opens_the_connection(path)
        wrapper_opens_its_own(path)


if __name__ == "__main__":
    main()
