"""A connection in a forked child that was open in its parent: the child can do nothing with it.

What it did would go into the parent's transaction, with locks that the child does not have. So there it becomes an
object of another class, which refuses; in the parent nothing changes, and no call pays for it. Cursors that were open
at the fork are of sqlite3 itself, which does not refuse.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Never

from sqlitepool import fork
from sqlitepool.cleaning import open_handles
from sqlitepool.tracking import Connection

_REACH_THE_FILE = (
    "__call__", "__enter__", "__exit__", "backup", "blobopen", "commit", "cursor", "deserialize", "execute",
    "executemany", "executescript", "rollback", "serialize",
)  # fmt: skip


class InheritedConnection(Connection):
    """A connection of the parent. See `disown`."""

    __slots__ = ()

    @property
    def in_transaction(self) -> bool:
        """No transaction of this process is open on it."""
        return False


def _refuse(self: InheritedConnection, /, *args: Any, **kwargs: Any) -> Never:
    raise sqlite3.ProgrammingError(
        "this connection is of the process that forked this one, and only that may use it: take another one from the "
        "pool or the Database"
    )


for _name in _REACH_THE_FILE:
    setattr(InheritedConnection, _name, _refuse)


def disown(conn: Connection) -> None:
    """In a forked child: neither use nor finalize `conn`, and have nobody else do so."""
    for thing in (conn, *open_handles(conn)):
        fork.keep_forever(thing)
    object.__setattr__(conn, "__class__", InheritedConnection)
