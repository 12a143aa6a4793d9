"""The WSGI middleware, on a real server with threads, each request and response checked against PEP 3333."""

from __future__ import annotations

import gc
import http.client
import io
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest
from pool_support import PATIENCE, eventually, start

from sqlitepool import Connection, ConnectionPool, Database, Pool, Scope
from sqlitepool.ext.wsgi import ScopeMiddleware, close_at_exit

ROOT = Path(__file__).parents[2]
TEXT = [("Content-Type", "text/plain")]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ConnectionPool[Connection]]:
    """One connection, and who finds it lent gets an error at once."""
    with ConnectionPool(tmp_path / "app.db", max_size=1, timeout=0) as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE visit (id INTEGER PRIMARY KEY, page TEXT)")
        yield pool
        assert pool.leases() == []


@pytest.fixture
def db(pool: ConnectionPool[Connection]) -> Scope[Connection]:
    return Scope(pool)


def answer(environ: WSGIEnvironment, respond: StartResponse, *chunks: object) -> list[bytes]:
    respond("200 OK", list(TEXT))
    return [str(chunk).encode() for chunk in chunks]


def call(app: WSGIApplication, **environ: Any) -> Any:
    """What `app` returns, not yet iterated over."""
    environ["QUERY_STRING"] = ""
    setup_testing_defaults(environ)
    return app(environ, lambda status, headers, exc_info=None: io.BytesIO().write)


def read(response: Any) -> bytes:
    """What a server does with a response."""
    try:
        return b"".join(response)
    finally:
        if hasattr(response, "close"):
            response.close()


class Stream:
    """A response that knows whether it was closed, and in which scope."""

    def __init__(self, db: Scope[Connection], chunks: Iterable[bytes]) -> None:
        self._db = db
        self._chunks = iter(chunks)
        self.seen: list[int] = []
        self.closed = 0

    def __iter__(self) -> Stream:
        self.seen.append(id(self._db.get()))
        return self

    def __next__(self) -> bytes:
        self.seen.append(id(self._db.get()))
        return next(self._chunks)

    def close(self) -> None:
        self.closed += 1
        self.seen.append(id(self._db.get()))


# -- one scope for each request


def test_the_connection_is_the_requests_own_until_the_response_is_closed(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    streams = []

    def app(environ: WSGIEnvironment, respond: StartResponse) -> Stream:
        respond("200 OK", list(TEXT))
        streams.append(Stream(db, [b"a", b"b"]))
        streams[-1].seen.append(id(db.get()))
        return streams[-1]

    for _ in range(2):
        response = call(validator(ScopeMiddleware(validator(app), db)))
        chunks = iter(response)
        assert next(chunks) == b"a"
        assert pool.stats().in_use == 1
        assert list(chunks) == [b"b"]
        assert pool.stats().in_use == 1
        response.close()
        assert pool.stats().in_use == 0
    for stream in streams:
        assert stream.closed == 1
        assert len(set(stream.seen)) == 1
        assert len(stream.seen) >= 5


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_needs_no_connection_any_more(
    pool: ConnectionPool[Connection], db: Scope[Connection], kind: Callable[[list[bytes]], Iterable[bytes]]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        return kind(answer(environ, respond, *db.get().execute("SELECT 1").fetchone()))

    response = call(ScopeMiddleware(app, db))
    assert pool.stats().in_use == 0
    assert read(response) == b"1"


def test_a_response_that_is_closed_unread_or_twice_gives_back_once(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterator[bytes]:
        respond("200 OK", list(TEXT))
        db.get()
        return iter([b"a"])

    response = call(ScopeMiddleware(app, db))
    assert pool.stats().in_use == 1
    response.close()
    assert pool.stats().in_use == 0
    with pool.connection():  # somebody else's by now
        response.close()
        assert pool.stats().in_use == 1


def test_a_request_that_asks_for_nothing_takes_nothing(pool: ConnectionPool[Connection], db: Scope[Connection]) -> None:
    app = ScopeMiddleware(lambda environ, respond: answer(environ, respond, "x"), db)
    before = pool.stats().checkouts
    assert read(call(app)) == b"x"
    assert pool.stats().checkouts == before


def test_the_item_itself_stands_in_environ(pool: ConnectionPool[Connection], db: Scope[Connection]) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> list[bytes]:
        assert environ["app.database"] is db.get()
        return answer(environ, respond, environ["app.database"].execute("SELECT 1").fetchone()[0])

    assert read(call(validator(ScopeMiddleware(validator(app), db, environ_key="app.database")))) == b"1"
    assert pool.stats().in_use == 0
    with pool.connection():  # there is none to put there: no response is begun, and nothing stays open
        with pytest.raises(TimeoutError):
            call(ScopeMiddleware(app, db, environ_key="app.database"))
        assert pool.stats().in_use == 1


def test_middleware_inside_of_middleware(
    tmp_path: Path, pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    """Of another database: both are there. Of the same one: the inner request has a connection of its own."""
    with ConnectionPool(tmp_path / "other.db", max_size=1, timeout=0) as other_pool:
        other = Scope(other_pool)

        def both(environ: WSGIEnvironment, respond: StartResponse) -> Iterator[bytes]:
            respond("200 OK", list(TEXT))
            for scope in (db, other, db):
                yield scope.get().execute("PRAGMA database_list").fetchone()[2][-6:].encode()

        nested = ScopeMiddleware(validator(ScopeMiddleware(validator(both), db)), other)
        assert read(call(validator(nested))) == b"app.dbher.dbapp.db"
        assert (pool.stats().in_use, other_pool.stats().in_use) == (0, 0)

    pool.resize(2)
    seen = []

    def inner(environ: WSGIEnvironment, respond: StartResponse) -> list[bytes]:
        seen.append(db.get())
        return answer(environ, respond)

    def outer(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        seen.append(db.get())
        result = ScopeMiddleware(inner, db)(environ, respond)
        assert db.get() is seen[0]
        return result

    assert read(call(ScopeMiddleware(outer, db))) == b""
    assert seen[0] is not seen[1]
    assert pool.stats().in_use == 0


def test_over_a_database_it_reads(tmp_path: Path) -> None:
    with Database(tmp_path / "data.db", readers=1) as database:
        db = Scope(database)

        def app(environ: WSGIEnvironment, respond: StartResponse) -> list[bytes]:
            with database.write() as conn:
                conn.execute("CREATE TABLE IF NOT EXISTS visit (page)")
                conn.execute("INSERT INTO visit VALUES ('/')")
            return answer(environ, respond, *db.get().execute("SELECT count(*) FROM visit").fetchone())

        application = validator(ScopeMiddleware(app, db))
        assert [read(call(application)) for _ in range(3)] == [b"1", b"2", b"3"]


def test_mistakes_are_told(db: Scope[Connection]) -> None:
    with pytest.raises(TypeError, match="WSGI application"):
        ScopeMiddleware(db, db)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Scope\(pool\)"):
        ScopeMiddleware(call, db._pool)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="environ_key"):
        ScopeMiddleware(call, db, environ_key=1)  # type: ignore[arg-type]


# -- what goes wrong


def test_an_exception_in_the_application_comes_out_and_the_connection_goes_back(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> list[bytes]:
        db.get().execute("SELECT 1")
        raise LookupError("the application's own")

    with pytest.raises(LookupError, match="own"):
        call(ScopeMiddleware(app, db))
    assert pool.stats().in_use == 0


def test_an_exception_in_a_stream_comes_out_and_the_connection_goes_back(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterator[bytes]:
        respond("200 OK", list(TEXT))
        yield str(db.get().execute("SELECT 1").fetchone()[0]).encode()
        raise LookupError("the application's own")

    with pytest.raises(LookupError, match="own"):
        read(call(ScopeMiddleware(app, db)))
    assert pool.stats().in_use == 0


def test_an_exception_when_a_response_is_closed_comes_out_and_the_connection_goes_back(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    class Broken(Stream):
        def close(self) -> None:
            raise LookupError("the application's own")

    def app(environ: WSGIEnvironment, respond: StartResponse) -> Stream:
        respond("200 OK", list(TEXT))
        return Broken(db, [b"a"])

    with pytest.raises(LookupError, match="own"):
        read(call(ScopeMiddleware(app, db)))
    assert pool.stats().in_use == 0


def test_what_was_not_committed_is_rolled_back_with_a_warning(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> list[bytes]:
        db.get().execute("INSERT INTO visit (page) VALUES ('/')")
        return answer(environ, respond)

    with pytest.warns(RuntimeWarning, match=r"test_wsgi\.py:\d+ in .*app: commit before"):
        read(call(ScopeMiddleware(app, db)))
    with pool.connection() as conn:
        assert conn.execute("SELECT count(*) FROM visit").fetchone() == (0,)


# -- on a server


def test_what_an_application_that_raised_had_not_committed_is_rolled_back_without_a_word(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> list[bytes]:
        db.get().execute("INSERT INTO visit (page) VALUES ('/')")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(ScopeMiddleware(app, db))
    with pool.connection() as conn:
        assert conn.execute("SELECT count(*) FROM visit").fetchall() == [(0,)]


def test_a_file_is_left_to_the_server_and_needs_no_connection_any_more(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        db.get()
        respond("200 OK", list(TEXT))
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(b"a file"))
        return wrapped

    response = call(ScopeMiddleware(app, db), **{"wsgi.file_wrapper": FileWrapper})
    assert type(response) is FileWrapper
    assert pool.stats().in_use == 0
    assert list(response) == [b"a file"]


class ThreadedServer(ThreadingMixIn, WSGIServer):
    daemon_threads = False
    request_queue_size = 100

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def get_stderr(self) -> Any:  # wsgiref prints the traceback of what an application raises
        return io.StringIO()


@contextmanager
def serving(app: WSGIApplication) -> Iterator[int]:
    server = make_server("127.0.0.1", 0, validator(app), ThreadedServer, QuietHandler)
    running = start(server.serve_forever, 0.01)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        running.result(PATIENCE)
        server.server_close()


def ask(port: int, url: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_many_clients_share_few_connections_and_none_sees_anothers(tmp_path: Path) -> None:
    pool = ConnectionPool(tmp_path / "app.db", max_size=3, timeout=PATIENCE)
    with pool.connection() as conn:
        conn.execute("CREATE TABLE visit (page TEXT)")
    db = Scope(pool)
    holders: dict[int, int] = {}

    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterator[bytes]:
        conn = db.get()
        assert holders.setdefault(id(conn), threading.get_ident()) == threading.get_ident(), "two have it at once"
        with conn:
            conn.execute("INSERT INTO visit VALUES (?)", (environ["PATH_INFO"],))
        respond("200 OK", list(TEXT))
        for _ in range(3):
            assert db.get() is conn
            yield b"%d " % conn.execute("SELECT count(*) FROM visit WHERE page = ?", (environ["PATH_INFO"],)).fetchone()
        del holders[id(conn)]

    with serving(ScopeMiddleware(app, db)) as port, ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda number: ask(port, f"/{number}"), range(200)))
    assert answers == [(200, b"1 1 1 ")] * 200
    stats = pool.stats()
    assert stats.in_use == 0
    assert stats.opened <= 3
    assert pool.close() == []
    assert {file.name for file in tmp_path.iterdir()} == {"app.db"}


@pytest.mark.parametrize("when", ["/before", "/stream"])
def test_a_server_that_answers_an_exception_has_given_the_connection_back(
    pool: ConnectionPool[Connection], db: Scope[Connection], when: str
) -> None:
    def body() -> Iterator[bytes]:
        yield b"%d" % db.get().execute("SELECT 1").fetchone()
        raise LookupError

    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        db.get()
        if environ["PATH_INFO"] == "/before":
            raise LookupError
        respond("200 OK", list(TEXT))
        return body()

    with serving(ScopeMiddleware(app, db)) as port:
        for _ in range(3):
            assert ask(port, when)[0] == (500 if when == "/before" else 200)
            eventually(lambda: pool.stats().in_use == 0)


def test_a_client_that_goes_away_in_the_middle_costs_no_connection(
    pool: ConnectionPool[Connection], db: Scope[Connection]
) -> None:
    ended = []

    def app(environ: WSGIEnvironment, respond: StartResponse) -> Iterator[bytes]:
        respond("200 OK", list(TEXT))
        try:
            while True:
                yield db.get().execute("SELECT zeroblob(10000)").fetchone()[0]
        finally:
            ended.append(db.get().execute("SELECT 1").fetchone())  # still its own

    with serving(ScopeMiddleware(app, db)) as port:
        for number in range(3):
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert client.recv(1000)
                assert pool.stats().in_use == 1
            eventually(lambda: pool.stats().in_use == 0)
            assert ended == [(1,)] * (number + 1)
    assert pool.stats().discarded == 0


# -- the end of the process

PROGRAM = """
import os, sys, threading
from sqlitepool import ConnectionPool, Database, Pool
from sqlitepool.ext.wsgi import close_at_exit

path, how = sys.argv[1:]
"""


def run(path: Path, code: str, *options: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM + code, str(path), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


@pytest.mark.parametrize("kind", ["ConnectionPool", "Database"])
def test_at_exit_the_database_is_closed_in_order(tmp_path: Path, kind: str) -> None:
    code = """
pool = close_at_exit(globals()[how](path))
read = pool.read if how == "Database" else pool.connection
def work():
    with read() as conn:
        conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert os.path.exists(path + "-wal")
"""
    assert run(tmp_path / "app.db", code, kind) == ""
    assert not {file.name for file in tmp_path.iterdir()} & {"app.db-wal", "app.db-shm"}


def test_at_exit_a_loan_that_never_ends_is_told_and_not_waited_for_long(tmp_path: Path) -> None:
    code = """
pool = close_at_exit(ConnectionPool(path), timeout=0.01)
conn = pool.acquire()
"""
    assert "has an item lent" in run(tmp_path / "app.db", code, "-")


def test_under_mod_wsgi_the_servers_signal_drains_and_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server itself is in tests/servers; here is what it calls, while requests are still running."""
    callbacks: list[Callable[..., object]] = []
    server = type(sys)("mod_wsgi")
    monkeypatch.setitem(sys.modules, "mod_wsgi", server)
    close_at_exit(Pool(list))  # the package is there, outside of the server
    monkeypatch.setattr(server, "subscribe_shutdown", callbacks.append, raising=False)
    pool: Pool[list[int]] = close_at_exit(Pool(list))
    with pool.connection():
        callbacks[0]("process_stopping", reason="x")
    assert pool.stats().size == 0
    with pool.connection():
        pass


def test_a_pool_that_nobody_has_any_more_is_not_kept_for_its_end() -> None:
    known = weakref.ref(close_at_exit(Pool(list)))
    gc.collect()
    assert known() is None
    with pytest.raises(ValueError, match="timeout"):
        close_at_exit(Pool(list), timeout=-1)
