"""The example of a Flask application: what it shows, and that it holds under load."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("flask", reason="Flask is not installed")

from flask import Flask

EXAMPLE = Path(__file__).parents[2] / "examples" / "flask_guestbook" / "guestbook.py"


@pytest.fixture(scope="module")
def guestbook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guestbook", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def app(guestbook: ModuleType, tmp_path: Path) -> Iterator[Flask]:
    app: Flask = guestbook.create_app(
        {"TESTING": True, "SQLITEPOOL_DATABASE": tmp_path / "guests.db", "SQLITEPOOL_OPTIONS": {"max_size": 2}}
    )
    yield app
    with app.app_context():
        assert guestbook.db.pool.close() == []
    assert [file.name for file in tmp_path.iterdir()] == ["guests.db"]


def test_it_shows_what_guests_wrote(app: Flask) -> None:
    client = app.test_client()
    assert "Nobody has signed yet." in client.get("/").text
    answer = client.post("/", data={"guest": "Ann", "text": "<i>lovely</i>"}, follow_redirects=True)
    assert "<b>Ann</b> &lt;i&gt;lovely&lt;/i&gt;" in answer.text
    assert client.post("/", data={"guest": " ", "text": "x"}).status_code == 400
    with client.get("/entries.txt") as export:
        assert export.text == "Ann: <i>lovely</i>\n"


def test_a_crowd_of_guests_may_sign_at_once(guestbook: ModuleType, app: Flask) -> None:
    def sign(number: int) -> int:
        return app.test_client().post("/", data={"guest": f"guest {number}", "text": "was here"}).status_code

    with ThreadPoolExecutor(16) as guests:
        assert set(guests.map(sign, range(100))) == {303}
    with app.test_client().get("/entries.txt") as export:
        assert sorted(export.text.splitlines()) == sorted(f"guest {number}: was here" for number in range(100))
    with app.app_context():
        assert guestbook.db.pool.stats().opened <= 2


def test_a_guest_who_cannot_be_served_is_told_to_come_again(guestbook: ModuleType, app: Flask) -> None:
    app.config["SQLITEPOOL_OPTIONS"] = {"max_size": 1, "timeout": 0}
    with app.app_context():
        _ = guestbook.db.connection
        pool = guestbook.db.pool
    with pool.connection():
        answer = app.test_client().get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
