"""Which WSGI responses are complete when the application returns them, and what may be closed at exit."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment
from wsgiref.util import setup_testing_defaults

import pytest

from sqlitepool import Connection, ConnectionPool, Pool, Scope
from sqlitepool.ext.wsgi import ScopeMiddleware, close_at_exit


class Chunks(list[bytes]):
    """As Bottle and others have for responses that know more than their bytes."""


class Pair(tuple[bytes, bytes]):
    """The same, of a tuple."""


class Lazy(list[bytes]):
    """A list in name only: it reads when it is asked."""

    db: Scope[Connection]

    def __iter__(self) -> Iterator[bytes]:
        yield b"%d" % self.db.get().execute("SELECT 1").fetchone()


class Closing(list[bytes]):
    """A list that has the connection to the end."""

    db: Scope[Connection]

    def close(self) -> None:
        self.append(b"%d" % self.db.get().execute("SELECT 1").fetchone())


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Scope[Connection]]:
    with ConnectionPool(tmp_path / "app.db", max_size=1, timeout=0) as pool:
        yield Scope(pool)
        assert pool.leases() == []


def respond_with(db: Scope[Connection], response: Iterable[bytes]) -> Any:
    def application(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        respond("200 OK", [("Content-Type", "text/plain")])
        db.get()
        return response

    environ: dict[str, Any] = {"QUERY_STRING": ""}
    setup_testing_defaults(environ)
    return ScopeMiddleware(application, db)(environ, lambda status, headers, exc_info=None: io.BytesIO().write)


@pytest.mark.parametrize("response", [Chunks([b"a", b"b"]), Pair((b"a", b"b"))])
def test_a_kind_of_list_is_left_as_it_is_and_needs_no_connection(
    db: Scope[Connection], response: Iterable[bytes]
) -> None:
    assert respond_with(db, response) is response
    assert db._pool.stats().in_use == 0


def test_a_list_that_reads_or_closes_by_itself_is_in_its_scope_until_it_is_closed(db: Scope[Connection]) -> None:
    for kind in (Lazy, Closing):
        response = kind()
        response.db = db
        wrapped = respond_with(db, response)
        assert db._pool.stats().in_use == 1
        assert list(wrapped) == ([b"1"] if kind is Lazy else [])
        wrapped.close()
        assert db._pool.stats().in_use == 0
    assert response == [b"1"]


def test_only_what_can_be_closed_is_closed_at_exit(db: Scope[Connection]) -> None:
    for wrong in (db, 5, "app.db", Pool):
        with pytest.raises(TypeError, match="a Pool, a ConnectionPool or a Database, not "):
            close_at_exit(wrong)  # type: ignore[type-var]


def test_the_middleware_says_what_it_is(db: Scope[Connection]) -> None:
    text = repr(ScopeMiddleware(respond_with, db))  # type: ignore[arg-type]
    assert text.startswith("<ScopeMiddleware around <function respond_with")
    assert "<Scope of <ConnectionPool" in text


def test_the_flask_extensions_say_what_they_are() -> None:
    pytest.importorskip("flask", reason="Flask is not installed")
    from sqlitepool.ext.flask import SQLiteDatabase, SQLitePool

    assert repr(SQLitePool(config_prefix="USERS")) == "<SQLitePool configured by USERS_DATABASE>"
    assert repr(SQLiteDatabase()) == "<SQLiteDatabase configured by SQLITEPOOL_DATABASE>"
