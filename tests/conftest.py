"""Fixtures that several files of tests use."""

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, Open

from sqlitepool.cleaning import retire
from sqlitepool.connection import Connection, normalise_path, open_connection


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """Shells have jobs in the background ignore SIGINT, and the servers that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group commit takes all that is queued, even if the machine stands still for longer than a batch may last."""
    monkeypatch.setattr("sqlitepool.group_commit._LONGEST_BATCH", PATIENCE)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens connections to one file of a table `t` with three rows, and retires them at the end."""
    connections = []

    def connect(setup: Callable[[sqlite3.Connection], object] | None = None, **options: Any) -> Connection:
        target = normalise_path(tmp_path / "app.db", read_only=False)
        conn = open_connection(
            target.database,
            uri=target.uri,
            read_only=False,
            pragmas={"busy_timeout": 0},
            setup=setup,
            deadline=time.monotonic() + 5,
            connect_options=options,
        )
        connections.append(conn)
        return conn

    first = connect()
    first.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
    first.execute("INSERT INTO t VALUES (1, zeroblob(4)), (2, zeroblob(4)), (3, zeroblob(4))")
    first.commit()
    yield connect
    for conn in connections:
        retire(conn)
