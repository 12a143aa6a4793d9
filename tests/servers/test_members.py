"""The example by itself, called as a server calls it: what it answers, and when it closes the database."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from serving import EXAMPLE

Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv("MEMBERS_DATABASE", str(tmp_path / "members.db"))
    return importlib.import_module("members")


@pytest.fixture
def application(members: ModuleType) -> Iterator[Any]:
    made = members.Members()
    yield made
    if made._store is not None:
        made._store.close()


@pytest.fixture
def ask(application: Any) -> Ask:
    def ask(method: str, path: str, form: str = "", token: str = "") -> tuple[int, Any]:
        begun: list[str] = []
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "CONTENT_LENGTH": str(len(form)),
            "wsgi.input": io.BytesIO(form.encode()),
            "HTTP_AUTHORIZATION": f"Bearer {token}",
        }
        body = b"".join(application(environ, lambda status, headers: begun.append(status)))
        return int(begun[0].split()[0]), json.loads(body)

    return ask


def test_a_member_joins_logs_in_and_is_counted(ask: Ask) -> None:
    assert ask("POST", "/members", "name=ada&password=secret") == (201, {"name": "ada"})
    status, answer = ask("POST", "/login", "name=ada&password=secret")
    assert status == 200
    assert ask("POST", "/visits", token=answer["token"]) == (200, {"name": "ada", "visits": 1})
    assert ask("POST", "/visits", token=answer["token"]) == (200, {"name": "ada", "visits": 2})
    assert ask("GET", "/members/ada") == (200, {"name": "ada", "visits": 2})
    assert ask("GET", "/") == (200, {"most_frequent": {"ada": 2}})
    assert ask("GET", "/status")[1]["writing"]["commits"] >= 4


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (400, ("POST", "/members", "name=ada")),
        (400, ("POST", "/members", "name=a/b&password=secret")),
        (400, ("POST", "/members", "name=ada&password=" + 10_000 * "x")),
        (401, ("POST", "/visits", "", "somebody else's")),
        (401, ("POST", "/visits", "", "")),
        (403, ("POST", "/login", "name=ada&password=wrong")),
        (403, ("POST", "/login", "name=nobody&password=secret")),
        (404, ("GET", "/members/nobody")),
        (404, ("DELETE", "/members/ada")),
        (409, ("POST", "/members", "name=ada&password=other")),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(ask: Ask, status: int, request_: tuple[str, ...]) -> None:
    ask("POST", "/members", "name=ada&password=secret")
    refused, answer = ask(*request_)
    assert refused == status
    assert answer["error"]


def test_nothing_is_open_before_the_first_request(application: Any, tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
