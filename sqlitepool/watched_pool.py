"""A pool whose items are open on one file, which may be replaced or deleted underneath.

The file is known by what `os.stat` tells, see `database_file.py`. When another one is found in its place, all
connections to the old one are parted with; new ones are opened when those that are lent have come back, because SQLite
would mix up the journals of both.
"""

from __future__ import annotations

import warnings
from time import monotonic
from typing import TypeVar

from sqlitepool.cleaning import end_block
from sqlitepool.database_file import DatabaseFile, damage
from sqlitepool.errors import FileReplaced
from sqlitepool.lease import Slot
from sqlitepool.limits import NEVER
from sqlitepool.pool import Pool, logger
from sqlitepool.tracking import Connection
from sqlitepool.waiting import locked

T = TypeVar("T")

# A connection that was idle for longer (seconds) is lent only after a look at the database file; where all are busy all
# the time, the file is looked at so often (seconds). A look costs as much as a checkout.
TRUSTED_FOR = 0.00001
_LOOK_EVERY = 0.001


class WatchedPool(Pool[T]):
    """The side of a `ConnectionPool` that looks after the file."""

    _file: DatabaseFile | None
    """The file; None for a database in memory."""
    _raises: bool
    """Raise `FileReplaced` until the file is back, instead of opening the new one."""

    def _tend(self, now: float) -> None:
        file = self._file
        if file is not None and (self._slots or file.left):
            # `os.stat` lets other threads run, so under load it costs far more than its own time
            nobody_is_at_work = not self._attention and len(self._idle) == len(self._slots)
            if now >= self._watch_at or (nobody_is_at_work and now - file.looked_at >= TRUSTED_FOR):
                self._look_at_file(file, now)
        super()._tend(now)

    def _look_at_file(self, file: DatabaseFile, now: float) -> None:
        """See whether the file is still the one that the connections have open; if not, part with them.

        Raises:
            FileReplaced: by option.
            sqlite3.DatabaseError: the file was truncated. Its connections are kept: to close the last one would write
                what the journal holds into a file that has nothing else any more.
        """
        what = file.look()
        if what is None:  # which may be old by now: that the file was left is not for us to undo
            file.looked_at = now
            if now >= self._watch_at:
                locked(self._lock, self._watch_from, now + _LOOK_EVERY)
            return
        if what == "truncated":
            raise damage(f"{file.path} was truncated while pool {self.name!r} had it open")
        surplus = locked(self._lock, self._leave_file, file)
        message = f"the database file {file.path} was {what} while pool {self.name!r} had it open"
        if surplus is not None:
            self._close_all(surplus)
            if not self._raises:
                warnings.warn(f"{message}: its connections are closed and opened anew", RuntimeWarning, stacklevel=5)
        if self._raises:
            raise FileReplaced(f"{message}; put it back, or close the pool")

    def _look_before_commit(self, conn: Connection) -> None:
        """Roll back, and say so, where what is committed would be lost with the file that was there before."""
        file = self._file
        what = None if file is None else file.look()
        if file is not None and what is not None:
            end_block(conn, False)
            locked(self._lock, self._watch_from, -NEVER)
            lost = f"{file.path} was {what} before the end of this block, and nothing of the block was written"
            raise damage(lost) if what == "truncated" else FileReplaced(f"the database file {lost}: run it again")

    def _leave_file(self, file: DatabaseFile) -> list[Slot[T]] | None:
        """Have every connection replaced, because the file is another; None if that is done already. Needs the lock."""
        if file.left:
            return None
        file.left = True
        self._watch_from(-NEVER if self._raises else NEVER)
        return self._condemn_all()

    def _enter_file(self, file: DatabaseFile) -> None:
        """Make sure that a connection about to be opened does not find the journal of another file."""
        if file.left and file.look() is None:  # put back
            file.left = False
        if file.left and any(slot.item is not None and slot.expires == -NEVER for slot in list(self._slots)):
            raise FileReplaced(
                f"{file.path} was replaced while connections of pool {self.name!r} to the old file are still lent; "
                "a new connection would mix up their journals. Try again when they have been returned"
            )
        try:
            aside = file.set_journal_aside()
        except OSError as error:
            raise FileReplaced(f"{file.path} was replaced, and the journal of the old file is in the way") from error
        if aside is not None:
            logger.warning("the journal of the file that was replaced at %s is kept as %s", file.path, aside)

    def _check_file(self, before: tuple[int, int] | None) -> None:
        """See to it that what was opened just now is the file that was looked at before."""
        file = self._file
        if file is not None and before is not None and file.identify() != before:
            raise is_changing(file)

    def _remember_file(self, file: DatabaseFile, before: tuple[int, int] | None) -> None:
        """Note which file is open now, unless connections to another one are open too."""
        if not file.left and file.look() is not None and any(slot.item is not None for slot in list(self._slots)):
            self._look_at_file(file, monotonic())
            raise is_changing(file)
        if not file.remember(before):
            raise is_changing(file)
        locked(self._lock, self._watch_from, monotonic() + _LOOK_EVERY)


def is_changing(file: DatabaseFile) -> FileReplaced:
    """Make the error for a file that was replaced at the very moment when it was opened."""
    return FileReplaced(f"{file.path} was replaced while a connection to it was opened. Try again")
