"""What type checkers infer. Never run: `test_inference.py` and CI have it checked by mypy and pyright."""

import sqlite3
from pathlib import Path
from typing import assert_type

from sqlitepool import Connection, ConnectionPool, Database, Durations, LeaseInfo, Pool, PoolStats, Scope

path = Path("app.db")


class UserDatabase:
    def __init__(self, database: sqlite3.Connection | Path) -> None:
        self.database = database


# A pool knows what it lends.
own = Pool(lambda: UserDatabase(path))
raw = ConnectionPool(path)
wrapping = ConnectionPool("app.db", wrap=UserDatabase)
by_function = ConnectionPool(path, wrap=lambda conn: UserDatabase(conn), max_size=4, read_only=True)
assert_type(own, Pool[UserDatabase])
assert_type(raw, ConnectionPool[Connection])
assert_type(wrapping, ConnectionPool[UserDatabase])
assert_type(by_function, ConnectionPool[UserDatabase])

# Every way to borrow gives that type.
with own.connection() as item:
    assert_type(item, UserDatabase)
with own.connection(timeout=None) as item:
    assert_type(item, UserDatabase)
with wrapping.connection() as users:
    assert_type(users, UserDatabase)
with wrapping.transaction("deferred", timeout=1) as users:
    assert_type(users, UserDatabase)
with raw.connection() as conn, raw.transaction() as other:
    assert_type(conn, Connection)
    assert_type(other, Connection)
    connection: sqlite3.Connection = conn
    assert_type(conn.execute("SELECT 1"), sqlite3.Cursor)
assert_type(own.acquire(timeout=0.5), UserDatabase)
assert_type(raw.acquire(), Connection)
own.release(own.acquire())
wrapping.discard(wrapping.acquire())

# A pool is a context manager of its own type, and a pool of connections is a pool.
with Pool(lambda: UserDatabase(path)) as pool:
    assert_type(pool, Pool[UserDatabase])
with ConnectionPool(path, wrap=UserDatabase) as connection_pool:
    assert_type(connection_pool, ConnectionPool[UserDatabase])
general: Pool[UserDatabase] = wrapping

# Hooks get what is lent.
Pool(lambda: UserDatabase(path), reset=lambda user: user.database, check=lambda user: bool(user.database))


# A pool of one's own, by either name of what it lends.
class PlainPool(ConnectionPool[sqlite3.Connection]):
    def __init__(self) -> None:
        super().__init__(path, max_size=4, isolation_level="")


class OwnPool(ConnectionPool[Connection]):
    def __init__(self) -> None:
        super().__init__(path, max_size=4)


class UserPool(ConnectionPool[UserDatabase]):
    def __init__(self) -> None:
        super().__init__(path, wrap=UserDatabase)


assert_type(PlainPool().acquire(), sqlite3.Connection)
assert_type(OwnPool().acquire(), Connection)
assert_type(UserPool().acquire(), UserDatabase)
annotated: ConnectionPool[Connection] = ConnectionPool(path)

# A scope gives what its pool lends.
assert_type(Scope(own).get(), UserDatabase)
assert_type(Scope(Database(path)), Scope[Connection])
with Scope(own).open() as request:
    assert_type(request.get(), UserDatabase)

# What a pool tells.
assert_type(own.stats(), PoolStats)
assert_type(own.stats().held_seconds, Durations)
assert_type(own.leases(), list[LeaseInfo])
assert_type(own.close(timeout=1.0), list[LeaseInfo])

# Wrong use: strict checkers complain of a comment that nothing needs.
own.release("something else")  # type: ignore[arg-type]
raw.transaction("serializable")  # type: ignore[arg-type]
ConnectionPool(path, pool_size=5)  # type: ignore[call-overload]
Pool()  # type: ignore[call-arg]
Pool(UserDatabase)  # type: ignore[arg-type]
