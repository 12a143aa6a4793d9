"""Group commit: one transaction, and one wait for the disk, for the work of many.

Who calls `run` puts a job into the queue. If nobody leads, the caller leads: it takes the right to write and the
connection, begins a transaction, runs job after job, each in a savepoint, commits, and only then tells the callers. The
others sleep, one lock each, and are woken once, when their job is done. It is the bus instead of so many cars: who
comes while it stands at the stop gets on, and it leaves after a bounded time, full or not.

Where nobody else is at the stop there is no need for a bus: whoever finds the queue empty and the right to write free
runs the function at once, in a transaction of its own, without a lock or a queue (`run`). Where the last batch had
several jobs, more will come, and they queue.

The rules of the queue, each in one function of `GroupCommit`:

1. While anything is queued, somebody leads: the thread of the job that is first in the queue, or, where that one was
   submitted and no thread waits for it, the background thread (`_appoint`).
2. A leader runs batches until its own job is done. No batch has more than `_MOST_JOBS` jobs or takes new ones after
   `_LONGEST_BATCH` seconds (`_claim`).
3. A job is done when its transaction is committed, or when it has failed and what it saw was committed (`_settle`).
   One that left something behind that the next would find (a temporary table, a PRAGMA, a row factory) is the last of
   its batch: after it the connection is proved clean, or replaced (`_fill`).
4. What was not committed is run again: alone, if COMMIT failed, so that each gets its own error (`_requeue`).
5. Who is interrupted gets the exception; the others' jobs go back to the head of the queue, or are done if they were
   committed (`_lead`).
6. Futures are resolved by the background thread (and by `close()`), because the lock inside of a `Future` does not
   survive an exception from a signal handler (`_resolve`).
7. Whoever ends the transaction of all gets the error. The others are run again if it was rolled back. If it may have
   been committed, they must not be, and their error says so (`_settle_in_doubt`).
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from types import FrameType
from typing import Any

from sqlitepool import fork
from sqlitepool.database_file import name_file
from sqlitepool.errors import PoolTimeout, WriteTimeout
from sqlitepool.fork import same_process
from sqlitepool.group_queue import GroupQueue
from sqlitepool.job import NOT_BEGUN, Job, WriteFuture, not_run
from sqlitepool.pool import logger
from sqlitepool.stats import MOST_PENDING, Tally
from sqlitepool.transaction import Transaction
from sqlitepool.waiting import locked, surely
from sqlitepool.writer import Writer, time_left
from sqlitepool.writing_connection import CAN_REFUSE, ended

_frame = sys._getframe

# Where a job could commit by itself and not be noticed, each is committed alone.
_MOST_JOBS = 1000 if CAN_REFUSE else 1
_LONGEST_BATCH = 0.01
# After an error that is nobody's (seconds).
_AFTER_ERROR = 0.01
# A waiter looks this often (seconds) whether it was forgotten.
_PATIENCE = 1.0


class GroupCommit(GroupQueue):
    """Runs jobs in group commits, for one `Database`. The arguments are those of `GroupQueue`.

    Attributes:
        batches: how many group commits there were.
        jobs: how many jobs were committed in them.
        waits: how long each job waited to be run.
    """

    def __init__(self, writer: Writer, max_queue: int, name: str) -> None:
        super().__init__(writer, max_queue, name)
        self.jobs = 0
        self.batches = 0
        self.waits = Tally()
        self._is_alone = True  # the last batch had one job at most

    # -- what `Database` calls

    def run(self, job: Job, frame: FrameType) -> Any:
        """Run a job for the caller in `frame`; return what its function returned, after the COMMIT."""
        if self._is_alone and self._leader is None and not self._queue and not self._thread_leads:
            writer = self._writer
            transaction = Transaction(writer, job.timeout)
            try:
                conn = transaction.try_to_begin(frame, job.since, _frame(), False)
                if conn is not None:
                    waited = monotonic() - job.since
                    result = job.function(conn, *job.args)
                    if transaction.inner:
                        raise _left_open()
                    if type(result) in NOT_BEGUN:
                        raise not_run(job.function, result)
                    now = monotonic()
                    if now < writer.trusted_until or writer.has_same_file(now):
                        transaction.commit()
                        self.jobs += 1
                        self.batches += 1
                        waits = self.waits
                        waits.append(waited)
                        if len(waits) > MOST_PENDING:
                            self.waits = waits.folded()
                        transaction.end()
                        return result
                    transaction.end()
            except BaseException as error:
                if isinstance(error, Exception):
                    self._name_file(error)
                    if transaction.conn is not None and not transaction.is_committed and transaction.is_lost:
                        transaction.note_loss(error)
                else:
                    error.add_note(_said(transaction.was_committed(error)))
                transaction.end()
                raise
        return self._run_in_group(job, frame)

    def _run_in_group(self, job: Job, frame: FrameType) -> Any:
        """Put a job into the queue, and lead or sleep until it is done."""
        job.frame = frame
        try:
            if not same_process[0]:
                fork.start_anew()
            locked(self._lock, self._admit, job)
            while not job.is_done:
                if self._leader is job or (self._thread_leads and self._stands_in()):
                    self._lead(job)
                else:
                    self._follow(job)
        except BaseException as error:
            taken_back = surely(self._lock, self._drop, job)
            if not isinstance(error, Exception) and not job.is_done:
                said = "has not been begun" if taken_back else "goes on in another thread, and may yet be committed"
                error.add_note(f"sqlitepool: the write of this call {said}")
            raise
        finally:
            job.frame = None
        return job.outcome()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job for whoever leads next, and return its future."""
        if not same_process[0]:
            fork.start_anew()
        job.future = future = WriteFuture(lambda: locked(self._lock, self._take_back, job))
        if job.timeout:  # with one of 0 it is tried when it is its turn
            job.expires = job.since + job.timeout
        try:
            locked(self._lock, self._admit, job)
        except BaseException:
            surely(self._lock, self._drop, job)
            raise
        return future

    def abandon(self, error: Callable[[], BaseException]) -> None:
        """Fail all that is queued."""
        for job in locked(self._lock, self._empty):
            job.error = error()
            surely(self._lock, self._settle, [job])
            job.ring()
        self._resolve()  # the background thread may be waiting for the right to write

    # -- waiting

    def _follow(self, job: Job) -> None:
        """Sleep until the job is done, or its thread is to lead, or the time is up."""
        wake = job.wake
        assert wake is not None
        left = time_left(job.deadline)
        if wake.acquire(timeout=_PATIENCE if left is None else min(left, _PATIENCE)):
            return
        if left is not None and left <= _PATIENCE and locked(self._lock, self._take_back, job):
            raise WriteTimeout(
                f"the write was not begun in {monotonic() - job.since:.3f} s, with {len(self._queue)} others in the "
                f"queue of {self._name!r}. {self._holder()}"
            )
        if left == 0:  # it is under way, and nothing can take it back
            wake.acquire(timeout=_PATIENCE)

    def _stands_in(self) -> bool:
        """Tell whether this is the background thread, in a callback, and it is its turn to lead."""
        return self._thread_leads and threading.current_thread() is self._thread

    # -- leading

    def _lead(self, own: Job) -> None:
        """Run one batch on behalf of `own`. If it cannot even be begun, that is the error of `own`."""
        batch: list[Job] = []
        transaction = Transaction(self._writer, None)
        try:
            self._run_batch(transaction, batch, own)
        except BaseException as interruption:
            committed = bool(batch) and transaction.was_committed(interruption)
            try:
                transaction.end()
            finally:
                self._interrupted(batch, own, committed, interruption)
            raise

    def _run_batch(self, transaction: Transaction, batch: list[Job], own: Job | None) -> None:
        """Run a batch, commit it, and say so. Without `own` it is for the job at the head of the queue."""
        on_behalf = own if own is not None else locked(self._lock, self._head)
        if on_behalf is None:
            self._finish([], None)
            return
        try:
            frame = _frame()
            transaction._timeout = on_behalf.timeout
            transaction.begin(on_behalf.frame or frame, on_behalf.since, frame)
        except Exception as error:
            if locked(self._lock, self._take_back_failed, on_behalf):
                on_behalf.error = error
                batch.append(on_behalf)
                surely(self._lock, self._settle, batch)
            transaction.end()
            self._finish(batch, own)
            return
        failed = self._fill(transaction, batch, own)
        alone = False
        if failed is None and batch and self._writer.has_same_file(monotonic()):
            try:
                transaction.commit()
            except (sqlite3.Error, PoolTimeout) as error:
                self._name_file(error)
                if not transaction.is_committed:
                    alone = True
                    if len(batch) == 1:
                        failed = batch[0]
                        failed.error = error
        is_committed = transaction.is_committed
        if is_committed:
            self.jobs += sum(job.error is None for job in batch)
            self.batches += 1
        transaction.end()
        if not is_committed:
            if failed is not None and failed.ended_all:
                surely(self._lock, self._settle_in_doubt, batch)
            elif failed is not None:
                surely(self._lock, self._settle, [failed])
            surely(self._lock, self._requeue, batch, alone)
        self._is_alone = len(batch) <= 1 and not self._queue
        self._finish([job for job in batch if job.is_done] if not is_committed else batch, own)

    def _fill(self, transaction: Transaction, batch: list[Job], own: Job | None) -> Job | None:
        """Run job after job. Return the one that lost the whole transaction, if one did."""
        conn = transaction.conn
        assert conn is not None
        now = monotonic()
        until = now + _LONGEST_BATCH
        while len(batch) < _MOST_JOBS and self._queue:
            job = locked(self._lock, self._claim, batch, own, now)
            if job is None:
                return None
            if not self._run_job(transaction, job, len(batch) > 1, own):
                return job
            now = monotonic()
            if now >= until or conn.touched:
                return None
        return None

    def _run_job(self, transaction: Transaction, job: Job, save: bool, own: Job | None) -> bool:
        """Run one job; tell whether the transaction goes on. The first of a batch needs no savepoint of its own."""
        conn = transaction.conn
        saved = False
        self.waits.append(monotonic() - job.since)
        if len(self.waits) > MOST_PENDING:
            self.waits = self.waits.folded()
        try:
            if save and not job.is_atomic:
                transaction.save()
                saved = True
            job.result = job.function(conn, *job.args)
            if transaction.is_lost:
                raise transaction.why_lost()[0]
            if transaction.inner:
                raise _left_open()
            if type(job.result) in NOT_BEGUN:
                raise not_run(job.function, job.result)
            if saved:
                transaction.release()
            return True
        except Exception as error:
            self._name_file(error)
            job.error = error
        except BaseException as error:
            if own is not None:
                job.at_home = job.alone = True
                raise
            job.error = error
        job.result = None
        transaction.inner = ()
        if transaction.is_lost:
            job.ended_all = not transaction.note_loss(job.error)
            return False
        try:
            if saved:
                transaction.undo()
            elif not job.is_atomic:
                transaction.begin_again()
        except (sqlite3.Error, PoolTimeout) as error:
            # if the savepoint is gone, the transaction that is open now is another one
            job.ended_all = saved and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR
            if job.ended_all:
                job.error.add_note(f"sqlitepool: {ended()}")
            transaction.break_up()
            return False
        return True

    def _name_file(self, error: Exception) -> None:
        name_file(error, self._writer.gate.database, "in a function that writes, or when it was committed")

    def _finish(self, done: list[Job], own: Job | None) -> None:
        """Tell the callers, and pass on the lead."""
        surely(self._lock, self._pass_on, done, own)
        for job in done:
            job.ring()

    def _interrupted(self, batch: list[Job], own: Job, committed: bool, interruption: BaseException) -> None:
        """See to the others' jobs when a leader was interrupted."""
        is_own = own in batch or own.is_done
        if committed:
            surely(self._lock, self._settle, batch)
        else:
            surely(self._lock, self._requeue, [job for job in batch if job is not own], False)
        own.is_done = True
        surely(self._lock, self._pass_on, [], own)
        for job in batch:
            if job is not own and job.is_done:
                job.ring()
        if is_own:
            interruption.add_note(_said(committed))

    # -- the background thread

    def _serve(self) -> None:
        """Lead for submitted jobs when nobody else does, and resolve futures. Nothing but the end of work ends it."""
        while locked(self._lock, self._await_work):
            try:
                self._resolve()
                while self._thread_leads:
                    self._run_for_nobody()
                    self._resolve()
            except BaseException:  # a callback that raised SystemExit, say
                logger.exception("an error on the thread that writes for %r", self._name)
                time.sleep(_AFTER_ERROR)

    def _run_for_nobody(self) -> None:
        batch: list[Job] = []
        transaction = Transaction(self._writer, None)
        try:
            self._run_batch(transaction, batch, None)
        except BaseException as error:  # nobody would see it
            committed = transaction.was_committed(error)
            try:
                transaction.end()
            finally:
                self._give_up(batch, committed, error)

    def _give_up(self, batch: list[Job], committed: bool, error: BaseException) -> None:
        """See to the jobs of a batch that came to an unheard-of end. Each time at least one is done with."""
        if committed:
            self._finish(batch, None)
            return
        failed = batch[-1] if batch else locked(self._lock, self._head)  # which was run last, or is why there was one
        if failed is not None and (batch or locked(self._lock, self._take_back_failed, failed)):
            failed.error = failed.error or error
            surely(self._lock, self._settle, [failed])
        surely(self._lock, self._requeue, batch, True)
        self._finish([] if failed is None else [failed], None)

    def _resolve(self) -> None:
        """Give the futures of settled jobs their results, in order."""
        while True:
            try:
                job = self._settled.popleft()
            except IndexError:
                return
            future = job.future
            assert future is not None
            future._take_back = None
            try:
                if future.set_running_or_notify_cancel():
                    if job.error is not None:
                        future.set_exception(job.error)
                    else:
                        future.set_result(job.result)
            finally:
                job.error = job.result = None
                locked(self._lock, self._note_resolved, job)


def _left_open() -> RuntimeError:
    return RuntimeError("the function ended before a write block that it had begun")


def _said(is_committed: bool) -> str:
    return f"sqlitepool: the write of this call has {'been' if is_committed else 'not been'} committed"
