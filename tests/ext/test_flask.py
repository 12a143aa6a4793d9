"""The Flask extension: a connection for each application context, back at its end, or at that of a streamed body."""

from __future__ import annotations

import gc
import os
import sqlite3
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, start

pytest.importorskip("flask", reason="Flask is not installed")

import flask
from flask import Flask, Response, abort, redirect, request, send_file, stream_with_context

from sqlitepool import PoolClosed, PoolTimeout
from sqlitepool.ext.flask import SQLiteDatabase, SQLitePool

MakeApp = Callable[..., Flask]


def create_table(conn: sqlite3.Connection) -> None:
    conn.execute("CREATE TABLE IF NOT EXISTS visit (id INTEGER PRIMARY KEY, page TEXT)")


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[MakeApp]:
    """Makes applications with an instance folder of their own; closes their pools at the end."""
    made = []

    def make(*extensions: Any, **config: Any) -> Flask:
        app = Flask(__name__, instance_path=str(tmp_path / f"instance{len(made)}"))
        app.testing = True
        app.config.update({"SQLITEPOOL_DATABASE": "app.db", **config})
        for extension in extensions:
            extension.init_app(app)
        made.append((app, extensions))
        return app

    yield make
    for app, extensions in made:
        for extension in extensions:
            with app.app_context():
                source = extension.database if isinstance(extension, SQLiteDatabase) else extension.pool
                assert source.close() == [], "a connection was not given back"


def in_use(app: Flask, db: SQLitePool[Any]) -> int:
    with app.app_context():
        return db.pool.stats().in_use


def visits(app: Flask, db: SQLitePool[Any]) -> int:
    with app.app_context():
        return int(db.connection.execute("SELECT count(*) FROM visit").fetchone()[0])


# -- one connection for each context


def test_a_request_has_the_same_connection_all_along_and_gives_it_back(make_app: MakeApp) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = make_app(db)
    seen: list[int] = []

    @app.before_request
    def before() -> None:
        seen.append(id(db.connection))

    @app.get("/")
    def index() -> str:
        assert db.pool.stats().in_use == 1
        return str(id(db.connection))

    @app.after_request
    def after(response: Response) -> Response:
        seen.append(id(db.connection))
        return response

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        seen.append(id(db.connection))

    answer = int(app.test_client().get("/").text)
    assert seen == [answer] * 3
    assert in_use(app, db) == 0


def test_a_request_that_asks_for_nothing_takes_nothing_and_opens_nothing(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(SQLitePool())

    @app.get("/")
    def index() -> str:
        return "hello"

    assert app.test_client().get("/").text == "hello"
    assert list(tmp_path.iterdir()) == []


def test_a_context_inside_of_another_has_a_connection_of_its_own(make_app: MakeApp) -> None:
    db = SQLitePool(setup=create_table)
    app = make_app(db)
    with app.app_context():
        outer = db.connection
        outer.execute("INSERT INTO visit (page) VALUES ('/')")
        with app.app_context():
            assert db.connection is not outer
            assert db.connection.execute("SELECT count(*) FROM visit").fetchone() == (0,)
        assert db.connection is outer
        outer.commit()
    assert visits(app, db) == 1


def test_a_command_has_a_connection(make_app: MakeApp) -> None:
    db = SQLitePool()
    app = make_app(db)

    @app.cli.command("init-db")
    def init_db() -> None:
        db.connection.executescript("CREATE TABLE visit (page); INSERT INTO visit VALUES ('/')")

    assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
    assert visits(app, db) == 1


def test_a_request_context_without_a_request_gives_the_connection_back(make_app: MakeApp) -> None:
    db = SQLitePool()
    app = make_app(db)
    with app.test_request_context("/"):
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
    assert in_use(app, db) == 0


def test_threads_of_a_request_that_copy_its_context_have_their_own(make_app: MakeApp) -> None:
    db = SQLitePool()
    app = make_app(db)

    @app.get("/")
    def index() -> list[bool]:
        mine = db.connection

        @flask.copy_current_request_context  # type: ignore[untyped-decorator]
        def other() -> bool:
            return db.connection is mine

        return [start(other).result(PATIENCE)]

    assert app.test_client().get("/").json == [False]
    assert in_use(app, db) == 0


def test_a_client_that_keeps_the_context_keeps_the_connection_with_it(make_app: MakeApp) -> None:
    db = SQLitePool()
    app = make_app(db)

    @app.get("/")
    def index() -> str:
        return str(id(db.connection))

    with app.test_client() as client:
        assert int(client.get("/").text) == id(db.connection)
        client.get("/")
    assert in_use(app, db) == 0


def test_a_request_inside_of_the_tests_own_context_shares_its_connection(make_app: MakeApp) -> None:
    """As Flask does it: a request joins a context of its application that is open already."""
    db = SQLitePool(setup=create_table)
    app = make_app(db)

    @app.get("/")
    def index() -> Response:
        assert db.connection is mine
        return Response(stream_with_context(iter(["a", "b"])))

    with app.app_context():
        mine = db.connection
        mine.execute("INSERT INTO visit (page) VALUES ('/')")
        for _ in range(2):
            with app.test_client().get("/") as answer:
                assert answer.text == "ab"
            assert db.connection is mine
            assert mine.in_transaction
            assert db.pool.stats().in_use == 1
        mine.commit()
    assert in_use(app, db) == 0


def test_outside_of_a_context_there_is_none(make_app: MakeApp) -> None:
    db = SQLitePool()
    make_app(db)
    with pytest.raises(RuntimeError, match="outside of application context"):
        _ = db.connection


def test_the_proxy_is_the_connection_of_wherever_it_is_used(make_app: MakeApp) -> None:
    db = SQLitePool(setup=create_table)
    conn = db.proxy
    app = make_app(db)
    with app.app_context():
        with conn:
            conn.execute("INSERT INTO visit (page) VALUES ('/')")
        assert isinstance(conn, sqlite3.Connection)
        assert conn == db.connection
    with app.app_context():
        assert conn.execute("SELECT count(*) FROM visit").fetchone() == (1,)


# -- the end of a request


def test_what_was_not_committed_is_rolled_back_with_a_warning_that_says_where(make_app: MakeApp) -> None:
    db = SQLitePool(setup=create_table)
    conn = db.proxy
    app = make_app(db)

    @app.post("/")
    def forget() -> str:
        conn.execute("INSERT INTO visit (page) VALUES ('/')")
        return "done"

    with pytest.warns(RuntimeWarning, match=r"taken at .*test_flask\.py:\d+ in .*forget: commit before"):
        app.test_client().post("/")
    assert visits(app, db) == 0


@pytest.mark.parametrize("how", ["raise", "abort"])
def test_what_a_failed_request_did_not_commit_is_rolled_back_without_a_word(make_app: MakeApp, how: str) -> None:
    db = SQLitePool(setup=create_table, max_size=1, timeout=0)
    app = make_app(db)
    app.testing = False

    @app.post("/")
    def fail() -> str:
        db.connection.execute("INSERT INTO visit (page) VALUES ('/')")
        if how == "abort":
            abort(409)
        raise LookupError

    for _ in range(3):
        answer = app.test_client().post("/")  # never closed: error pages look streamed, but need no connection
        assert answer.status_code == (409 if how == "abort" else 500)
        assert in_use(app, db) == 0
    assert visits(app, db) == 0


def test_an_exception_that_comes_out_of_the_application_gives_the_connection_back(make_app: MakeApp) -> None:
    db = SQLitePool(setup=create_table)
    app = make_app(db)

    @app.post("/")
    def fail() -> str:
        db.connection.execute("INSERT INTO visit (page) VALUES ('/')")
        raise LookupError

    with pytest.raises(LookupError):
        app.test_client().post("/")
    assert in_use(app, db) == 0
    assert visits(app, db) == 0


def test_the_error_of_a_full_pool_names_the_line_that_has_the_connection(make_app: MakeApp) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = make_app(db)
    with app.app_context():
        _ = db.connection
        with app.app_context(), pytest.raises(PoolTimeout, match=r"test_flask\.py:\d+ in test_the_error_of_a_full"):
            _ = db.connection


# -- streamed bodies


def stream_app(make_app: MakeApp, db: SQLitePool[Any]) -> Flask:
    app = make_app(db)

    def numbers(conn: sqlite3.Connection) -> Iterator[str]:
        for number in range(3):
            assert db.pool.stats().in_use == 1
            yield str(conn.execute("SELECT ?", (number,)).fetchone()[0])
        if "fail" in request.args:
            raise LookupError

    @app.get("/taken-before")
    def taken_before() -> Response:
        conn = db.connection

        def body() -> Iterator[str]:
            assert db.connection is conn
            yield from numbers(conn)
            assert db.connection is conn

        return Response(stream_with_context(body()))

    @app.get("/taken-while-streaming")
    def taken_while_streaming() -> Response:
        @stream_with_context
        def body() -> Iterator[str]:
            yield from numbers(db.connection)

        return Response(body())

    @app.get("/without-context")
    def without_context() -> Response:
        conn = db.connection
        return Response(str(conn.execute("SELECT ?", (number,)).fetchone()[0]) for number in range(3))

    return app


STREAMS = ["/taken-before", "/taken-while-streaming", "/without-context"]


@pytest.mark.parametrize("url", STREAMS)
def test_a_stream_reads_by_the_requests_connection_until_it_is_closed(make_app: MakeApp, url: str) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = stream_app(make_app, db)
    for _ in range(3):
        with app.test_client().get(url) as answer:
            assert in_use(app, db) == 1
            assert answer.text == "012"
        assert in_use(app, db) == 0
    with app.app_context():
        assert db.pool.stats().discarded == 0


@pytest.mark.parametrize("url", STREAMS)
def test_a_stream_that_is_closed_in_the_middle_gives_the_connection_back(make_app: MakeApp, url: str) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = stream_app(make_app, db)
    for _ in range(3):
        answer = app.test_client().get(url)
        assert next(iter(answer.response)) == b"0"
        answer.close()
        answer.close()
        assert in_use(app, db) == 0


def test_a_stream_that_fails_gives_the_connection_back(make_app: MakeApp) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = stream_app(make_app, db)
    answer = app.test_client().get("/taken-before?fail=1")
    with pytest.raises(LookupError):
        _ = answer.text
    answer.close()
    assert in_use(app, db) == 0


def test_a_client_that_buffers_has_the_stream_closed(make_app: MakeApp) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = stream_app(make_app, db)
    assert app.test_client().get("/taken-before", buffered=True).text == "012"
    assert in_use(app, db) == 0


def test_two_streams_end_in_any_order_and_each_has_its_own_connection(make_app: MakeApp) -> None:
    db = SQLitePool()
    app = stream_app(make_app, db)
    app.testing = False  # the assertions on how many are in use do not hold for two
    first, second = (app.test_client().get("/without-context") for _ in range(2))
    assert in_use(app, db) == 2
    first.close()
    assert second.text == "012"
    second.close()
    assert in_use(app, db) == 0


def test_another_response_in_the_place_of_a_streamed_one_loses_no_connection(make_app: MakeApp) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = Flask(__name__)

    @app.after_request  # known before the extension's own, so called after them
    def replace(response: Response) -> Response:
        return Response("another")

    stream = make_app(db)
    app.config.update(stream.config)
    app.instance_path = stream.instance_path
    SQLitePool.init_app(db, app)

    @app.get("/")
    def index() -> Response:
        conn = db.connection
        return Response(str(conn.execute("SELECT 1").fetchone()[0]) for _ in range(3))

    assert app.test_client().get("/").text == "another"
    assert in_use(app, db) == 0
    with app.app_context():
        db.pool.close()


def test_a_response_that_the_application_streams_in_the_place_of_another_keeps_the_connection(
    tmp_path: Path,
) -> None:
    class Streaming(Flask):
        def process_response(self, response: Response) -> Response:
            conn = db.connection
            super().process_response(response)
            return Response(str(conn.execute("SELECT ?", (number,)).fetchone()[0]) for number in range(3))

    db = SQLitePool(database=tmp_path / "app.db", max_size=1, timeout=0)
    app = Streaming(__name__)
    db.init_app(app)
    app.add_url_rule("/", view_func=lambda: "plain")
    with app.test_client().get("/") as answer:
        assert in_use(app, db) == 1
        assert answer.text == "012"
    assert in_use(app, db) == 0
    with app.app_context():
        assert db.pool.close() == []


def test_the_applications_own_g_may_refuse_attributes(make_app: MakeApp) -> None:
    class Controlled:
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    db = SQLitePool()
    app = make_app(db)
    app.app_ctx_globals_class = Controlled  # type: ignore[assignment]
    with app.app_context():
        assert db.connection is db.connection
        assert db.pool.stats().in_use == 1
    assert in_use(app, db) == 0


def test_files_and_redirects_do_not_keep_the_connection_while_they_are_sent(make_app: MakeApp) -> None:
    db = SQLitePool(max_size=1, timeout=0)
    app = make_app(db)

    @app.get("/file")
    def file() -> Response:
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
        return send_file(__file__)

    @app.get("/redirect")
    def leave() -> Any:
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
        abort(redirect("/file"))

    for url in ("/file", "/redirect"):
        with app.test_client().get(url) as answer:
            assert in_use(app, db) == 0
            assert answer.status_code in (200, 302)


# -- applications, databases, configuration


def test_several_databases_each_with_a_class_of_its_own(make_app: MakeApp, tmp_path: Path) -> None:
    class Users:
        def __init__(self, conn: sqlite3.Connection) -> None:
            self.conn = conn

    db, users = SQLitePool(), SQLitePool(wrap=Users, config_prefix="USERS")
    app = make_app(db, users, USERS_DATABASE=tmp_path / "users.db", USERS_OPTIONS={"max_size": 3})
    with app.app_context():
        assert isinstance(users.connection, Users)
        assert users.connection.conn.execute("PRAGMA database_list").fetchone()[2] == str(tmp_path / "users.db")
        assert db.connection.execute("PRAGMA database_list").fetchone()[2].endswith("instance0/app.db")
        assert users.pool.stats().max_size == 3
        assert (db.pool.stats().in_use, users.pool.stats().in_use) == (1, 1)
    with app.app_context():
        assert (db.pool.stats().in_use, users.pool.stats().in_use) == (0, 0)


def test_each_application_has_its_own_pool(make_app: MakeApp) -> None:
    db = SQLitePool(setup=create_table)
    first, second = make_app(db), make_app(db)
    with first.app_context():
        with db.connection as conn:
            conn.execute("INSERT INTO visit (page) VALUES ('/')")
        with second.app_context():
            assert db.connection.execute("SELECT count(*) FROM visit").fetchone() == (0,)
    assert (visits(first, db), visits(second, db)) == (1, 0)


def test_the_configuration_counts_for_more_than_the_arguments(make_app: MakeApp, tmp_path: Path) -> None:
    db = SQLitePool(database=tmp_path / "argument.db", max_size=3, timeout=1)
    app = make_app(db, SQLITEPOOL_DATABASE=":memory:", SQLITEPOOL_OPTIONS={"max_size": 2})
    with app.app_context():
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
        assert db.pool.name == ":memory:"
        assert db.pool.stats().max_size == 2
    assert list(tmp_path.iterdir()) == []


def test_without_a_configuration_the_arguments_are_enough(tmp_path: Path) -> None:
    app = Flask(__name__)
    db = SQLitePool(app, database=tmp_path / "app.db")
    with app.app_context():
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
        db.pool.close()
        with pytest.raises(PoolClosed), app.app_context():
            _ = db.connection


def test_mistakes_are_told(make_app: MakeApp) -> None:
    db = SQLitePool()
    app = make_app()
    with app.app_context():
        with pytest.raises(RuntimeError, match="call init_app"):
            _ = db.connection
        db.init_app(app)
        del app.config["SQLITEPOOL_DATABASE"]
        with pytest.raises(RuntimeError, match=r'Set app.config\["SQLITEPOOL_DATABASE"\]'):
            _ = db.connection
        with pytest.raises(RuntimeError, match="config_prefix of its own"):
            SQLitePool(app)
        app.config.update(SQLITEPOOL_DATABASE="app.db", SQLITEPOOL_OPTIONS={"max_sise": 3})
        with pytest.raises(TypeError, match="max_sise"):
            _ = db.connection
    with pytest.raises(TypeError, match="config_prefix"):
        SQLitePool(config_prefix=None)  # type: ignore[call-overload]


def test_an_application_that_is_gone_takes_its_pool_along(tmp_path: Path) -> None:
    db = SQLitePool(database=tmp_path / "app.db")
    app = Flask(__name__)
    db.init_app(app)
    with app.app_context():
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
        db.pool.close()
        pool = weakref.ref(db.pool)
    del app
    gc.collect()
    assert pool() is None


def test_a_request_that_comes_when_the_process_ends_is_still_served(make_app: MakeApp) -> None:
    """As on the development server, whose threads go on while the functions of `atexit` run."""
    db = SQLitePool()
    app = make_app(db)
    at_exit = app.extensions["sqlitepool"]["SQLITEPOOL"].close
    with app.app_context():
        pool, conn = db.pool, db.connection
        assert [lease.thread_name for lease in at_exit()] == ["MainThread"]
        assert db.connection is conn
        assert conn.execute("SELECT 1").fetchone() == (1,)
    assert pool.stats().size == 0
    with app.app_context():
        assert db.connection.execute("SELECT 1").fetchone() == (1,)
        assert db.pool is not pool


def test_a_request_that_asks_a_pool_that_was_closed_just_before_gets_the_next_one(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = SQLitePool()
    app = make_app(db)
    known = app.extensions["sqlitepool"]["SQLITEPOOL"]
    source = known.source

    def source_that_is_closed_at_once() -> Any:
        found = source()
        monkeypatch.setattr(known, "source", source)
        known.close()
        return found

    monkeypatch.setattr(known, "source", source_that_is_closed_at_once)
    with app.app_context():
        assert db.connection.execute("SELECT 1").fetchone() == (1,)


FORK = """
import os, signal, sys
from flask import Flask
from sqlitepool.ext.flask import SQLitePool

app = Flask("app")
db = SQLitePool(app, database=sys.argv[1])
app.extensions["sqlitepool"]["SQLITEPOOL"]._lock.acquire()  # as if another thread were opening the pool
child = os.fork()
if child == 0:
    signal.alarm(10)
    with app.app_context():
        os._exit(db.connection.execute("SELECT 7").fetchone()[0])
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_that_was_forked_while_a_thread_opened_the_pool_opens_its_own(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", FORK, tmp_path / "app.db"], env=environment, timeout=PATIENCE)
    assert ended.returncode == 7


def test_over_a_database_the_connection_reads_and_the_database_writes(make_app: MakeApp) -> None:
    db = SQLiteDatabase(readers=1)
    app = make_app(db)

    @app.post("/")
    def visit() -> str:
        with db.database.write() as conn:
            create_table(conn)
            conn.execute("INSERT INTO visit (page) VALUES ('/')")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.connection.execute("DELETE FROM visit")
        return str(db.connection.execute("SELECT count(*) FROM visit").fetchone()[0])

    client = app.test_client()
    assert [client.post("/").text for _ in range(3)] == ["1", "2", "3"]
    with app.app_context():
        assert db.database.stats().readers.in_use == 0
