"""The write gate within one process: one at a time, fair, nothing lost. See DESIGN 4."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from gate_support import Holder, assert_sound, use
from pool_support import PATIENCE, eventually, least, start
from storm import PACKAGE, at_opcode, count_up, interrupt

from sqlitepool import file_lock
from sqlitepool.errors import PoolTimeout, WriteTimeout
from sqlitepool.gate import Gate

# An interruption inside a finalizer cannot be passed on; Python says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    path.touch()
    return path


@pytest.fixture(params=["file", "memory"])
def gate(request: pytest.FixtureRequest, database: Path) -> Gate:
    return Gate(str(database) if request.param == "file" else None)


@pytest.fixture
def only_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who waits looks around by itself: who is not woken does not wake."""
    monkeypatch.setattr("sqlitepool.gate._PATIENCE", 3600.0)


# -- one at a time, and fair


def test_only_one_thread_writes_at_a_time(gate: Gate) -> None:
    inside, most = 0, 0

    def write() -> None:
        nonlocal inside, most
        for _ in range(200):
            with gate.turn(monotonic() + PATIENCE):
                inside += 1
                most = max(most, inside)
                sum(range(100))
                inside -= 1

    for thread in [start(write) for _ in range(8)]:
        thread.result(PATIENCE)
    assert most == 1
    assert_sound(gate)


def line_up(gate: Gate, served: list[int], number: int) -> Future[None]:
    def write() -> None:
        with gate.turn(monotonic() + PATIENCE):
            served.append(number)

    thread = start(write)
    eventually(lambda: gate.waiting() == number + 1)
    return thread


@pytest.mark.usefixtures("only_wake_ups")
def test_threads_are_served_in_order_once_the_longest_has_waited_for_fairness(database: Path) -> None:
    gate = Gate(str(database), fairness=0.001)
    served: list[int] = []
    with Holder(gate):
        threads = [line_up(gate, served, number) for number in range(8)]
        threading.Event().wait(0.002)
    for thread in threads:
        thread.result(PATIENCE)
    assert served == list(range(8))


@pytest.mark.usefixtures("only_wake_ups")
def test_no_thread_starves_beside_greedy_ones(gate: Gate) -> None:
    """Nobody waits for half of the run, counted in what the others get meanwhile."""
    barrier = threading.Barrier(8)
    clock = itertools.count()

    def write() -> tuple[int, int]:
        barrier.wait(PATIENCE)
        end = monotonic() + 1.0
        count, worst = 0, 0
        while monotonic() < end:
            began = next(clock)
            with gate.turn():
                worst = max(worst, next(clock) - began)
                sum(range(500))
            count += 1
        return count, worst

    results = [thread.result(PATIENCE) for thread in [start(write) for _ in range(8)]]
    assert min(count for count, _ in results) > 5
    assert max(worst for _, worst in results) < next(clock) / 2
    assert_sound(gate)


def test_before_fairness_whoever_asks_may_go_first(database: Path) -> None:
    gate = Gate(str(database), fairness=3600)
    turn = gate.turn()
    turn.enter()
    served: list[int] = []
    waiting = line_up(gate, served, 0)
    with gate._lock:  # the waiter is woken, but cannot run
        turn.leave()
        turn.enter()
        assert served == []
    turn.leave()
    waiting.result(PATIENCE)


def test_after_fairness_nobody_goes_first(database: Path) -> None:
    gate = Gate(str(database), fairness=0.001)
    turn = gate.turn(0)
    turn.enter()
    served: list[int] = []
    waiting = line_up(gate, served, 0)
    threading.Event().wait(0.002)
    with gate._lock:
        turn.leave()
        with pytest.raises(WriteTimeout):
            turn.enter()
    waiting.result(PATIENCE)
    assert_sound(gate)


# -- deadlines


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_a_timeout_is_kept_to_the_tenth_of_a_second_and_names_the_holder(gate: Gate, seconds: float) -> None:
    errors: list[WriteTimeout] = []

    def time_out() -> float:
        began = monotonic()
        with pytest.raises(WriteTimeout) as raised, gate.turn(began + seconds):
            pass
        errors.append(raised.value)
        return monotonic() - began

    with Holder(gate):
        assert seconds <= least(time_out, seconds + 0.1) < seconds + 0.1
        holder = gate.holder()
        assert holder is not None
        assert (holder.thread_name, holder.last_sql) == ("the holder", "INSERT INTO t VALUES (1)")
    message = str(errors[0])
    assert isinstance(errors[0], PoolTimeout)
    assert "thread 'the holder' for 0." in message
    assert "gate_support.py:" in message
    assert "in hold_until, last statement 'INSERT INTO t VALUES (1)'" in message
    assert_sound(gate)


def test_a_deadline_in_the_past_takes_what_is_free(gate: Gate) -> None:
    for _ in range(2):
        with gate.turn(0):
            pass
    assert_sound(gate)


@pytest.mark.usefixtures("only_wake_ups")
def test_who_gives_up_passes_the_turn_on(gate: Gate) -> None:
    with Holder(gate):
        with pytest.raises(WriteTimeout):
            use(gate, 0.01)
        first = start(use, gate, 0.1)
        eventually(lambda: gate.waiting() == 1 or first.done())  # a busy machine may come too late to see it wait
        second = start(use, gate)
        with pytest.raises(WriteTimeout):
            first.result(PATIENCE)
    second.result(PATIENCE)
    assert_sound(gate)


# -- whose turn it is


def test_a_turn_may_be_ended_by_another_thread(gate: Gate) -> None:
    turn = gate.turn()
    start(turn.enter).result(PATIENCE)
    assert turn.is_held
    start(turn.leave).result(PATIENCE)
    assert not turn.is_held
    assert_sound(gate)


def test_a_turn_is_entered_once_at_a_time_and_left_as_often_as_one_likes(gate: Gate) -> None:
    turn = gate.turn(0)
    for _ in range(2):
        turn.enter()
        with pytest.raises(RuntimeError, match="already"):
            turn.enter()
        other = gate.turn(0)
        other.leave()
        assert turn.is_held
        turn.leave()
        turn.leave()
    assert_sound(gate)


def test_a_turn_ends_when_its_block_fails(gate: Gate) -> None:
    with pytest.raises(ZeroDivisionError), gate.turn():
        raise ZeroDivisionError
    assert_sound(gate)


@pytest.mark.usefixtures("only_wake_ups")
def test_a_turn_that_was_forgotten_ends(gate: Gate) -> None:
    gate.turn().enter()
    gc.collect()
    assert_sound(gate)
    turn = gate.turn()
    turn.enter()
    waiting = start(use, gate)
    eventually(lambda: gate.waiting() == 1)
    del turn
    waiting.result(PATIENCE)
    assert_sound(gate)


# -- interruptions


def use_block(gate: Gate) -> None:
    with gate.turn():
        pass


def use_turn(gate: Gate) -> None:
    turn = gate.turn(0)
    try:
        turn.enter()
    finally:
        turn.leave()


def use_twice(gate: Gate) -> None:
    with gate.turn(), pytest.raises(WriteTimeout), gate.turn(0):
        pass


def time_out(gate: Gate) -> None:
    with pytest.raises(WriteTimeout), gate.turn(monotonic() + 0.001):
        pass


Use = Callable[[Gate], None]


@pytest.mark.parametrize("opened_before", [True, False])
@pytest.mark.parametrize("what", [use_block, use_turn, use_twice])
def test_interrupted_at_any_opcode_the_gate_is_free(what: Use, opened_before: bool, gate: Gate) -> None:
    for number in count_up(1 if opened_before else 7):
        gate = Gate(gate.database)
        if opened_before:
            use(gate)
        seen = at_opcode(number, interrupt, partial(what, gate))
        assert_sound(gate)
        if seen < number:
            break
    assert number > 50, "hardly anything was interrupted"


def leave_when_somebody_waits(gate: Gate, got: threading.Event, done: threading.Event, behind: list[Any]) -> None:
    with gate.turn():
        got.set()
        while not done.is_set() and not gate.waiting():
            done.wait(0.0001)
        behind.append(start(use, gate, 10.0))
        eventually(lambda: done.is_set() or gate.waiting() >= 2)


@pytest.mark.parametrize("fairness", [0, 0.005])
@pytest.mark.parametrize("file", [PACKAGE, threading.__file__], ids=["in the gate", "in threading"])
@pytest.mark.usefixtures("only_wake_ups")
def test_interrupted_at_any_opcode_of_its_wait_a_thread_passes_its_turn_on(
    file: str, fairness: float, database: Path
) -> None:
    for number in count_up(5 if file == PACKAGE else 1):
        gate = Gate(str(database), fairness=fairness)
        got, done = threading.Event(), threading.Event()
        behind: list[Future[None]] = []
        holder = start(leave_when_somebody_waits, gate, got, done, behind)
        assert got.wait(PATIENCE)
        seen = at_opcode(number, interrupt, partial(use_block, gate), file)
        done.set()
        holder.result(PATIENCE)
        behind[0].result(PATIENCE)
        assert_sound(gate)
        if seen < number:
            break
    assert number > 50, "hardly anything was interrupted"


@pytest.mark.usefixtures("only_wake_ups")
def test_interrupted_at_any_opcode_while_another_process_writes_the_gate_is_free(database: Path) -> None:
    other = file_lock.FileLock(str(database))
    other.open()
    for number in count_up(7):
        gate = Gate(str(database))
        use(gate)
        assert other.try_to_queue()
        seen = at_opcode(number, interrupt, partial(time_out, gate))
        other.unlock()
        assert_sound(gate)
        if seen < number:
            break
    assert number > 90, "hardly anything was interrupted"
