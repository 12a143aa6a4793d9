"""A guest book: a whole Flask application on a pool, in one file.

    pip install 'sqlitepool[flask]'
    flask --app guestbook run --debug

Its tests are in tests/ext/test_flask_guestbook.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from flask import Blueprint, Flask, Response, abort, redirect, render_template_string, request, stream_with_context
from flask.typing import ResponseReturnValue

from sqlitepool import PoolTimeout
from sqlitepool.ext.flask import SQLitePool

PAGE = """<!doctype html>
<title>Guest book</title>
<h1>Guest book</h1>
<form method="post"><input name="guest" required> <input name="text" required> <button>Sign</button></form>
{% for guest, text in entries %}<p><b>{{ guest }}</b> {{ text }}</p>
{% else %}<p>Nobody has signed yet.</p>
{% endfor %}<p><a href="{{ url_for('guestbook.export') }}">All entries as text</a></p>
"""


def prepare(conn: sqlite3.Connection) -> None:
    """Called with each new connection."""
    conn.execute("CREATE TABLE IF NOT EXISTS entry (id INTEGER PRIMARY KEY, guest TEXT NOT NULL, text TEXT NOT NULL)")


class GuestBook:
    """The queries of the application, around one connection."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn

    def sign(self, guest: str, text: str) -> None:
        with self._conn:  # committed at the end of the block, so before the answer is sent
            self._conn.execute("INSERT INTO entry (guest, text) VALUES (?, ?)", (guest, text))

    def latest(self, count: int) -> list[tuple[str, str]]:
        return self._conn.execute("SELECT guest, text FROM entry ORDER BY id DESC LIMIT ?", (count,)).fetchall()

    def all(self) -> Iterator[tuple[str, str]]:
        return self._conn.execute("SELECT guest, text FROM entry ORDER BY id")


db = SQLitePool(wrap=GuestBook, setup=prepare)
pages = Blueprint("guestbook", __name__)


@pages.get("/")
def index() -> str:
    return render_template_string(PAGE, entries=db.connection.latest(20))


@pages.post("/")
def sign() -> ResponseReturnValue:
    guest, text = request.form["guest"].strip(), request.form["text"].strip()
    if not guest or not text:
        abort(400, "a name and a text, please")
    db.connection.sign(guest, text)
    return redirect("/", 303)


@pages.get("/entries.txt")
def export() -> Response:
    """However many entries there are, they are sent while they are read."""

    def lines() -> Iterator[str]:
        for guest, text in db.connection.all():
            yield f"{guest}: {text}\n"

    return Response(stream_with_context(lines()), mimetype="text/plain")


@pages.app_errorhandler(PoolTimeout)
def busy(error: PoolTimeout) -> ResponseReturnValue:
    return "Too many guests at once. Please try again.\n", 503, {"Retry-After": "5"}


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    app = Flask(__name__)
    app.config["SQLITEPOOL_DATABASE"] = "guestbook.db"  # in the instance folder
    app.config.from_prefixed_env()  # FLASK_SQLITEPOOL_DATABASE=/var/lib/guestbook.db
    app.config.from_mapping(config or {})
    app.register_blueprint(pages)
    db.init_app(app)
    return app
