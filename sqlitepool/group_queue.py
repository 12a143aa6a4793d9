"""The queue of a group commit, and every decision about it that is taken with the lock held.

`group_commit.py` says what the rules are; here is who is next (`_appoint`), who may still be taken back (`_take_back`)
and what is done (`_settle`). Nothing here runs user code or touches the database.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections import deque
from time import monotonic

from sqlitepool import fork
from sqlitepool.errors import PoolFull, WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.job import Job
from sqlitepool.limits import NEVER
from sqlitepool.waiting import locked
from sqlitepool.writer import Writer, time_left

# Who waits for the queue to be empty looks this often (seconds).
_PATIENCE = 1.0
# The background thread ends when there was nothing to do for so long (seconds).
_STAYS = 5.0


class GroupQueue:
    """The queue of one `Database`, and who leads.

    Args:
        writer: where the transactions are made.
        max_queue: the most jobs that may be queued; who comes then waits for room.
        name: stands in messages.
    """

    def __init__(self, writer: Writer, max_queue: int, name: str) -> None:
        self._writer = writer
        self._max_queue = max_queue
        self._name = name
        self._start_anew()
        fork.register(self)

    def flush(self, deadline: float | None) -> bool:
        """Wait until nothing is queued or under way; tell whether that was so before the deadline."""
        if not same_process[0]:
            fork.start_anew()
        while not locked(self._lock, self._is_at_rest):
            left = time_left(deadline)
            if left == 0:
                return False
            locked(self._lock, self._wait_for_rest, _PATIENCE if left is None else min(left, _PATIENCE))
        return True

    def end(self) -> None:
        """Let the background thread end, once all futures are done. If the writer is closed, it now is for all."""
        self._writer.close_for_all()
        locked(self._lock, self._end)

    @property
    def queued(self) -> int:
        """How many jobs wait to be run."""
        return len(self._queue)

    def _start_anew(self) -> None:
        """At first, and in a forked child: nothing is queued, and nobody leads."""
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)
        self._rest = threading.Condition(self._lock)
        self._work = threading.Condition(self._lock)
        self._queue: deque[Job] = deque()
        self._leader: Job | None = None
        self._thread: threading.Thread | None = None
        self._thread_leads = False
        self._settled: deque[Job] = deque()
        self._without_room = 0
        self._unresolved: set[Job] = set()
        self._is_ending = False

    def _admit(self, job: Job) -> None:
        """Put the job into the queue, when there is room, and have somebody lead."""
        while len(self._queue) >= self._max_queue:
            if threading.current_thread() is self._thread or self._writer.enclosing(sys._getframe()) is not None:
                raise PoolFull(
                    f"the queue of {self._name!r} is full, with {len(self._queue)} jobs that can only be run when the "
                    "write block or callback that called here has ended"
                )
            left = time_left(job.deadline)
            if left == 0:
                raise WriteTimeout(f"the queue of {self._name!r} was full: {len(self._queue)} jobs. {self._holder()}")
            self._without_room += 1
            try:
                self._room.wait(left)
            except BaseException:
                self._room.notify()  # it may have been ours
                raise
            finally:
                self._without_room -= 1
        if job.future is None:
            job.wake = wake = threading.Lock()
            wake.acquire()
        elif self._thread is None:
            self._start_thread()
        self._queue.append(job)
        if job.future is not None:
            self._unresolved.add(job)
        if self._leader is None and not self._thread_leads:
            self._appoint()

    def _appoint(self) -> None:
        """Have the thread of the first job lead; nobody, if there is none."""
        self._leader = None
        self._thread_leads = False
        if not self._queue:
            if not self._unresolved:
                self._rest.notify_all()
        elif (first := self._queue[0]).future is None:
            self._leader = first
            first.ring()
        else:
            self._work.notify()  # first: interrupted here, the thread is awake all the same
            self._thread_leads = True

    def _claim(self, batch: list[Job], leader: Job | None, now: float) -> Job | None:
        """Take the next job of a batch out of the queue; None, if the batch is to end here."""
        queue = self._queue
        if queue and now >= queue[0].expires:
            self._expire(now)
        if not queue:
            return None
        job = queue[0]
        if batch and (job.alone or batch[-1].alone):
            return None
        if job.at_home and job is not leader and (leader is not None or job.future is None):
            return None
        batch.append(job)  # first: interrupted here, it is in both, and is not lost
        queue.popleft()
        if self._without_room:
            self._room.notify()
        return job

    def _take_back(self, job: Job) -> bool:
        """Take a job out of the queue; tell whether it was there, and so was not begun."""
        try:
            self._queue.remove(job)
        except ValueError:
            return False
        self._unresolved.discard(job)
        if self._without_room:
            self._room.notify()
        if self._leader is job or (not self._queue and not self._thread_leads and self._leader is None):
            self._appoint()
        return True

    def _drop(self, job: Job) -> bool:
        """See to it that nobody waits for a caller that was interrupted; tell whether its job was not begun."""
        is_taken_back = self._take_back(job)
        if self._leader is job or (self._leader is None and not self._thread_leads):
            self._appoint()
        return is_taken_back

    def _settle(self, batch: list[Job]) -> None:
        """Say that the jobs are done. To do so twice does no harm."""
        for job in batch:
            if not job.is_done:
                job.is_done = True
                if job.future is not None:
                    self._settled.append(job)
                    self._work.notify()

    def _settle_in_doubt(self, batch: list[Job]) -> None:
        """Fail the jobs that may be committed, or not, because of another one: they must not be run again."""
        for job in batch:
            if not job.is_done and job.error is None:
                job.error = sqlite3.OperationalError(
                    "another function of the same group commit has ended the transaction past Database: whether this "
                    "write was committed cannot be known. Look before you repeat it"
                )
        self._settle(batch)

    def _requeue(self, batch: list[Job], alone: bool) -> None:
        """Have jobs that were not committed run again, before all others, in their order."""
        for job in reversed(batch):
            if not job.is_done:
                job.result = job.error = None
                job.expires = NEVER  # it was begun in time
                job.alone = job.alone or alone
                if job not in self._queue:
                    self._queue.appendleft(job)

    def _pass_on(self, done: list[Job], job: Job | None) -> None:
        """Let somebody else lead, if the leader has no job of its own any more, or there is nothing that it may do."""
        self._settle(done)
        if job is None or (self._leader is job and (job.is_done or not done)):
            self._appoint()

    def _is_at_rest(self) -> bool:
        return not self._queue and self._leader is None and not self._thread_leads and not self._unresolved

    def _wait_for_rest(self, seconds: float) -> None:
        if not self._is_at_rest():
            self._rest.wait(seconds)

    def _empty(self) -> list[Job]:
        jobs = list(self._queue)
        self._queue.clear()
        self._room.notify_all()
        return jobs

    def _expire(self, now: float) -> None:
        """Fail the submitted jobs at the head of the queue whose time is up: there is no caller who sees to that."""
        queue = self._queue
        while queue and now >= (job := queue[0]).expires:
            if not job.is_done:  # if so, this is done again after an interruption
                job.error = WriteTimeout(
                    f"the function was not begun in {now - job.since:.3f} s, with others before it in the queue of "
                    f"{self._name!r}. {self._holder()}"
                )
                self._settle([job])
            queue.popleft()
            if self._without_room:
                self._room.notify()

    def _head(self) -> Job | None:
        self._expire(monotonic())
        return self._queue[0] if self._queue else None

    def _take_back_failed(self, job: Job) -> bool:
        try:
            self._queue.remove(job)
        except ValueError:
            return False
        if self._without_room:
            self._room.notify()
        return True

    def _await_work(self) -> bool:
        """Sleep until there is something to do; tell whether to go on."""
        if not self._settled and not self._thread_leads and not (self._is_ending and not self._unresolved):
            self._work.wait(_STAYS)
        if self._settled or self._thread_leads or self._unresolved:
            return True
        self._thread = None
        return False

    def _end(self) -> None:
        """Have the background thread end when it has nothing to do."""
        self._is_ending = True
        self._work.notify_all()

    def _note_resolved(self, job: Job) -> None:
        self._unresolved.discard(job)
        if self._is_at_rest():
            self._rest.notify_all()

    def _holder(self) -> str:
        holder = self._writer.holder()
        return f"The right to write is held by {'nobody in this process' if holder is None else holder}"

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name=f"sqlitepool-writer-{self._name}", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except BaseException:
            self._thread = None
            raise

    def _serve(self) -> None:
        """The background thread: see `GroupCommit`."""
        raise NotImplementedError
