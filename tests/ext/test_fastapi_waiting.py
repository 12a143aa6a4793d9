"""FastAPI: requests that wait for a connection are counted, and errors tell how long they waited."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from pool_support import PATIENCE, eventually, start

pytest.importorskip("fastapi", reason="FastAPI is not installed")
pytest.importorskip("httpx2", reason="httpx2, which the test client needs, is not installed")

from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from sqlitepool import Pool, PoolError
from sqlitepool.ext.fastapi import PoolDependency


class Application:
    """One item, which the request that has it keeps until `go`."""

    def __init__(self, **options: Any) -> None:
        self.db = PoolDependency(lambda: Pool(list[int], max_size=1, **options))
        self.app = FastAPI(lifespan=self.db.lifespan)
        self.go = threading.Event()

        @self.app.get("/")
        def hold(item: Annotated[object, Depends(self.db)]) -> bool:
            return self.go.wait(PATIENCE)

        @self.app.exception_handler(PoolError)
        def tell(request: Request, error: Exception) -> PlainTextResponse:
            return PlainTextResponse(f"{type(error).__name__}: {error}", 503)

    @contextmanager
    def held(self) -> Iterator[TestClient]:
        """Serve, while one request has the item."""
        with TestClient(self.app) as client:
            holder = start(client.get, "/")
            eventually(lambda: self.db.pool.stats().in_use == 1)
            try:
                yield client
            finally:
                self.go.set()
                holder.result(PATIENCE)


def test_requests_that_wait_are_counted() -> None:
    served = Application(timeout=PATIENCE)
    with served.held() as client:
        assert served.db.waiting == 0
        waiters = [start(client.get, "/") for _ in range(3)]
        eventually(lambda: served.db.waiting == 3)
        served.go.set()
        assert {waiter.result(PATIENCE).status_code for waiter in waiters} == {200}
        assert served.db.waiting == 0
        stats = served.db.pool.stats()
        assert (stats.checkouts, stats.wait_seconds.count, stats.timeouts) == (4, 3, 0)
        assert stats.wait_seconds.max > 0


def test_a_request_that_waited_in_vain_is_told_for_how_long() -> None:
    served = Application(timeout=0.3)
    with served.held() as client:
        told = client.get("/")
        assert served.db.pool.stats().timeouts == 1
    assert told.status_code == 503
    waited = re.search(r"PoolTimeout: .* nothing came free in (\d+\.\d+) s\. Held longest by: .*hold", told.text)
    assert waited, told.text
    assert float(waited[1]) >= 0.3


def test_a_request_that_had_its_turn_and_then_waited_for_a_thread_is_told_both() -> None:
    served = Application(timeout=2.0, fairness=0)  # 0: strictly in order
    with served.held() as client:
        waiter = start(client.get, "/")
        eventually(lambda: served.db.waiting == 1)
        item_of_a_thread = start(served.db.pool.acquire, PATIENCE)  # no request, so it waits in the pool's own line
        eventually(lambda: served.db.pool.stats().waiting == 1)
        served.go.set()
        told = waiter.result(PATIENCE)
        served.db.pool.release(item_of_a_thread.result(PATIENCE))
    assert told.status_code == 503
    assert re.search(r"PoolTimeout: .*Before that, the request had waited [01]\.\d+ s for others", told.text), told.text


def test_max_waiting_holds_for_requests() -> None:
    served = Application(timeout=PATIENCE, max_waiting=1)
    with served.held() as client:
        waiter = start(client.get, "/")
        eventually(lambda: served.db.waiting == 1)
        told = client.get("/")
        assert told.status_code == 503
        assert "PoolFull" in told.text
        served.go.set()
        assert waiter.result(PATIENCE).status_code == 200


def test_a_timeout_of_zero_tries_once() -> None:
    served = Application(timeout=0, max_waiting=0)
    with served.held() as client:
        assert client.get("/").text.startswith("PoolTimeout")
        served.go.set()
        eventually(lambda: served.db.pool.stats().in_use == 0)
        eventually(lambda: client.get("/").status_code == 200)


def test_the_dependency_says_what_it_is() -> None:
    db = PoolDependency(lambda: Pool(list, name="ours"))
    assert repr(db) == "<PoolDependency, not open>"
    with pytest.raises(RuntimeError, match="not open"):
        _ = db.waiting
    with TestClient(FastAPI(lifespan=db.lifespan)):
        assert "open: <Pool 'ours'" in repr(db)
