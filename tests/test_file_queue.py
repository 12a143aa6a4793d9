"""Processes that wait for the file lock are served in the order in which they came. See DESIGN 4."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from pool_support import PATIENCE, eventually, start

from sqlitepool import file_lock, file_queue
from sqlitepool.file_lock import FileLock
from sqlitepool.file_queue import CHAIRS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
by_open_file = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere these locks belong to the process, and one process cannot play several"
)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    path.touch()
    return path


@pytest.fixture
def look(database: Path) -> Iterator[Callable[[], str]]:
    """Return a function that tells which chairs are taken: 'x' for those that are."""
    lock = FileLock(str(database))
    lock.open()
    descriptor = lock._queue

    def is_taken(chair: int) -> bool:
        try:
            file_queue._lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, chair, 1)
        except BlockingIOError:
            return True
        file_queue._lock(descriptor, fcntl.LOCK_UN, chair, 1)
        return False

    yield lambda: "".join("x" if is_taken(chair) else "." for chair in range(CHAIRS))
    lock.close()


@pytest.fixture
def is_settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bool]:
    """Return a function that tells whether so many of this process sit in the queue, and nobody is on the move."""
    held: dict[int, set[int]] = {}
    lock = file_queue._lock

    def note(descriptor: int, operation: int, first: int, count: int) -> None:
        lock(descriptor, operation, first, count)
        change = set.difference_update if operation & fcntl.LOCK_UN else set.update
        change(held.setdefault(descriptor, set()), range(first, first + count))

    monkeypatch.setattr(file_queue, "_lock", note)
    return lambda count: (
        sorted(map(list, held.copy().values())) == [[]] * (len(held) - count) + [[chair] for chair in range(count)]
    )


def row(taken: int) -> str:
    return "x" * taken + "." * (CHAIRS - taken)


class Waiter:
    """Stands for a process: an open file lock of its own, and a thread that waits in the queue for the lock."""

    def __init__(self, database: Path, served: list[Waiter]) -> None:
        self.lock = FileLock(str(database))
        self.lock.open()
        self.served = served
        self.waiting: Future[None] = start(self.wait)

    def wait(self) -> None:
        self.lock.wait()
        self.served.append(self)

    def leave(self) -> None:
        self.waiting.result(PATIENCE)
        self.lock.unlock()

    def leave_and_wait_again(self) -> None:
        self.leave()
        assert not self.lock.try_to_queue(), "passed those who wait"
        self.waiting = start(self.wait)


@by_open_file
def test_who_waits_is_served_in_order(database: Path, is_settled: Callable[[int], bool]) -> None:
    """As many as there are chairs wait, and each goes to the end of the queue after its turn, for three rounds."""
    served: list[Waiter] = []
    waiters = []
    for number in range(CHAIRS + 1):
        waiters.append(Waiter(database, served))
        eventually(lambda number=number: len(served) == 1 and is_settled(number))
    for turn in range(3 * len(waiters)):
        waiters[turn % len(waiters)].leave_and_wait_again()
        eventually(lambda turn=turn: len(served) == turn + 2 and is_settled(CHAIRS))
    for number, waiter in enumerate(waiters):
        waiter.leave()
        eventually(lambda number=number: is_settled(max(0, CHAIRS - 1 - number)))
    assert served == waiters * 4


@by_open_file
def test_more_processes_than_chairs_are_all_served(database: Path, look: Callable[[], str]) -> None:
    served: list[Waiter] = []
    waiters = [Waiter(database, served) for _ in range(2 * CHAIRS)]
    for count in range(1, len(waiters) + 1):
        eventually(lambda count=count: len(served) == count)
        served[-1].leave()
    assert set(served) == set(waiters)
    assert look() == row(0)


@by_open_file
def test_a_queue_with_somebody_in_it_is_not_passed(database: Path, look: Callable[[], str]) -> None:
    served: list[Waiter] = []
    first, second = Waiter(database, served), FileLock(str(database))
    second.open()
    first.waiting.result(PATIENCE)
    assert not second.try_to_queue()
    assert not second.is_awaited
    waiter = Waiter(database, served)
    eventually(lambda: look() == row(1))
    assert not second.try_to_queue()
    assert second.is_awaited
    first.leave()
    waiter.leave()
    assert second.try_to_queue()
    assert not second.is_awaited
    assert look() == row(0)
    second.close()


SIT = """
import sys
sys.path[:0] = {path!r}
from sqlitepool.file_lock import FileLock
lock = FileLock({database!r})
lock.open()
{more}
print("here", flush=True)
lock.wait()
print("got it", flush=True)
sys.stdin.readline()
"""

#: Makes Linux refuse the locks that belong to an open file, as some sandboxes do.
OLD_LOCKS = """
from sqlitepool import file_queue
if sys.platform == "linux":
    file_queue._COMMANDS = {0: 9999, file_queue.LOCK_NB: 9999}
"""


def wait_in_another_process(database: Path, more: str = "") -> subprocess.Popen[str]:
    script = SIT.format(path=sys.path, database=str(database), more=more)
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert read(process) == "here\n"
    return process


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("more", ["", OLD_LOCKS], ids=["locks of the file", "locks of the process"])
def test_the_others_move_up_when_a_process_is_killed(database: Path, look: Callable[[], str], more: str) -> None:
    lock = FileLock(str(database))
    lock.open()
    assert lock.try_to_barge()
    processes = []
    for number in range(4):
        processes.append(wait_in_another_process(database, more))
        eventually(lambda number=number: look() == row(number + 1))
    for place in (2, 0):  # one in the middle, and the one who is next
        killed = processes.pop(place)
        killed.kill()
        killed.communicate()
        eventually(lambda: look() == row(len(processes)))
    assert not lock.try_to_queue()
    lock.unlock()
    for process in processes:
        assert read(process) == "got it\n"
        process.communicate("\n", timeout=PATIENCE)
        assert process.returncode == 0
    assert look() == row(0)
    lock.close()


@by_open_file
def test_who_may_only_read_the_files_waits_without_a_chair(
    database: Path, look: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FileLock(str(database))
    lock.open()
    with monkeypatch.context() as patch:
        patch.setattr(file_lock, "_open", lambda path, _: os.open(path, os.O_RDONLY))
        reader = FileLock(str(database))
        reader.open()
    assert lock.try_to_barge()
    assert not reader.try_to_queue()
    waiting = start(reader.wait)
    with pytest.raises(TimeoutError):
        waiting.result(0.1)
    assert look() == row(0)
    lock.unlock()
    waiting.result(PATIENCE)
    assert not lock.try_to_barge()
    reader.close()
    lock.close()


@by_open_file
def test_who_waits_in_vain_leaves_the_queue(
    database: Path, look: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    holder, waiter = FileLock(str(database)), FileLock(str(database))
    holder.open()
    waiter.open()
    assert holder.try_to_queue()
    monkeypatch.setattr(file_lock, "flock", fail)
    with pytest.raises(OSError, match="no locks available"):
        waiter.wait()
    assert look() == row(0)
    holder.close()
    waiter.close()
