"""The pages about WSGI, Flask and FastAPI: what they tell a reader to write runs as it stands there."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: str) -> dict[str, Any]:
    """Run all the code of a page, one block after the other, and give what it defines."""
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, f"no code in {page}"
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def create_table() -> None:
    conn = sqlite3.connect("store.db")
    conn.executescript("PRAGMA journal_mode = wal; CREATE TABLE visit (page TEXT)")
    conn.close()


def test_wsgi() -> None:
    page = run("wsgi.md")

    def ask() -> Iterator[bytes]:
        environ: dict[str, Any] = {"PATH_INFO": "/", "SCRIPT_NAME": "", "QUERY_STRING": ""}
        setup_testing_defaults(environ)
        response = validator(page["application"])(environ, lambda status, headers, exc_info=None: lambda data: data)
        try:
            yield from response
        finally:
            response.close()  # type: ignore[attr-defined]

    assert [list(ask()) for _ in range(2)] == [[b"1 visits\n"], [b"2 visits\n"]]
    assert page["pool"].close() == []


def test_flask(folder: Path) -> None:
    pytest.importorskip("flask", reason="Flask is not installed")
    page = run("flask.md")
    app = page["create_app"]()
    app.instance_path = str(folder)
    client = app.test_client()
    assert [client.post("/here").status_code for _ in range(2)] == [200, 200]
    assert client.get("/here").text == "2"
    with app.app_context():
        assert page["db"].pool.close() == []

    app = page["Flask"]("flaskr", instance_path=str(folder))
    app.config["FLASKR_DATABASE"] = "app.db"
    page["init_app"](app)
    page["store"].init_app(app)
    create_table()
    with app.app_context():
        assert page["get_db"]().execute("SELECT count(*) AS visits FROM visit").fetchone()["visits"] == 2
        page["add"]("/")
        assert page["count"]() == 1
        assert page["pool"].pool.close() != []
        assert page["store"].database.close(0) != []


def test_fastapi() -> None:
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    pytest.importorskip("httpx2", reason="httpx2, which the test client needs, is not installed")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    page = run("fastapi.md")
    with TestClient(page["app"]) as client:
        assert [client.post("/here").status_code for _ in range(2)] == [200, 200]
        assert client.get("/here").json() == 2
    with TestClient(page["starlette_app"]) as client:
        assert client.get("/").text == "2"
    create_table()
    with TestClient(FastAPI(lifespan=page["store"].lifespan)):
        page["add"]("/")
        assert page["store"].pool.execute("SELECT count(*) FROM visit") == [(1,)]
    with TestClient(FastAPI(lifespan=page["lifespan"])):
        assert page["db"].pool.stats().size == 0
