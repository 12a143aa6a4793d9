"""The members of a club and how often each of them came: a WSGI application with pooled database objects.

It runs under every server with threads or processes; README.md has Apache, `docs/` has waitress and gunicorn:

    MEMBERS_DATABASE=/tmp/members.db waitress-serve --listen=127.0.0.1:8080 members:application

| request                                        | what it does                                      |
|------------------------------------------------|---------------------------------------------------|
| POST /members  name=ada&password=secret        | makes a member                                    |
| POST /login    name=ada&password=secret        | answers with a token                              |
| POST /visits   (Authorization: Bearer TOKEN)   | counts a visit of the member who has the token    |
| GET  /members/ada                              | how often she came                                |
| GET  /                                         | who came most often                               |
| GET  /status                                   | which process this is, and how its pools are used |
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qs

from sqlitepool import ConnectionPool, Database, PoolError
from sqlitepool.ext.wsgi import close_at_exit

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

#: How many requests of one process may read at the same time. The others wait, some microseconds as a rule.
READERS = 4
#: Work to be done for one password (https://docs.python.org/3/library/hashlib.html#hashlib.scrypt): about 10 ms, which
#: is little, so that the example can be tried with many members. Take 2**17 for real ones.
SCRYPT_COST = 2**12
LONGEST_BODY = 10_000  # bytes


class UserDatabase:
    """The application's queries, around one connection. Which connection, and for how long, is not its business."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def create_tables(self) -> None:
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS member (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,"
            " salt BLOB NOT NULL, password BLOB NOT NULL, visits INTEGER NOT NULL DEFAULT 0)"
        )
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS session (token BLOB PRIMARY KEY, member INTEGER NOT NULL REFERENCES member)"
        )

    def add(self, name: str, salt: bytes, password: bytes) -> bool:
        """Make a member; tell whether the name was free."""
        sql = "INSERT INTO member (name, salt, password) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        return self.connection.execute(sql, (name, salt, password)).rowcount == 1

    def credentials(self, name: str) -> tuple[int, bytes, bytes] | None:
        sql = "SELECT id, salt, password FROM member WHERE name = ?"
        return next(iter(self._rows(sql, name)), None)

    def start_session(self, token: bytes, member: int) -> None:
        self.connection.execute("INSERT INTO session (token, member) VALUES (?, ?)", (token, member))

    def count_visit(self, token: bytes) -> tuple[str, int] | None:
        sql = (
            "UPDATE member SET visits = visits + 1 WHERE id = (SELECT member FROM session WHERE token = ?)"
            " RETURNING name, visits"
        )
        return next(iter(self._rows(sql, token)), None)

    def visits(self, name: str) -> int | None:
        rows = self._rows("SELECT visits FROM member WHERE name = ?", name)
        return rows[0][0] if rows else None

    def most_frequent(self, count: int) -> dict[str, int]:
        sql = "SELECT name, visits FROM member ORDER BY visits DESC, name LIMIT ?"
        return dict(self._rows(sql, count))

    def _rows(self, sql: str, *parameters: object) -> list[Any]:
        return self.connection.execute(sql, parameters).fetchall()


class Store:
    """What one process has of the database: a pool of `UserDatabase` objects to read with, and its turn to write.

    Writers queue in `Database`, together with those of all other processes. Connections that simply write wait in
    SQLite, where some processes always come first and others give up with "database is locked".
    """

    def __init__(self, path: str) -> None:
        self.database = close_at_exit(Database(path, readers=1))
        with self.database.write() as connection:  # one transaction: committed at the end, rolled back on an exception
            UserDatabase(connection).create_tables()
        self.users = close_at_exit(ConnectionPool(path, wrap=UserDatabase, read_only=True, max_size=READERS))
        # At exit the last is closed first: who writes comes after who reads, and tidies up the `-wal`.

    def close(self) -> None:
        """Close it before the exit."""
        self.users.close()
        self.database.close()


class Refused(Exception):
    """The request is not to be done. The text is for the client."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Members:
    """The application. One object for all threads of a process; nothing is opened before the first request.

    So the server may fork as often as it likes after the import: each process opens what it needs by itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._store: Store | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        store = self.store(environ)
        try:
            status, answer = self._answer(environ, store, headers)
        except Refused as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        except PoolError as error:  # nobody gave back a connection, or let us write, for 30 seconds
            status, answer = HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)}
            headers.append(("Retry-After", "5"))
        body = json.dumps(answer).encode() + b"\n"
        start_response(f"{status.value} {status.phrase}", [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def _answer(
        self, environ: WSGIEnvironment, store: Store, headers: list[tuple[str, str]]
    ) -> tuple[HTTPStatus, dict[str, Any]]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        match method, path.strip("/").split("/"):
            case "GET", [""]:
                with store.users.connection() as users:
                    return HTTPStatus.OK, {"most_frequent": users.most_frequent(10)}
            case "GET", ["status"]:
                return HTTPStatus.OK, _status(environ, store)
            case "GET", ["members", name]:
                return HTTPStatus.OK, {"name": name, "visits": _visits(store, name, headers)}
            case "POST", ["members"]:
                return HTTPStatus.CREATED, {"name": _join(store, *_name_and_password(environ))}
            case "POST", ["login"]:
                return HTTPStatus.OK, {"token": _log_in(store, *_name_and_password(environ))}
            case "POST", ["visits"]:
                name, visits = _count_visit(store, _token_hash(environ), headers)
                return HTTPStatus.OK, {"name": name, "visits": visits}
            case _:
                raise Refused(HTTPStatus.NOT_FOUND, f"there is no {method} {path}")

    def store(self, environ: WSGIEnvironment) -> Store:
        """Return what this process has open. The first request opens it."""
        with self._lock:
            if self._store is None:
                self._store = Store(environ.get("MEMBERS_DATABASE") or os.environ["MEMBERS_DATABASE"])
            return self._store


def _status(environ: WSGIEnvironment, store: Store) -> dict[str, Any]:
    reading, writing = store.users.stats(), store.database.stats()
    return {
        "process": os.getpid(),
        "application_group": environ.get("mod_wsgi.application_group"),  # Apache's word for the sub-interpreter
        "reading": {
            "open": reading.size,
            "in_use": reading.in_use,
            "checkouts": reading.checkouts,
            "longest_wait": reading.wait_seconds.max,
        },
        "writing": {"commits": writing.commits, "longest_wait": writing.wait_seconds.max},
    }


def _visits(store: Store, name: str, headers: list[tuple[str, str]]) -> int:
    begin = time.perf_counter()
    with store.users.connection() as users:
        visits = users.visits(name)
    headers.append(_server_timing("read", begin))
    if visits is None:
        raise Refused(HTTPStatus.NOT_FOUND, "no such member")
    return visits


def _join(store: Store, name: str, password: str) -> str:
    salt = secrets.token_bytes(16)
    password_hash = _hash(password, salt)  # slow, so before the turn to write is taken
    with store.database.write() as connection:
        is_new = UserDatabase(connection).add(name, salt, password_hash)
    if not is_new:
        raise Refused(HTTPStatus.CONFLICT, "this name is taken")
    return name


def _log_in(store: Store, name: str, password: str) -> str:
    with store.users.connection() as users:
        credentials = users.credentials(name)
    # A name that nobody has takes as long as a wrong password, so that names cannot be guessed by the clock.
    member, salt, expected = credentials or (0, b"nobody", b"")
    if not hmac.compare_digest(_hash(password, salt), expected):
        raise Refused(HTTPStatus.FORBIDDEN, "wrong name or password")
    token = secrets.token_urlsafe(32)
    with store.database.write() as connection:
        UserDatabase(connection).start_session(hashlib.sha256(token.encode()).digest(), member)
    return token


def _count_visit(store: Store, token_hash: bytes, headers: list[tuple[str, str]]) -> tuple[str, int]:
    begin = time.perf_counter()
    with store.database.write() as connection:
        member = UserDatabase(connection).count_visit(token_hash)
    headers.append(_server_timing("write", begin))
    if member is None:
        raise Refused(HTTPStatus.UNAUTHORIZED, "log in first")
    return member


def _server_timing(what: str, begin: float) -> tuple[str, str]:
    """A header that browsers show: how long it took to have a connection or the turn to write, and to use it."""
    return "Server-Timing", f"{what};dur={(time.perf_counter() - begin) * 1000:.3f}"  # milliseconds


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=SCRYPT_COST, r=8, p=1)


def _token_hash(environ: WSGIEnvironment) -> bytes:
    kind, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if kind.lower() != "bearer" or not token:
        raise Refused(HTTPStatus.UNAUTHORIZED, "log in first")
    return hashlib.sha256(token.encode()).digest()


def _name_and_password(environ: WSGIEnvironment) -> tuple[str, str]:
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isdigit() or int(length) > LONGEST_BODY:
        _refuse_form()
    try:
        form = parse_qs(environ["wsgi.input"].read(int(length)).decode(), max_num_fields=10)
    except ValueError:  # no UTF-8, or too many fields
        _refuse_form()
    match form:
        case {"name": [name], "password": [password]} if "/" not in name:
            return name, password
    _refuse_form()


def _refuse_form() -> NoReturn:
    raise Refused(HTTPStatus.BAD_REQUEST, "a name without a slash and a password, as a form, please")


application = Members()
