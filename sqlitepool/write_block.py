"""`with db.write() as conn`: a transaction of its own, or a savepoint in the one around it.

A block is part of another one only where that one provably encloses it: see `Writer.enclosing`. "It runs on the same
thread" proves nothing: a suspended generator or coroutine leaves its block open while the thread serves somebody else,
whose work must not be committed, or rolled back, with it.
"""

from __future__ import annotations

import sqlite3
import sys
from time import monotonic
from types import FrameType, TracebackType

from sqlitepool import fork
from sqlitepool.claimants import CONTEXTLIB, Claimants, caller
from sqlitepool.database_file import name_file
from sqlitepool.fork import same_process
from sqlitepool.tracking import Connection
from sqlitepool.transaction import Transaction
from sqlitepool.writer import Place, Writer

_frame = sys._getframe


class WriteBlock(Transaction):
    """One write block: a transaction, if none encloses it. Made by `Database.write`; to be entered once at a time."""

    __slots__ = ("_claimants", "_is_entered", "_outer", "_place")

    _place: Place

    def __init__(self, writer: Writer, timeout: float | None, claimants: Claimants) -> None:
        self._claimants = claimants
        self._outer: Transaction | None = None
        self._is_entered = False
        # what `Transaction.__init__` does, without the call
        self._writer = writer
        self._timeout = timeout
        self._token = self.conn = None
        self._is_committing = self.is_committed = self.is_certain = False
        self.frame = 0
        self.inner = ()

    def __enter__(self) -> Connection:  # type: ignore[override]  # a turn is not a transaction to its users
        if self._is_entered:
            raise RuntimeError("this write block is in use: call db.write() once for each with block")
        frame = _frame(1)
        if frame.f_code.co_filename == CONTEXTLIB:
            frame = caller(frame)
        try:
            self._is_entered = True
            if not self._writer.gate._free:  # somebody is writing: the block around this one?
                outer = self._writer.enclosing(frame)
                if outer is not None:
                    return self._join(outer, frame)
                if len(self._claimants.known) > 1:
                    self._claimants.refuse_to_wait(frame, self._writer)
            self.is_committed = self._is_committing = False
            return self.try_to_begin(frame, monotonic()) or self.begin(frame)
        except BaseException:
            self._outer = None
            self._is_entered = False
            raise

    def refusal(self) -> Exception | None:
        """Make the error for a block that comes when the database is being closed."""
        return self._writer.refusal(is_queued=False)

    def _join(self, outer: Transaction, frame: FrameType) -> Connection:
        """Begin as a savepoint in `outer`."""
        self._place = place = Place(frame)
        self._outer = outer
        outer.save(place)
        conn = outer.conn
        assert conn is not None  # `save` has looked
        return conn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                if isinstance(error, sqlite3.Error):
                    self._name_file(error, "in the")
                if error is not None and self._outer is None and self.is_lost:
                    self.note_loss(error)
            if self._outer is not None:
                self._end_inner(self._outer, kind is None)
            elif kind is None and self.frame:
                if self.inner:
                    raise RuntimeError(
                        f"the write block that began at {self.where} ends before the one inside of it that began at "
                        f"{self.inner[-1].where}: all is rolled back"
                    )
                self.commit()
        except Exception as failure:
            if isinstance(failure, sqlite3.Error):
                self._name_file(failure, "at the end of the")
            raise
        except BaseException as interruption:
            if self.was_committed(interruption):
                interruption.add_note("sqlitepool: the write block that was interrupted here has been committed")
            raise
        finally:
            try:
                self.end()
            finally:
                self._outer = None
                self._is_entered = False

    def _name_file(self, error: sqlite3.Error, step: str) -> None:
        where = self.where if self._outer is None else self._place.where
        name_file(error, self._writer.gate.database, f"{step} write block that began at {where}")

    def _end_inner(self, outer: Transaction, keep: bool) -> None:
        """End a block that is a savepoint."""
        if not same_process[0]:
            fork.start_anew()
        place = self._place
        if place not in outer.inner:
            return  # the outermost block has ended before, which was its error
        if outer.inner[-1] is not place:
            outer.break_up()
            raise RuntimeError(
                f"the write block that began at {place.where} ends before the one that began at "
                f"{outer.inner[-1].where} inside of it: the whole transaction is rolled back"
            )
        try:
            if keep:
                outer.release()
            else:
                outer.undo()
        finally:
            outer.inner = outer.inner[:-1]
