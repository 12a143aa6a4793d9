"""What is printed tells what it is, without asking SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from sqlitepool import Connection, ConnectionPool, Database, ForeignItem


def test_a_connection_names_its_file_even_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    with ConnectionPool(path) as pool:
        conn = pool.acquire()
        assert repr(conn) == f"<Connection to '{path}'>"
        pool.release(conn)
        with pytest.raises(ForeignItem, match=r"<Connection to '.*app\.db'>"):
            pool.release(conn)
    assert repr(conn) == f"<Connection to '{path}'>"
    with contextlib.closing(sqlite3.connect(":memory:", factory=Connection)) as bare:
        assert repr(bare) == "<Connection, not set up>"


def test_the_connections_of_a_database_tell_what_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    with Database(path) as db:
        with db.read() as reading, db.write() as writing:
            assert repr(reading) == f"<ReadingConnection to '{path}'>"
            assert repr(writing) == f"<WritingConnection to '{path}'>"
        block = db.isolated()
        assert repr(block) == "<IsolatedBlock of 'app.db', not open>"
        with block as conn:
            assert str(path) in repr(conn)
            assert repr(block) == "<IsolatedBlock of 'app.db', open>"
