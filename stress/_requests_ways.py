"""The ways in which stress/requests.py gets a connection for a request, each as a WSGI and as a Flask application.

All of them make the same point read and the same answer. The peers take and return their connection in the function
that handles the request, which is the quickest that their users write.
"""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import _peers as peers

PER_REQUEST = "a connection per request"
SQLALCHEMY = "SQLAlchemy QueuePool"
OURS = "sqlitepool Scope"
GLOBAL = "a bare global connection"

USER = 7
URL = f"/users/{USER}"
ANSWER = b"user 6"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Way:
    """A connection for each request, had in some way. `read` is what a request does: it finds the name of a user."""

    name: str

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, number: int) -> str:
        raise NotImplementedError

    def application(self) -> Application:
        read = self.read

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            body = read(int(environ["PATH_INFO"].rpartition("/")[2])).encode()
            start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
            return [body]

        return application

    def flask_application(self) -> Any:
        from flask import Flask

        application = Flask("users")
        read = self.prepare_flask(application)

        @application.get("/users/<int:number>")
        def user(number: int) -> str:
            return read(number)

        return application

    def prepare_flask(self, application: Any) -> Callable[[int], str]:
        """Add to a Flask application what this way needs; return what a request calls to read."""
        return self.read

    def close(self) -> None:
        pass


class PerRequest(Way):
    name = PER_REQUEST

    def read(self, number: int) -> str:
        with closing(sqlite3.connect(self.path)) as connection:
            for name, value in PRAGMAS.items():
                connection.execute(f"PRAGMA {name} = {value}")
            (name,) = connection.execute(peers.QUERY, (number,)).fetchone()
            return str(name)


class SQLAlchemy(Way):
    name = SQLALCHEMY

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.pool = peers.open_sqlalchemy(path)  # `engine.raw_connection()` does what `pool.connect()` does

    def read(self, number: int) -> str:
        connection = self.pool.connect()
        try:
            cursor = connection.cursor()
            cursor.execute(peers.QUERY, (number,))
            (name,) = cursor.fetchone()
            cursor.close()
            return str(name)
        finally:
            connection.close()

    def close(self) -> None:
        self.pool.dispose()


class Ours(Way):
    name = OURS

    def __init__(self, path: str) -> None:
        super().__init__(path)
        from sqlitepool import Scope

        self.pool = peers.open_connection_pool(path)
        self.scope = Scope(self.pool)
        self.close_flask_pool: Callable[[], object] = list

    def read(self, number: int) -> str:
        (name,) = self.scope.get().execute(peers.QUERY, (number,)).fetchone()
        return str(name)

    def application(self) -> Application:
        from sqlitepool.ext.wsgi import ScopeMiddleware

        application: Any = super().application()
        return ScopeMiddleware(application, self.scope)

    def prepare_flask(self, application: Any) -> Callable[[int], str]:
        from sqlitepool.ext.flask import SQLitePool

        db = SQLitePool(application, database=self.path, max_size=peers.POOL_SIZE)
        with application.app_context():
            self.close_flask_pool = db.pool.close

        def read(number: int) -> str:
            (name,) = db.connection.execute(peers.QUERY, (number,)).fetchone()
            return str(name)

        return read

    def close(self) -> None:
        self.close_flask_pool()
        self.pool.close()


class Global(Way):
    """For one thread: with more of them, statements and transactions of one request would mix with those of another."""

    name = GLOBAL

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.connection = peers.connect(path)

    def read(self, number: int) -> str:
        (name,) = self.connection.execute(peers.QUERY, (number,)).fetchone()
        return str(name)

    def close(self) -> None:
        self.connection.close()


WAYS: dict[str, type[Way]] = {way.name: way for way in (PerRequest, SQLAlchemy, Ours, Global)}

PRAGMAS = {"journal_mode": "WAL", "synchronous": "NORMAL", "foreign_keys": "ON", "busy_timeout": 5000}
"""What a server usually sets on each new connection."""


# ---- databases

ONE_TABLE = "1 table"
MANY_TABLES = "300 tables"


def create_databases(folder: Path) -> dict[str, str]:
    """Make a database of each size; returns their paths."""
    paths = {schema: str(folder / f"{schema.replace(' ', '-')}.db") for schema in (MANY_TABLES, ONE_TABLE)}
    for path in paths.values():
        peers.create_database(path)
    with closing(sqlite3.connect(paths[MANY_TABLES])) as connection, connection:
        connection.execute("BEGIN")
        for number in range(299):
            connection.execute(
                f"CREATE TABLE entity_{number} (id INTEGER PRIMARY KEY, name TEXT, price REAL, user INTEGER)"
            )
    return paths
