"""The connection that `Database` reads with: it only reads, and its transaction belongs to the block that has it.

All statements of a read block see one snapshot, so what would end it is refused, as in a write block: `commit()` and
the like, and the SQL for them. `executescript`, which commits first, runs its statements one by one.

The file is opened read-only. That leaves other files, which a statement can reach only by ATTACH (VACUUM INTO does so
inside): a connection that is set up attaches no more. Where `setup` has attached some, `query_only` guards them too.

The check of SQL costs nothing for a text that was seen before: see `tracking.py`, item 3. A text that was refused is
never remembered.
"""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from sqlitepool.tracking import NO_BASELINE, Baseline, Connection, split_script

#: The statements of `read_block.py` and `cleaning.py` themselves. Only these texts are let through.
BEGIN = "BEGIN -- sqlitepool"
ROLLBACK = "ROLLBACK -- sqlitepool"
_OURS = (BEGIN, ROLLBACK, "COMMIT -- sqlitepool")

_GAP = r"(?:[ \t\n\f\r;]|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*+"
_FLAGS = re.ASCII | re.DOTALL | re.IGNORECASE
_is_ours_to_say = re.compile(
    rf"{_GAP}(?:BEGIN|COMMIT|END|ROLLBACK(?!{_GAP}(?:TRANSACTION\b{_GAP})?TO\b))\b", _FLAGS
).match
# What SQLite would refuse with an error that leads astray ("disk I/O error"), or what opens a way to write.
_writes_elsewhere = re.compile(
    rf"{_GAP}(?:ATTACH\b|VACUUM\b|PRAGMA\b{_GAP}(?:[\"'`\[]?\w+[\"'`\]]?{_GAP}\.{_GAP})?[\"'`\[]?"
    rf"(?:wal_checkpoint\b|(?:journal_mode|query_only)\b[\"'`\]]?{_GAP}[=(]))",
    _FLAGS,
).match


def refusal(what: str) -> sqlite3.ProgrammingError:
    """Make the error for an attempt to begin or end the transaction of a block."""
    return sqlite3.ProgrammingError(
        f"{what} on a connection of Database that reads: the snapshot begins and ends with the block of `db.read()`. "
        "Leave the block and enter another one to see what was written meanwhile"
    )


class ReadingConnection(Connection):
    """A connection that only reads, of a `ReaderPool`."""

    __slots__ = ()

    def __call__(self, sql: str, /) -> Any:
        """Prepare `sql`, unless it would end the snapshot or write to another file."""
        if self.baseline is not NO_BASELINE:
            if _is_ours_to_say(sql) is not None and sql not in _OURS:
                raise refusal(sql.split()[0].upper() if sql[:1].isalpha() else sql)
            if _writes_elsewhere(sql) is not None:
                raise sqlite3.OperationalError(
                    f"this connection only reads, and {sql.strip()!r} may write: use db.isolated(), or db.checkpoint() "
                    "for the write-ahead log"
                )
        return super().__call__(sql)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("autocommit", "isolation_level") and self.in_transaction and self.baseline is not NO_BASELINE:
            raise refusal(f"setting {name}")
        super().__setattr__(name, value)

    def _run_script(self, cursor: sqlite3.Cursor, script: str) -> None:
        if self.baseline is NO_BASELINE:
            super()._run_script(cursor, script)
            return
        self._note_script(script)
        for statement in split_script(script):
            cursor.execute(statement)

    def commit(self) -> None:
        """Refused in a read block, which it would rob of its snapshot."""
        self._refuse("commit()")
        super().commit()

    def rollback(self) -> None:
        """Refused in a read block, which it would rob of its snapshot."""
        self._refuse("rollback()")
        super().rollback()

    def __enter__(self) -> Any:
        self._refuse("`with conn:`")
        return super().__enter__()

    def close(self) -> None:
        """Do nothing: it is returned when the block ends, and after that it is somebody else's."""
        if self.baseline is NO_BASELINE:
            super().close()

    def mark_clean(self, baseline: Baseline) -> None:
        """Say that the connection is now as `baseline` describes it. For the first time: from now on it only reads."""
        if self.baseline is NO_BASELINE:
            attached = len(baseline.databases) - 1
            if attached:
                self.read("PRAGMA query_only = 1")
            sqlite3.Connection.setlimit(self, sqlite3.SQLITE_LIMIT_ATTACHED, attached)
        super().mark_clean(baseline)

    def _refuse(self, what: str) -> None:
        if self.in_transaction and self.baseline is not NO_BASELINE:
            raise refusal(what)
