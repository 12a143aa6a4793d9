"""Promise 3: bounded barging. A waiter is passed over for `fairness` seconds at most, and keeps its place."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from time import monotonic

import pytest
import storm
from pool_support import PATIENCE, Factory, Item, eventually, held, start
from storm import AnyPool, at_opcode, count_up, interrupt

from sqlitepool import Pool
from sqlitepool.waiting import Line, Waiter


@pytest.fixture
def only_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who waits looks around by itself: what is not handed out or notified is not seen."""
    monkeypatch.setattr("sqlitepool.lending._PATIENCE", 3600.0)


class Queue:
    """Callers that line up one after the other for the only item; `served` has their numbers in order of service."""

    def __init__(self, pool: Pool[Item]) -> None:
        self.pool = pool
        self.served: list[int] = []
        self.threads: list[Future[None]] = []

    def line_up(self, count: int) -> None:
        for _ in range(count):
            number = len(self.threads)
            self.threads.append(start(self._borrow, number))
            eventually(lambda: self.pool.stats().waiting == len(self.threads))

    def _borrow(self, number: int) -> None:
        with self.pool.connection():
            self.served.append(number)

    def join(self) -> None:
        for thread in self.threads:
            thread.result(PATIENCE)


@pytest.mark.parametrize("fairness", [0, 0.001])
@pytest.mark.usefixtures("only_wake_ups")
def test_waiters_are_served_in_order_once_the_longest_has_waited_for_fairness(fairness: float) -> None:
    pool = Pool(Factory(), max_size=1, fairness=fairness)
    queue = Queue(pool)
    with held(pool) as go:
        queue.line_up(8)
        threading.Event().wait(2 * fairness)
        go.set()
        queue.join()
    assert queue.served == list(range(8))


@pytest.mark.usefixtures("only_wake_ups")
def test_fairness_0_is_strict_fifo_even_for_who_asks_when_the_item_is_free() -> None:
    """The item comes back while somebody waits; who asks in that moment goes to the end of the line."""
    pool = Pool(Factory(), max_size=1, fairness=0)
    queue = Queue(pool)
    item = pool.acquire()
    queue.line_up(3)
    pool.release(item)
    with pool.connection():
        queue.served.append(-1)
    queue.join()
    assert queue.served == [0, 1, 2, -1]


@pytest.mark.usefixtures("only_wake_ups")
def test_before_fairness_a_caller_may_take_what_is_free() -> None:
    pool = Pool(Factory(), max_size=1, fairness=3600)
    queue = Queue(pool)
    item = pool.acquire()
    queue.line_up(1)
    # the waiter is woken, but until it runs the item is anybody's: the lock keeps it from running
    with pool._lock:
        pool.release(item)
        assert pool._line.woken is pool._line.head()
        assert pool.acquire() is item
    assert not queue.threads[0].done()
    assert pool.stats().waiting == 1
    pool.release(item)
    queue.join()


@pytest.mark.usefixtures("only_wake_ups")
def test_after_fairness_nobody_may_take_what_is_free() -> None:
    pool = Pool(Factory(), max_size=1, fairness=0.001)
    queue = Queue(pool)
    item = pool.acquire()
    queue.line_up(1)
    threading.Event().wait(0.002)
    with pool._lock:
        asker = start(pool.acquire)  # waits for the lock
        release = start(pool.release, item)
        threading.Event().wait(0.02)
    queue.join()
    release.result(PATIENCE)
    pool.release(asker.result(PATIENCE))
    assert queue.served == [0]


@pytest.mark.parametrize("fairness", [0, 0.005, 0.02])
@pytest.mark.usefixtures("only_wake_ups")
def test_no_waiter_starves_under_load(fairness: float) -> None:
    """Sixteen greedy threads, two items: everybody is served again and again, and nobody waits for half of the run.

    How long one waits is counted in what the others get meanwhile: that is the same on a slow and busy machine.
    """
    pool = Pool(Factory(), max_size=2, fairness=fairness)
    barrier = threading.Barrier(16)
    clock = itertools.count()

    def borrow() -> tuple[int, int]:
        barrier.wait(PATIENCE)
        end = monotonic() + 1.0
        count, worst = 0, 0
        while monotonic() < end:
            began = next(clock)
            with pool.connection():
                worst = max(worst, next(clock) - began)
                sum(range(200))
            count += 1
        return count, worst

    results = [thread.result(PATIENCE) for thread in [start(borrow) for _ in range(16)]]
    assert min(count for count, _ in results) > 10
    assert max(worst for _, worst in results) < next(clock) / 2
    assert pool.stats().waiting == 0


@pytest.mark.usefixtures("only_wake_ups")
def test_at_most_one_wake_up_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items come back before anybody wakes: one waiter is notified; who wakes notifies the next."""
    pool = Pool(Factory(), max_size=3, fairness=3600)
    items = [pool.acquire() for _ in range(3)]
    queue = Queue(pool)
    queue.line_up(3)
    woken = []
    line_class = type(pool._line)
    wake_head = line_class.wake_head

    def count(line):  # type: ignore[no-untyped-def]
        woken.append(line.head())
        wake_head(line)

    monkeypatch.setattr(line_class, "wake_head", count)
    with pool._lock:
        for item in items:
            pool.release(item)
        assert len(woken) == 1
        assert len(pool._idle) == 3
    queue.join()
    assert len(set(woken)) == len(woken) <= 3


@pytest.mark.usefixtures("only_wake_ups")
def test_a_wake_up_is_passed_on_when_its_waiter_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is woken and fails before it has taken the item: the next in line gets it."""
    pool = Pool(Factory(), max_size=1, fairness=3600)
    item = pool.acquire()
    reclaim = pool._reclaim
    all_wait = threading.Event()

    def fail() -> None:
        if threading.current_thread().name == "head":  # its time is up, but it is in the line still
            assert all_wait.wait(PATIENCE)
            pool.release(item)
            assert pool._line.woken is pool._line.head()
            raise LookupError("the head is interrupted")
        reclaim()

    monkeypatch.setattr(pool, "_reclaim", fail)
    head = start(pool.acquire, 0.01, name="head")
    eventually(lambda: pool.stats().waiting == 1)
    second = start(pool.acquire)
    eventually(lambda: pool.stats().waiting == 2)
    all_wait.set()
    with pytest.raises(LookupError):
        head.result(PATIENCE)
    assert second.result(PATIENCE) is item
    pool.release(item)
    assert pool.stats().waiting == 0


def test_an_item_that_returns_between_two_sleeps_of_a_waiter_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notification finds nobody asleep: the waiter must not go to sleep on it."""
    pool = Pool(Factory(), max_size=1, fairness=3600)
    item = pool.acquire()
    rounds, returned = 0, 0.0
    reclaim = pool._reclaim
    main = threading.current_thread()

    def while_awake() -> None:
        nonlocal rounds, returned
        reclaim()
        if threading.current_thread() is not main:
            rounds += 1
            if rounds == 7:  # by now it would sleep for more than half a second
                pool.release(item)
                returned = monotonic()

    monkeypatch.setattr(pool, "_reclaim", while_awake)

    def borrow() -> float:
        with pool.connection():
            return monotonic()

    waiter = start(borrow)
    assert waiter.result(PATIENCE) - returned < 0.3


@pytest.mark.parametrize("fairness", [0, 3600])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("only_wake_ups")
def test_interrupted_at_any_opcode_of_its_return_a_thread_wakes_who_waits(fairness: float) -> None:
    """What came back is taken; what was lost by the interruption is found when somebody looks."""
    for number in count_up():
        pool: AnyPool = Pool(storm.Item, max_size=1, fairness=fairness)
        behind: list[Future[Item]] = []

        def borrow(pool: AnyPool = pool, behind: list[Future[Item]] = behind) -> None:
            with pool.connection():
                behind.append(start(pool.acquire))
                eventually(lambda: len(pool._line) == 1)

        seen = at_opcode(number, interrupt, borrow)
        eventually(lambda pool=pool: not (pool._idle and pool._line))  # type: ignore[misc]
        pool.stats()
        if behind:
            pool.release(behind[0].result(PATIENCE))
        if seen < number:
            break
    assert number > 90, "hardly anything was interrupted"


def test_in_a_long_line_the_bound_is_longer_in_proportion() -> None:
    lock = threading.RLock()
    line: Line[Item] = Line(2.0)
    waiters: list[Waiter[Item]] = [Waiter(lock, 100.0) for _ in range(65)]
    assert line.overdue_at == float("inf")
    for waiter in waiters:
        line.join(waiter)
    assert line.overdue_at == 102.0, "it is worked out when a waiter becomes the first"
    bounds = []
    for waiter in waiters:
        line.leave(waiter)
        bounds.append(line.overdue_at - 100.0)
    assert bounds[0] == 4.0, "64 wait"
    assert bounds[16] == 3.0, "48 wait"
    assert bounds[32:-1] == [2.0] * 32
    assert bounds[-1] == float("inf")
