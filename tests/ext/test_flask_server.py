"""The Flask extension on Flask's own server: a thread for each request, and the reloader."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from pool_support import PATIENCE, eventually, start

pytest.importorskip("flask", reason="Flask is not installed")

from flask import Flask, Response, stream_with_context
from werkzeug.serving import WSGIRequestHandler, make_server

from sqlitepool.ext.flask import SQLiteDatabase, SQLitePool

ROOT = Path(__file__).parents[2]
CLIENTS = 16


class QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:
        pass


@contextmanager
def serving(app: Flask) -> Iterator[int]:
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietHandler)
    running = start(server.serve_forever, 0.01)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        running.result(PATIENCE)
        server.server_close()


def ask(port: int, url: str = "/", method: str = "GET") -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, url)
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        return text
    finally:
        connection.close()


def create_table(conn: sqlite3.Connection) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS visit (page TEXT)")


def test_many_clients_share_few_connections_and_nothing_is_lost(tmp_path: Path) -> None:
    db = SQLitePool(database=tmp_path / "app.db", setup=create_table, max_size=3, timeout=PATIENCE)
    app = Flask(__name__)
    db.init_app(app)
    holders: dict[int, int] = {}

    @app.post("/<page>")
    def visit(page: str) -> str:
        with db.connection as conn:
            assert holders.setdefault(id(conn), threading.get_ident()) == threading.get_ident(), "two have it at once"
            conn.execute("INSERT INTO visit VALUES (?)", (page,))
            del holders[id(conn)]
        return "done"

    @app.get("/<page>")
    def show(page: str) -> Response:
        conn = db.connection

        def body() -> Iterator[str]:
            assert db.connection is conn
            for (name,) in conn.execute("SELECT page FROM visit WHERE page = ?", (page,)):
                yield f"{name} "

        return Response(stream_with_context(body()))

    def client(number: int) -> str:
        for _ in range(5):
            ask(port, f"/{number}", "POST")
        return ask(port, f"/{number}")

    with serving(app) as port:
        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(client, range(CLIENTS)))
        assert answers == [f"{number} " * 5 for number in range(CLIENTS)]
        with app.app_context():
            eventually(lambda: db.pool.stats().in_use == 0)
            stats = db.pool.stats()
    assert stats.opened <= 3
    assert stats.discarded == 0
    with app.app_context():
        assert db.pool.close() == []
    assert {file.name for file in tmp_path.iterdir()} == {"app.db"}


def test_a_client_that_goes_away_in_the_middle_costs_no_connection(tmp_path: Path) -> None:
    db = SQLitePool(database=tmp_path / "app.db", max_size=1, timeout=0)
    app = Flask(__name__)
    db.init_app(app)
    ended: list[object] = []

    @app.get("/")
    def endless() -> Response:
        def body() -> Iterator[bytes]:
            try:
                while True:
                    yield db.connection.execute("SELECT zeroblob(10000)").fetchone()[0]
            finally:
                ended.append(db.connection.execute("SELECT 1").fetchone())  # still its own

        return Response(stream_with_context(body()))

    with serving(app) as port, app.app_context():
        for number in range(3):
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(1000)
                assert db.pool.stats().in_use == 1
            eventually(lambda: db.pool.stats().in_use == 0)
            assert ended == [(1,)] * (number + 1)
        assert db.pool.stats().discarded == 0
    with app.app_context():
        assert db.pool.close() == []


def test_over_a_database_all_writers_get_their_turn(tmp_path: Path) -> None:
    db = SQLiteDatabase(database=tmp_path / "app.db", readers=2)
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/")
    def visit() -> str:
        with db.database.write() as conn:
            create_table(conn)
            conn.execute("INSERT INTO visit VALUES ('/')")
        return str(db.connection.execute("SELECT count(*) FROM visit").fetchone()[0])

    with serving(app) as port, ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda _: int(ask(port, "/", "POST")), range(100)))
    assert max(answers) == 100
    with app.app_context():
        assert db.database.stats().commits >= 100
        assert db.database.close() == []


# -- the reloader

PROGRAM = """
from flask import Flask
from sqlitepool.ext.flask import SQLitePool

VERSION = 1
app = Flask(__name__, instance_path={folder!r})
app.config["SQLITEPOOL_DATABASE"] = "app.db"
db = SQLitePool(app, setup=lambda conn: conn.execute("CREATE TABLE IF NOT EXISTS visit (page TEXT)"))
conn = db.proxy

@app.post("/")
def visit():
    with conn:
        conn.execute("INSERT INTO visit VALUES ('/')")
    return "done"

@app.get("/")
def show():
    return f"version {{VERSION}}: {{conn.execute('SELECT count(*) FROM visit').fetchone()[0]}}"

if __name__ == "__main__":
    app.run(port={port}, debug=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int, text: str) -> bool:
    try:
        return text in ask(port)
    except (OSError, http.client.HTTPException):  # not yet there, or no longer
        return False


def users_of(path: Path) -> list[int]:
    """Which processes have a file open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.realpath(link) == str(path) for link in (folder / "fd").iterdir()):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is not ours
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
@pytest.mark.parametrize("command", ["flask run", "app.run"])
def test_the_reloader_serves_the_new_code_on_the_same_data(tmp_path: Path, command: str) -> None:
    port, source, log = free_port(), tmp_path / "hello.py", tmp_path / "log"
    data = tmp_path / "data"
    program = PROGRAM.format(folder=str(data), port=port)
    source.write_text(program)
    start_it = ["-m", "flask", "--app", "hello", "run", "--debug", f"--port={port}"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-W", "always::ResourceWarning", *(start_it if command == "flask run" else ["hello.py"])],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        eventually(lambda: answers(port, "version 1: 0") or server.poll() is not None)
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda _: ask(port, "/", "POST"), range(50)))
        assert server.pid not in users_of(data / "app.db"), "the process that only watches has opened the database"
        for version in (2, 3):
            written = tmp_path / "written"
            written.write_text(program.replace("VERSION = 1", f"VERSION = {version}"))
            written.replace(source)  # all at once: it may be loaded at any time
            eventually(partial(answers, port, f"version {version}: 5"))
            ask(port, "/", "POST")
        assert ask(port) == "version 3: 52"
        # A terminal would send it to both; but then the one that watches kills the other after a quarter of a second.
        os.kill(users_of(data / "app.db")[0], signal.SIGINT)
        server.wait(PATIENCE)
    finally:
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        server.wait()
        print(log.read_text())
    # Requests come all the time, so the server may complain that it cannot begin a thread any more; but not about us.
    assert not re.search("locked|sqlite", log.read_text().replace(str(tmp_path), ""))
    assert {file.name for file in data.iterdir()} == {"app.db"}
