"""FastAPI and Starlette: the pool lives as long as the application, and lends to requests whose parts run anywhere."""

import gc
import http.client
import json
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from pool_support import PATIENCE, eventually, start

pytest.importorskip("fastapi", reason="FastAPI is not installed")
pytest.importorskip("httpx2", reason="httpx2, which the test client needs, is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

import uvicorn
from anyio import CancelScope, sleep_forever
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sqlitepool import Connection, ConnectionPool, Database, Pool, PoolClosed, PoolTimeout
from sqlitepool.ext.fastapi import PoolDependency

THREADS = 40  # of the server, for all endpoints that are plain functions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    conn = sqlite3.connect(path)
    conn.executescript("PRAGMA journal_mode = wal; CREATE TABLE visit (id INTEGER PRIMARY KEY, page TEXT)")
    conn.close()
    return path


class Visits:
    """What an application has around its connection."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn

    def add(self, page: str) -> None:
        with self.conn:
            self.conn.execute("INSERT INTO visit (page) VALUES (?)", (page,))

    def count(self) -> int:
        return int(self.conn.execute("SELECT count(*) FROM visit").fetchone()[0])


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve on a free port, and give it."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=200)
    config = uvicorn.Config(app, lifespan="on", loop="asyncio", http="h11", ws="none", log_level="warning")
    server = uvicorn.Server(config)
    running = start(server.run, [listening])
    try:
        eventually(lambda: server.started or running.done())
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        running.result(PATIENCE)
        listening.close()


def ask(port: int, url: str, method: str = "GET") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, url)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_one_hundred_clients_and_three_connections(path: Path) -> None:
    """More requests at once than the server has threads, all of which want a connection before they do anything."""
    db = PoolDependency(lambda: ConnectionPool(path, wrap=Visits, max_size=3, timeout=PATIENCE))
    app = FastAPI(lifespan=db.lifespan)
    threads = set()

    @app.post("/{page}")
    def visit(page: str, visits: Annotated[Visits, Depends(db)]) -> dict[str, int]:
        threads.add(threading.get_ident())
        visits.add(page)
        return {"visits": visits.count()}

    @app.get("/")
    def count(visits: Annotated[Visits, Depends(db)]) -> int:
        return visits.count()

    crowd = threading.Barrier(100)

    def client(number: int) -> list[int]:
        crowd.wait(PATIENCE)
        return [ask(port, f"/page{number}" if n % 2 else "/", "POST" if n % 2 else "GET")[0] for n in range(4)]

    with serving(app) as port:
        with ThreadPoolExecutor(100) as clients:
            statuses = Counter(status for own in clients.map(client, range(100)) for status in own)
        assert statuses == {200: 400}
        assert ask(port, "/") == (200, 200)
        eventually(lambda: db.pool.stats().in_use == 0)
        stats = db.pool.stats()
        assert stats.opened <= 3
        assert stats.timeouts == 0
    assert len(threads) > 1
    assert not path.with_name("app.db-wal").exists()


def test_requests_wait_for_a_connection_without_a_thread(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=PATIENCE))
    app = FastAPI(lifespan=db.lifespan)
    arrived: list[int] = []
    go = threading.Event()

    async def arrive() -> None:
        arrived.append(1)

    @app.get("/wait", dependencies=[Depends(arrive)])
    def wait(conn: Annotated[Connection, Depends(db)]) -> bool:
        return go.wait(PATIENCE)

    @app.get("/ping")
    async def ping() -> None: ...

    with serving(app) as port:
        before = threading.active_count()
        clients = [start(ask, port, "/wait") for _ in range(30)]
        eventually(lambda: len(arrived) == 30)
        assert ask(port, "/ping")[0] == 200  # so all of them have gone as far as they can
        assert threading.active_count() - before <= 30 + 4, "some wait on threads of the server"
        go.set()
        assert [client.result(PATIENCE) for client in clients] == [(200, True)] * 30


def test_a_connection_goes_back_even_if_all_threads_of_the_server_are_busy(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=PATIENCE))
    app = FastAPI(lifespan=db.lifespan)
    first, others = threading.Event(), threading.Event()
    entered: list[str] = []

    @app.get("/first")
    def borrow(conn: Annotated[Connection, Depends(db)]) -> JSONResponse:
        entered.append("first")
        return JSONResponse(first.wait(PATIENCE))

    @app.get("/other")
    def other() -> JSONResponse:
        entered.append("other")
        return JSONResponse(others.wait(PATIENCE))

    with serving(app) as port:
        clients = [start(ask, port, "/first")]
        eventually(lambda: len(entered) == 1)
        clients += [start(ask, port, "/other") for _ in range(THREADS)]
        eventually(lambda: len(entered) == THREADS)
        first.set()
        eventually(lambda: len(entered) == THREADS + 1)
        eventually(lambda: db.pool.stats().in_use == 0)
        others.set()
        assert [client.result(PATIENCE) for client in clients] == [(200, True)] * (THREADS + 1)


def test_a_request_that_is_cancelled_gives_back_its_connection_or_its_place_in_the_line(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=PATIENCE))
    app = FastAPI(lifespan=db.lifespan)
    running: list[CancelScope] = []
    go = threading.Event()

    class Impatient:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            with CancelScope() as patience:
                running.append(patience)
                await self.app(scope, receive, send)
            if patience.cancelled_caught:
                await PlainTextResponse("too late", 504)(scope, receive, send)

    app.add_middleware(Impatient)

    @app.get("/endless")
    async def endless(conn: Annotated[Connection, Depends(db)]) -> None:
        assert db.pool.stats().in_use == 1
        running[-1].cancel()
        await sleep_forever()

    @app.get("/hold")
    def hold(conn: Annotated[Connection, Depends(db)]) -> bool:
        return go.wait(PATIENCE)

    @app.get("/cancel")
    async def cancel(number: int) -> None:
        running[number].cancel()

    with TestClient(app) as client:
        for _ in range(3):
            assert client.get("/endless").status_code == 504
            assert db.pool.stats().in_use == 0
        del running[:]
        holder = start(client.get, "/hold")
        eventually(lambda: db.pool.stats().in_use == 1)
        waiter = start(client.get, "/hold")
        eventually(lambda: len(running) == 2)
        client.get("/cancel?number=1")
        assert waiter.result(PATIENCE).status_code == 504
        go.set()
        assert holder.result(PATIENCE).status_code == 200
        assert client.get("/hold").status_code == 200
    gc.collect()  # a scope that was never closed would complain


def test_a_request_has_one_connection_in_all_its_dependencies_and_gives_it_back(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)
    lent = Annotated[Connection, Depends(db)]

    def user(conn: lent) -> int:
        return id(conn)

    @app.get("/")
    def index(conn: lent, seen: Annotated[int, Depends(user)]) -> bool:
        assert db.pool.stats().in_use == 1
        return seen == id(conn)

    with TestClient(app) as client:
        for _ in range(3):
            assert client.get("/").json() is True
            assert db.pool.stats().in_use == 0
        assert db.pool.stats().opened == 1


def test_a_streamed_response_reads_by_the_connection_and_gives_it_back_at_its_end(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)
    seen = []

    @app.get("/")
    def export(conn: Annotated[Connection, Depends(db)]) -> StreamingResponse:
        def lines() -> Iterator[str]:
            for number in range(100):
                seen.append(db.pool.stats().in_use)
                yield f"{conn.execute('SELECT ?', (number,)).fetchone()[0]}\n"

        return StreamingResponse(lines())

    with serving(app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/")
        assert connection.getresponse().read().split() == [b"%d" % number for number in range(100)]
        connection.close()
        eventually(lambda: db.pool.stats().in_use == 0)
        assert db.pool.stats().discarded == 0
    assert seen == [1] * 100


def test_a_client_that_goes_away_in_the_middle_of_a_stream_costs_no_connection(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=PATIENCE))
    app = FastAPI(lifespan=db.lifespan)

    @app.get("/endless")
    def endless(conn: Annotated[Connection, Depends(db)]) -> StreamingResponse:
        def lines() -> Iterator[bytes]:
            while True:
                yield conn.execute("SELECT zeroblob(10000)").fetchone()[0]

        return StreamingResponse(lines())

    @app.get("/")
    def one(conn: Annotated[Connection, Depends(db)]) -> int:
        return int(conn.execute("SELECT 1").fetchone()[0])

    with serving(app) as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(1000)
            assert ask(port, "/") == (200, 1)
        assert db.pool.stats().opened == 1


def test_a_background_task_still_has_the_connection(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, wrap=Visits, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)

    @app.post("/")
    def later(visits: Annotated[Visits, Depends(db)], tasks: BackgroundTasks) -> None:
        tasks.add_task(visits.add, "/later")

    @app.get("/")
    def count(visits: Annotated[Visits, Depends(db)]) -> int:
        return visits.count()

    with TestClient(app) as client:
        assert client.post("/").status_code == 200
        assert client.get("/").json() == 1


def test_with_function_scope_the_connection_is_back_before_the_response_is_sent(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)

    @app.get("/")
    def index(conn: Annotated[Connection, Depends(db, scope="function")], tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: seen.append(db.pool.stats().in_use))

    seen: list[int] = []
    with TestClient(app) as client:
        client.get("/")
    assert seen == [0]


def test_what_a_failed_request_did_not_commit_is_rolled_back_without_a_word(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)

    @app.post("/{how}")
    def fail(how: str, conn: Annotated[Connection, Depends(db)]) -> None:
        conn.execute("INSERT INTO visit (page) VALUES ('/')")
        raise HTTPException(409) if how == "refuse" else LookupError(how)

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/refuse").status_code == 409
        assert client.post("/break").status_code == 500
        with db.pool.connection() as conn:
            assert conn.execute("SELECT count(*) FROM visit").fetchone() == (0,)


def test_what_was_not_committed_is_rolled_back_with_a_warning(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)

    @app.post("/")
    def forget(conn: Annotated[Connection, Depends(db)]) -> None:
        conn.execute("INSERT INTO visit (page) VALUES ('/')")

    with TestClient(app) as client:
        with pytest.warns(RuntimeWarning, match=r"rolled back a transaction .* in .*forget: commit before"):
            client.post("/")
        with db.pool.connection() as conn:
            assert conn.execute("SELECT count(*) FROM visit").fetchone() == (0,)


def test_a_request_that_waits_in_vain_is_told_which_endpoint_has_the_connection(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0.05))
    app = FastAPI(lifespan=db.lifespan)
    entered, go = threading.Event(), threading.Event()

    @app.get("/slow")
    def slow(conn: Annotated[Connection, Depends(db)]) -> None:
        entered.set()
        assert go.wait(PATIENCE)

    @app.exception_handler(PoolTimeout)
    def busy(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(str(error), 503)

    with TestClient(app) as client:
        holder = start(client.get, "/slow")
        assert entered.wait(PATIENCE)
        answer = client.get("/slow")
        go.set()
        assert holder.result(PATIENCE).status_code == 200
        assert client.get("/slow").status_code == 200
    assert answer.status_code == 503
    assert "locals>.slow" in answer.text


def test_a_websocket_has_a_connection_as_long_as_it_is_open(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=0))
    app = FastAPI(lifespan=db.lifespan)

    @app.websocket("/")
    async def echo(socket: WebSocket, conn: Annotated[Connection, Depends(db)]) -> None:
        await socket.accept()
        await socket.send_text(conn.execute("SELECT 'hello'").fetchone()[0])
        await socket.receive_text()

    with TestClient(app) as client:
        with client.websocket_connect("/") as session:
            assert session.receive_text() == "hello"
            assert db.pool.stats().in_use == 1
            session.send_text("bye")
        eventually(lambda: db.pool.stats().in_use == 0)


def test_a_database_lends_a_connection_that_reads_and_its_pool_writes(path: Path) -> None:
    db = PoolDependency(lambda: Database(path, readers=1))
    app = FastAPI(lifespan=db.lifespan)

    @app.post("/")
    def visit(conn: Annotated[Connection, Depends(db)]) -> int:
        db.pool.execute_write("INSERT INTO visit (page) VALUES ('/')")
        return int(conn.execute("SELECT count(*) FROM visit").fetchone()[0])

    with TestClient(app) as client:
        assert [client.post("/").json() for _ in range(3)] == [1, 2, 3]


def test_any_pool_of_objects_will_do() -> None:
    db = PoolDependency(lambda: Pool(lambda: ["an item"]))
    app = FastAPI(lifespan=db.lifespan)

    @app.get("/")
    def index(item: Annotated[list[str], Depends(db)]) -> str:
        return item[0]

    with TestClient(app) as client:
        assert client.get("/").json() == "an item"


def test_the_pool_opens_with_the_application_and_closes_with_it_each_time(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path))
    app = FastAPI(lifespan=db.lifespan)

    @app.get("/")
    def index(conn: Annotated[Connection, Depends(db)]) -> None: ...

    with pytest.raises(RuntimeError, match="lifespan"):
        _ = db.pool
    with pytest.raises(RuntimeError, match="lifespan"):
        TestClient(app).get("/")
    for _ in range(2):
        with TestClient(app) as client:
            client.get("/")
            pool = db.pool
            with pytest.raises(RuntimeError, match="of its own"), TestClient(app):
                pass  # a second application that runs at the same time
            assert client.get("/").status_code == 200
        with pytest.raises(PoolClosed):
            pool.acquire()
        assert not path.with_name("app.db-wal").exists()


def test_it_goes_into_a_lifespan_of_your_own(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        async with db.lifespan(app):
            yield {"greeting": "hello"}

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    def index(request: Request, conn: Annotated[Connection, Depends(db)]) -> str:
        return str(conn.execute("SELECT ?", (request.state.greeting,)).fetchone()[0])

    with TestClient(app) as client:
        assert client.get("/").json() == "hello"


def test_what_cannot_be_opened_keeps_the_application_from_starting(tmp_path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(tmp_path / "missing" / "app.db"))
    with pytest.raises(FileNotFoundError), TestClient(FastAPI(lifespan=db.lifespan)):
        pass
    with pytest.raises(TypeError, match="callable"):
        PoolDependency(ConnectionPool(tmp_path / "app.db"))  # type: ignore[call-overload]


def test_it_follows_the_size_of_the_pool(path: Path) -> None:
    db = PoolDependency(lambda: ConnectionPool(path, max_size=1, timeout=PATIENCE))
    app = FastAPI(lifespan=db.lifespan)
    together = threading.Barrier(3)

    @app.get("/")
    def meet(conn: Annotated[Connection, Depends(db)]) -> None:
        together.wait(PATIENCE)

    @app.get("/one")
    def one(conn: Annotated[Connection, Depends(db)]) -> None: ...

    with serving(app) as port:
        assert ask(port, "/one") == (200, None)
        db.pool.resize(3)
        assert [future.result(PATIENCE)[0] for future in [start(ask, port, "/") for _ in range(3)]] == [200] * 3


def test_starlette_alone_needs_nothing_but_the_pool(path: Path) -> None:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        with ConnectionPool(path, wrap=Visits, max_size=2) as pool:
            yield {"pool": pool}

    def visit(request: Request) -> PlainTextResponse:
        with request.state.pool.connection() as visits:
            visits.add(request.url.path)
            return PlainTextResponse(str(visits.count()))

    app = Starlette(routes=[Route("/", visit)], lifespan=lifespan)
    with serving(app) as port, ThreadPoolExecutor(60) as clients:
        answers = list(clients.map(lambda _: ask(port, "/"), range(300)))
    assert {status for status, _ in answers} == {200}
    assert max(count for _, count in answers) == 300
