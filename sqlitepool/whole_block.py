"""The block of `ConnectionPool.transaction`: one explicit transaction."""

from __future__ import annotations

import sqlite3
import sys
from types import EllipsisType, TracebackType
from typing import TypeVar

from sqlitepool.lease import Lease, caller, note_place
from sqlitepool.pool import Pool
from sqlitepool.tracking import WHOLE, Connection

T = TypeVar("T")

_setattr = object.__setattr__  # that of `Connection` takes notes


class WholeBlock(Lease[T]):
    """A lease whose block is one explicit transaction."""

    __slots__ = ("_mode",)

    def __init__(self, pool: Pool[T], timeout: float | EllipsisType | None, mode: str) -> None:
        super().__init__(pool, timeout)
        self._mode = mode

    def __enter__(self) -> T:
        item = super().__enter__()
        frame = sys._getframe(1)
        slot = self._slot
        try:
            assert slot is not None
            frame = caller(frame)
            note_place(slot, frame)
            slot.frame = id(frame)
            conn: Connection = slot.base
            if conn.baseline.rests_in_transaction:  # autocommit=False has begun one, which is still empty
                conn.execute("ROLLBACK")
            conn.touched.add(WHOLE)
            level = conn.isolation_level
            if level is not None and not conn.baseline.rests_in_transaction:
                conn.before.setdefault("isolation_level", level)
                _setattr(conn, "isolation_level", None)  # so that sqlite3 begins no other when this one has ended
            conn.execute(f"BEGIN {self._mode.upper()}")
            return item
        except BaseException:
            slot = None
            self.__exit__(*sys.exc_info())
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        slot = self._slot
        ended = kind is None and slot is not None and self._loan in slot.loan and _has_ended(slot.base)
        slot = None
        super().__exit__(kind, error, traceback)
        if ended:
            raise sqlite3.ProgrammingError(
                "the transaction of this block ended before the block: by SQL, or SQLite has rolled it back (OR "
                "ROLLBACK, a full disk or the like). What came after it was committed one by one"
            )


def _has_ended(conn: Connection) -> bool:
    """Tell whether the transaction of a `transaction()` block has ended by something else than the methods for it."""
    if "closed" in conn.touched or WHOLE not in conn.touched:
        return False  # of the first the return tells
    if not conn.in_transaction:
        return True
    conn.end_whole()
    return False
