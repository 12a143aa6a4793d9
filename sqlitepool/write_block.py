"""`with db.write() as conn`: a transaction of its own, or a savepoint in the one around it.

A block is part of another one only where that one provably encloses it: see `Writer.enclosing`. "It runs on the same
thread" proves nothing: a suspended generator or coroutine leaves its block open while the thread serves somebody else,
whose work must not be committed, or rolled back, with it.
"""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from sqlitepool import fork
from sqlitepool.fork import same_process
from sqlitepool.tracking import Connection
from sqlitepool.transaction import Transaction
from sqlitepool.writer import Place, Writer


class WriteBlock:
    """One write block. Made by `Database.write`; to be entered once at a time."""

    __slots__ = ("_place", "_timeout", "_transaction", "_writer")

    def __init__(self, writer: Writer, timeout: float | None) -> None:
        self._writer = writer
        self._timeout = timeout
        self._transaction: Transaction | None = None
        self._place: Place | None = None

    def __enter__(self) -> Connection:
        if self._transaction is not None:
            raise RuntimeError("this write block is in use: call db.write() once for each with block")
        since = monotonic()
        frame = sys._getframe(1)
        place = Place(frame)
        try:
            outer = self._writer.enclosing(frame)
            if outer is None:
                self._transaction = transaction = Transaction(self._writer)
                self._place = place
                return transaction.begin(self._timeout, since, frame, place)
            outer.save(place)
            self._transaction = outer
            self._place = place
            conn = outer.conn
            assert conn is not None  # `save` has looked
            return conn
        except BaseException:
            self._transaction = self._place = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        transaction, place = self._transaction, self._place
        try:
            if transaction is None or place is None:
                return
            if not transaction.blocks or transaction.blocks[0] is place:
                self._end(transaction, kind is None)
            else:
                _end_inner(transaction, place, kind is None)
        finally:
            self._transaction = self._place = None

    def _end(self, transaction: Transaction, commit: bool) -> None:
        """End the outermost block, and with it the transaction."""
        try:
            if commit and transaction.blocks:
                if len(transaction.blocks) > 1:
                    raise RuntimeError(
                        f"the write block that began at {transaction.blocks[0]} ends before the one inside of it that "
                        f"began at {transaction.blocks[-1]}: all is rolled back"
                    )
                transaction.commit()
        except Exception:
            raise
        except BaseException as interruption:
            if transaction.was_committed(interruption):
                interruption.add_note("sqlitepool: the write block that was interrupted here has been committed")
            raise
        finally:
            transaction.end()


def _end_inner(transaction: Transaction, place: Place, keep: bool) -> None:
    """End a block that is a savepoint."""
    if not same_process[0]:
        fork.start_anew()
    if transaction.conn is None:
        return  # the outermost block has ended before, which was its error
    if transaction.blocks[-1] is not place:
        transaction.break_up()
        raise RuntimeError(
            f"the write block that began at {place} ends before the one that began at {transaction.blocks[-1]} inside "
            "of it: the whole transaction is rolled back"
        )
    try:
        if keep:
            transaction.release()
        else:
            transaction.undo()
    finally:
        transaction.blocks.pop()
