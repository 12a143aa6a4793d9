"""The write gate between processes: the file lock, and the helper thread that waits for it.

A process that came in by the queue of `file_lock.py` may take the lock again and again for a slice of time, for all its
threads, while others wait; then it goes to the end of the queue. It lets go after every turn for which nobody in the
process waits, so a process that does nothing keeps nobody out.

How a process waits for another. The thread that is first in line makes a few quick tries, unless another process waits
in the queue. Then a helper thread blocks in `flock` for the whole process, because `flock` knows no timeout, and hands
what it gets to whoever is first in line by then. The helper starts when it is needed, and ends when it was not for some
seconds.
"""

from __future__ import annotations

import threading
import warnings
from _thread import LockType, allocate_lock, start_new_thread
from time import monotonic

from sqlitepool.file_lock import SLICE, FileLock
from sqlitepool.limits import NEVER
from sqlitepool.turn import Token
from sqlitepool.waiting import locked

# The helper thread ends when nobody needed it for so long (seconds).
_HELPER_STAYS = 5.0


class ProcessGate:
    """The side of a `Gate` that other processes see. Which thread is next is for `Gate` to decide.

    Args:
        database: the path of the file, None for a database that no other process can have.
    """

    def __init__(self, database: str | None) -> None:
        self.database = database
        self._file: FileLock | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        """At first, and in a forked child: nobody has anything. Inherited files are closed, see `FileLock.close`."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._is_opened = self.database is None
        self._complaint: str | None = None
        self._lock = threading.RLock()
        self._bell: LockType | None = None
        self._free: list[Token] = []
        self._quick_until = -NEVER

    # -- what `Gate` does

    def _look(self) -> None:
        """Work out until when the quick way may be taken."""
        raise NotImplementedError

    def _settle(self) -> Token | None:
        """See to who is next."""
        raise NotImplementedError

    def _is_awaited(self) -> bool:
        """Tell whether a thread waits for the token."""
        raise NotImplementedError

    @property
    def _name(self) -> str:
        return "a database in memory" if self.database is None else repr(self.database)

    def _put(self, token: Token) -> None:
        self._free.append(token)

    def _put_back(self, token: Token) -> None:
        self._put(token)
        self._settle()

    # -- the file lock: only who has the token may touch it

    def _prepare(self) -> None:
        """Open the file lock at first use, and warn, once, where there is none."""
        complaint = locked(self._lock, self._open_file)
        if complaint is not None:
            warnings.warn(complaint, RuntimeWarning, stacklevel=4)

    def _open_file(self) -> str | None:
        """Open the file lock if that was not done; return what there is to warn of. Needs the lock, not the token."""
        if not self._is_opened and self.database is not None:
            file = FileLock(self.database)
            try:
                file.open()
                if file.try_to_queue():
                    file.unlock()
                self._file = file
            except OSError as error:
                self._do_without_file(error)
            self._is_opened = True
        complaint, self._complaint = self._complaint, None
        self._look()
        return complaint

    def _take_file(self, token: Token, now: float) -> bool:
        """Have the file lock, if it can be had at once."""
        file = self._file
        if file is None or token.has_file:
            return True
        try:
            if now < token.slice_ends:
                file.barge()
            elif file.try_to_queue():
                token.slice_ends = now + SLICE
            else:
                return False
        except BlockingIOError:
            return False
        except OSError as error:
            self._do_without_file(error)
            return True
        token.has_file = True
        return True

    def _leave_file(self, token: Token) -> None:
        if self._file is not None:
            self._file.unlock()
        token.has_file = False

    def _do_without_file(self, error: OSError) -> None:
        self._file = None
        self._complaint = (
            f"the write gate of {self._name} is fair within this process only, because there is no lock that other "
            f"processes would see: {error}"
        )
        self._quick_until = -NEVER

    # -- the helper

    def _ring(self) -> bool:
        """Have the helper look at whether to wait for another process. Tell whether there is a helper."""
        bell = self._bell
        if bell is None:
            bell = allocate_lock()
            try:
                start_new_thread(self._help, (bell,))
            except RuntimeError:  # no more threads, or the interpreter is about to end
                return False
            self._bell = bell
        elif bell.locked():
            try:
                bell.release()
            except RuntimeError:  # somebody else has rung
                pass
        return True

    def _help(self, bell: LockType) -> None:
        """The helper thread: each time the bell rings, wait for the file lock if somebody needs it."""
        while bell.acquire(timeout=_HELPER_STAYS) or not locked(self._lock, self._dismiss_helper, bell):
            token = locked(self._lock, self._begin_errand)
            if token is not None:
                self._run_errand(token)
                del token

    def _dismiss_helper(self, bell: LockType) -> bool:
        """Tell the helper whether it may go."""
        if self._bell is bell:
            if not bell.locked():
                return False
            self._bell = None
        return True

    def _begin_errand(self) -> Token | None:
        """Give the helper the token, if somebody waits for it who would have to wait for another process."""
        if self._file is None or not self._is_awaited():
            return None
        try:
            token = self._free.pop()
        except IndexError:
            return None
        if token.has_file:
            self._put(token)
            return None
        return token

    def _run_errand(self, token: Token) -> None:
        file = self._file
        try:
            token.return_connection()  # it may be closed meanwhile
            if file is not None:
                file.wait()
                token.has_file = True
                token.slice_ends = monotonic() + SLICE
        except OSError as error:
            self._do_without_file(error)
        locked(self._lock, self._put_back, token)
