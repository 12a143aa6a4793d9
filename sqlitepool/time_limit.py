"""Time limits of queries: one thread for the whole process interrupts what has run for too long.

`sqlite3.Connection.interrupt` works from any thread and ends the statement that runs at that moment, whoever runs it by
then. So a limit is ended under the same lock under which the connection is interrupted: after `TimeLimit.end` no
interrupt of this limit can come, and the next borrower never gets it. A limit that has passed interrupts again and
again until it is ended, because the block may have been between two statements.

The thread starts with the first limit and ends when there was none for some seconds. No callback of SQLite is used.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import weakref
from heapq import heapify, heappop, heappush
from time import monotonic

from sqlitepool import fork
from sqlitepool.fork import same_process
from sqlitepool.limits import NEVER
from sqlitepool.waiting import locked, surely

# A limit that has passed interrupts again after so many seconds, then after twice as many, up to the most.
_FIRST_AGAIN, _LONGEST_AGAIN = 0.005, 0.25
# The thread ends when there was no limit for so long (seconds).
_STAYS = 5.0
# The most seconds that it sleeps at a time: `Condition.wait` takes neither an infinite nor a very large number.
_LONGEST_SLEEP = 3600.0
# Limits that were ended in time stay in the heap until they are due, or until they are more than this and half of it.
_MANY = 64

_numbers = itertools.count()


class TimeLimit:
    """The limit of one block or query.

    Attributes:
        has_passed: the connection was interrupted.
    """

    __slots__ = ("__weakref__", "_again", "_conn", "_is_over", "has_passed", "seconds")

    def __init__(self, conn: sqlite3.Connection, seconds: float) -> None:
        self.seconds = seconds
        self.has_passed = False
        self._again = _FIRST_AGAIN
        self._conn: sqlite3.Connection | None = conn
        self._is_over = False

    def start(self) -> None:
        """From now on the time counts."""
        if not same_process[0]:
            fork.start_anew()
        locked(_watchdog.lock, _watchdog.add, self, monotonic() + self.seconds)

    def end(self) -> None:
        """From now on nothing is interrupted any more."""
        surely(_watchdog.lock, self._end)

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._conn = None
            _watchdog.forget_one()

    def _bite(self) -> float | None:
        """Interrupt; return after how many seconds to do so again, None if it is over."""
        if self._is_over or self._conn is None:
            return None
        self.has_passed = True
        with contextlib.suppress(sqlite3.ProgrammingError):  # its borrower closed the connection
            self._conn.interrupt()
        pause, self._again = self._again, min(self._again * 2, _LONGEST_AGAIN)
        return pause


class _Watchdog:
    """The thread, and the limits that it watches. All but `lock` needs the lock."""

    def __init__(self) -> None:
        self._start_anew()
        fork.register(self)

    def _start_anew(self) -> None:
        self.lock = threading.RLock()
        self._bell = threading.Condition(self.lock)
        self._heap: list[tuple[float, int, weakref.ref[TimeLimit]]] = []
        self._over = 0
        self._thread: threading.Thread | None = None
        self._wakes_at = NEVER

    def add(self, limit: TimeLimit, due: float) -> None:
        heappush(self._heap, (due, next(_numbers), weakref.ref(limit)))
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="sqlitepool-time-limits", daemon=True)
            thread.start()
            self._thread = thread
        elif due < self._wakes_at:
            self._bell.notify()

    def forget_one(self) -> None:
        self._over += 1
        if self._over > _MANY and self._over > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if (limit := entry[2]()) is not None and not limit._is_over]
            heapify(self._heap)
            self._over = 0

    def _run(self) -> None:
        while locked(self.lock, self._watch):
            pass

    def _watch(self) -> bool:
        """Do what is due and sleep until there is more; tell whether to go on."""
        now = monotonic()
        while self._heap and self._heap[0][0] <= now:
            reference = heappop(self._heap)[2]
            limit = reference()  # None: it died with a block that was interrupted
            again = None if limit is None else limit._bite()
            del limit
            if again is None:
                self._over = max(0, self._over - 1)
            else:
                heappush(self._heap, (now + again, next(_numbers), reference))
        if self._heap:
            self._wakes_at = self._heap[0][0]
            self._bell.wait(min(self._wakes_at - now, _LONGEST_SLEEP))
        else:
            self._wakes_at = NEVER
            if not self._bell.wait(_STAYS) and not self._heap:
                self._thread = None
                return False
        return True


_watchdog = _Watchdog()
