"""Single statements that write, as functions for a group commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Parameters: TypeAlias = Sequence[Any] | Mapping[str, Any]


class WriteResult(NamedTuple):
    """What `execute_write` did.

    Attributes:
        rows: what `RETURNING` returned.
        rowcount: how many rows were changed, -1 if it was no INSERT, UPDATE, DELETE or REPLACE.
        lastrowid: the rowid of the last INSERT; see `sqlite3.Cursor.lastrowid`.
    """

    rows: list[Any]
    rowcount: int
    lastrowid: int | None


def execute_write(conn: sqlite3.Connection, sql: str, parameters: Parameters) -> WriteResult:
    """Run one statement; it does all it does, or nothing."""
    cursor = conn.execute(sql, parameters)
    rows = cursor.fetchall() if cursor.description is not None else []
    return WriteResult(rows, cursor.rowcount, cursor.lastrowid)


def executemany_write(conn: sqlite3.Connection, sql: str, rows: list[Parameters]) -> int:
    """Run one statement for each of `rows`; return how many rows were changed."""
    return conn.executemany(sql, rows).rowcount
