"""The queue of the processes that wait for the file lock: a row of chairs, each of them one byte of a file.

A lock for which several wait goes to whoever of them runs first, and that is often the one who had it last. So here
each waits alone: who comes takes the last chair, and moves up when the chair in front of theirs is free. Where more
wait than there are chairs, those without one wait for the last chair together, in no order.

A chair is taken by a lock on its byte. Such locks belong to the open file where the system has that (F_OFD_SETLK,
https://man7.org/linux/man-pages/man2/fcntl_locking.2.html), so sub-interpreters of one process queue as processes do.
Elsewhere they belong to the process, in which then nobody waits for another. The kernel lets go for who is killed.
"""

from __future__ import annotations

import errno
import struct
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

#: So many processes wait in order, and one more may have the lock.
CHAIRS = 8

_LAST = CHAIRS - 1

if not TYPE_CHECKING and find_spec("fcntl") is None:  # Windows, WebAssembly
    LOCK_SH, LOCK_EX, LOCK_NB, LOCK_UN = 1, 2, 4, 8

    def _lock(descriptor: int, operation: int, first: int, count: int) -> None:
        raise OSError(errno.ENOTSUP, "this platform has no fcntl")
else:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, lockf

    if sys.platform == "linux":
        from fcntl import F_OFD_SETLK, F_OFD_SETLKW, F_RDLCK, F_UNLCK, F_WRLCK, fcntl

        _COMMANDS = {0: F_OFD_SETLKW, LOCK_NB: F_OFD_SETLK}
        _TYPES = {LOCK_SH: F_RDLCK, LOCK_EX: F_WRLCK, LOCK_UN: F_UNLCK}
        _FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, first byte, count, process

    def _lock(descriptor: int, operation: int, first: int, count: int) -> None:
        """Do to these bytes what `flock` does to a file."""
        if sys.platform == "linux":
            flock = _FLOCK.pack(_TYPES[operation & ~LOCK_NB], 0, first, count, 0)
            try:
                fcntl(descriptor, _COMMANDS[operation & LOCK_NB], flock)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # as in sandboxes that know only the older locks
                    raise
        lockf(descriptor, operation, count, first)


def is_empty(descriptor: int) -> bool:
    """Tell whether nobody sits in the queue."""
    try:
        _lock(descriptor, LOCK_SH | LOCK_NB, 0, CHAIRS)
    except BlockingIOError:
        return False
    leave(descriptor)
    return True


def join(descriptor: int) -> None:
    """Wait until the first chair is ours. `leave` must follow, also where this raises."""
    try:
        _lock(descriptor, LOCK_EX, _LAST, 1)
    except OSError as error:
        if error.errno == errno.EBADF:  # opened for reading only: we may look at the queue, not take a chair
            return
        raise
    chair = _go_to_the_end(descriptor)
    while chair > 0:
        _lock(descriptor, LOCK_EX, chair - 1, 1)
        _lock(descriptor, LOCK_UN, chair, 1)
        chair -= 1


def _go_to_the_end(descriptor: int) -> int:
    """Move from the last chair to the one behind those who sit already, and return it.

    In one step, because the thread may wait for the GIL after each.
    """
    for chair in range(_LAST):
        try:
            _lock(descriptor, LOCK_EX | LOCK_NB, chair, CHAIRS - chair)
        except BlockingIOError:
            continue
        _lock(descriptor, LOCK_UN, chair + 1, _LAST - chair)
        return chair
    return _LAST


def leave(descriptor: int) -> None:
    """Get up, wherever we sit."""
    _lock(descriptor, LOCK_UN, 0, CHAIRS)
