"""The lock between processes behind the write gate: two files beside the database.

`flock` alone is not fair: who lets go and asks again at once is quicker than the one that has to wake up. So there are
two files, as where one person is served at a time and the others queue at a line on the floor:

- the lock itself (`app.db-gate`): who has it may write;
- the queue (`app.db-gate-queue`, see `file_queue.py`): who waits in earnest waits there until they are first, and stays
  first while they wait for the lock. So only one process at a time waits for the lock, nobody else can get at it, and
  it is theirs as soon as it is free. The one that has just let go of the lock goes to the end of the queue.

The kernel lets go for a process that is killed. The database file itself is never opened: closing that descriptor
would drop SQLite's own locks on it (https://www.sqlite.org/howtocorrupt.html, section 2.2). The two files are empty,
and stay when all are done. Who deletes them while the database is in use lets two processes believe that it is their
turn. SQLite's own locks still keep their writes apart, but on versions with the WAL-reset bug (see `wal.py`) it is the
gate that keeps checkpoints and commits from overlapping, and so the data from harm.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sqlitepool import file_queue

if not TYPE_CHECKING and find_spec("fcntl") is None:  # Windows, WebAssembly
    LOCK_EX, LOCK_NB, LOCK_UN = 2, 4, 8

    def flock(fd: int, operation: int, /) -> None:
        """Stand in for `fcntl.flock`."""
        raise OSError(errno.ENOTSUP, "this platform has no flock")
else:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

#: For so long (seconds) a process may take the file lock again and again, while others wait for it. Each change of
#: process costs as much as some twenty writes, and longer slices lengthen every wait.
SLICE = 0.04
# Who is first in the queue looks whether the lock is free after so long (seconds), and blocks in `flock` a little
# before the slice of the one that has it ends: not sooner, because each turn of that one would wake it in vain.
_LOOKS = (0.002, 0.01, SLICE - 0.001)
# The lock is free if it is so twice, so far apart (seconds): once may be between two turns of the same process.
_ONCE_MORE = 0.0003
_TRY = LOCK_EX | LOCK_NB
_OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


class FileLock:
    """The lock between processes for one database file. For one thread at a time; `Gate` sees to that.

    All but the constructor raise `OSError` where the file system has no `flock`, or the files cannot be made.

    Args:
        database: the path of the database file, which must exist.
    """

    _lock = _queue = -1

    is_awaited = False
    """Another process waited in the queue when we came there last."""
    barge: Callable[[], object]
    """Take the lock if it is free, even if others wait for it; raise `BlockingIOError` if it is not."""
    unlock: Callable[[], object]
    """Let go of the lock; does nothing if we do not have it."""

    def __init__(self, database: str) -> None:
        self._database = os.path.realpath(database)

    def open(self) -> None:
        """Open the two files, making them where they do not exist."""
        self.close()
        self._queue = _open(f"{self._database}-gate-queue", self._database)
        self._lock = lock = _open(f"{self._database}-gate", self._database)
        self.barge = partial(flock, lock, _TRY)
        self.unlock = partial(flock, lock, LOCK_UN)

    def close(self) -> None:
        """Close the files. Lets go of the lock, unless a forked child has the same open files: there it stays as it is.

        A child must do this, and never `unlock`: that would be done to the parent's lock, which is the same.
        """
        self.barge = self.unlock = _nothing
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
        queue, self._queue = self._queue, -1
        if queue >= 0:
            os.close(queue)

    __del__ = close

    def try_to_queue(self) -> bool:
        """Take the lock if it is free and no other process waits for it in earnest; tell whether it was taken."""
        if os.fstat(self._lock).st_nlink == 0 or os.fstat(self._queue).st_nlink == 0:
            self.open()  # somebody deleted the files: the other processes are about to use new ones
        self.is_awaited = not file_queue.is_empty(self._queue)
        return not self.is_awaited and self.try_to_barge()

    def try_to_barge(self) -> bool:
        """Take the lock if it is free, even if others wait for it; tell whether it was taken."""
        try:
            self.barge()
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Wait in the queue for the lock, for as long as it takes."""
        try:
            file_queue.join(self._queue)
            began = time.monotonic()
            for after in _LOOKS:
                time.sleep(max(0.0, began + after - time.monotonic()))
                if self.try_to_barge():
                    self.unlock()
                    time.sleep(_ONCE_MORE)
                    if self.try_to_barge():
                        return
            flock(self._lock, LOCK_EX)
        finally:
            file_queue.leave(self._queue)


def _nothing() -> None:
    pass


def _open(path: str, database: str) -> int:
    """Open a lock file. A new one gets the rights of the database: who may write there must come through the gate."""
    try:
        return os.open(path, os.O_RDWR | _OPEN_FLAGS)
    except FileNotFoundError:
        pass
    except PermissionError:
        return os.open(path, os.O_RDONLY | _OPEN_FLAGS)  # enough for flock on local file systems
    status = os.stat(database)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, status.st_mode & 0o666)
    except FileExistsError:  # another process was quicker
        return os.open(path, os.O_RDWR | _OPEN_FLAGS)
    with contextlib.suppress(OSError, AttributeError):  # not ours to give, or a platform without it
        os.fchmod(descriptor, status.st_mode & 0o666)
        if os.geteuid() == 0:
            os.fchown(descriptor, status.st_uid, status.st_gid)
    return descriptor
