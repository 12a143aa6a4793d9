"""What a checkout costs, counted and not timed: no scan that grows with idle items, loans or waiters is on its way.

Four measures, since each is blind to something: function calls, of Python and of C (blind to a loop in one function);
the interpreter's instructions (blind to `list(waiters)`, which is one); how often the pool's own containers are looked
through, told by stand-ins for them (blind to `set(slots)`, and to what is kept elsewhere); memory (sees copies only).
"""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from pool_support import PATIENCE, Clock, eventually, start

from sqlitepool import ConnectionPool, Pool


class Thing:
    """An item that nobody else keeps: it can be lost."""


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """It would strike some measurement with what others have asked it to call (`gc.callbacks`, finalizers)."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# -- counting


@dataclass
class Cost:
    """What one thread did in a stretch of work."""

    calls: Counter[str] = field(default_factory=Counter)
    instructions: int = 0

    def count_call(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self.calls[frame.f_code.co_qualname] += 1
        elif event == "c_call" and arg is not sys.setprofile:
            self.calls[arg.__qualname__] += 1


if sys.version_info >= (3, 12):
    _TOOL = 4
    _INSTRUCTION = sys.monitoring.events.INSTRUCTION
    _counting: dict[int, Cost] = {}  # by thread
    _switch = threading.Lock()

    def _count_instruction(code: object, offset: int) -> None:
        cost = _counting.get(threading.get_ident())
        if cost is not None:
            cost.instructions += 1

    def _count_instructions_from_here(cost: Cost) -> None:
        with _switch:
            if not _counting:
                sys.monitoring.use_tool_id(_TOOL, "test_pool_cost")
                sys.monitoring.register_callback(_TOOL, _INSTRUCTION, _count_instruction)
                sys.monitoring.set_events(_TOOL, _INSTRUCTION)
            _counting[threading.get_ident()] = cost

    def _count_instructions_to_here() -> None:
        with _switch:
            del _counting[threading.get_ident()]
            if not _counting:
                sys.monitoring.set_events(_TOOL, 0)
                sys.monitoring.register_callback(_TOOL, _INSTRUCTION, None)
                sys.monitoring.free_tool_id(_TOOL)

else:

    def _count_instructions_from_here(cost: Cost) -> None:
        def trace(frame: FrameType, event: str, arg: object) -> Any:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            cost.instructions += event == "opcode"
            return trace

        sys.settrace(trace)

    def _count_instructions_to_here() -> None:
        sys.settrace(None)


def measure(work: Callable[..., object], *arguments: object) -> Cost:
    """Count what `work(*arguments)` does in this thread."""
    cost = Cost()
    _count_instructions_from_here(cost)
    sys.setprofile(cost.count_call)
    try:
        work(*arguments)
    finally:
        sys.setprofile(None)
        _count_instructions_to_here()
    return cost


def peak(work: Callable[..., object], *arguments: object) -> int:
    """Return how many bytes `work(*arguments)` had allocated at most at a time: a copy of many things shows."""
    tracemalloc.start()
    try:
        work(*arguments)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work(*arguments)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def assert_no_growth(few: Cost, many: Cost, more: int) -> None:
    """Fail if `many` did something for each of the `more` things that there were: a call, or a turn of a loop."""
    grown = many.calls - few.calls
    assert grown.total() < more // 2, f"more calls: {dict(grown)}"
    assert many.instructions - few.instructions < more // 2


# -- telling scans

_LINEAR = (
    *("copy", "__copy__", "index", "count", "reverse", "sort", "insert", "rotate", "__eq__", "__ne__"),
    *("__add__", "__or__", "__ror__", "__and__", "__sub__", "__xor__", "union", "intersection", "difference"),
    *("symmetric_difference", "issubset", "issuperset", "isdisjoint"),
)
_LINEAR_WITHOUT_HASHES = ("__contains__", "remove")
_CONTAINERS = (list, dict, set, deque, OrderedDict)
_FOR_WALKING = ("__iter__", "__reversed__", "keys", "values", "items")


def watching(kind: Any, scans: list[str]) -> Any:
    """Return a subclass of `kind`, a container, that enters in `scans` whenever more than its first is looked at."""

    def tell(container: Any, method: str) -> None:
        caller = sys._getframe(2).f_code.co_qualname
        scans.append(f"{kind.__name__}.{method} of {len(container)} in {caller}")

    def walk(method: str) -> Callable[..., Iterator[Any]]:
        def walk_and_tell(self: Any) -> Iterator[Any]:
            for number, element in enumerate(getattr(kind, method)(self)):
                if number == 1:
                    tell(self, method)
                yield element

        return walk_and_tell

    def search(method: str) -> Callable[..., Any]:
        def search_and_tell(self: Any, *arguments: Any) -> Any:
            tell(self, method)
            return getattr(kind, method)(self, *arguments)

        return search_and_tell

    linear = _LINEAR if issubclass(kind, dict | set) else [*_LINEAR, *_LINEAR_WITHOUT_HASHES]
    methods: dict[str, Any] = {name: search(name) for name in linear if hasattr(kind, name)}
    methods |= {name: walk(name) for name in _FOR_WALKING if hasattr(kind, name)}
    if not kind.__dictoffset__:  # and so the layout stays the same
        methods["__slots__"] = ()
    return type(f"Watched{kind.__name__}", (kind,), methods)


def watch_containers(pool: Any, scans: list[str]) -> set[int]:
    """Watch all containers of the pool and of its objects; return the sizes of those watched.

    Python's own containers are replaced; those that are of a class of the pool become of another class.
    """
    sizes: set[int] = set()
    owners, seen = [pool], {id(pool)}
    for owner in owners:  # grows meanwhile
        slots = (name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ()))
        for name in [*getattr(owner, "__dict__", ()), *slots]:
            value: Any = getattr(owner, name, None)
            kind = type(value)
            if kind in _CONTAINERS:
                most = (value.maxlen,) if kind is deque else ()
                object.__setattr__(owner, name, watching(kind, scans)(value, *most))
            elif id(value) in seen or not kind.__module__.startswith("sqlitepool."):
                continue
            else:
                seen.add(id(value))
                owners.append(value)
                if not isinstance(value, _CONTAINERS):
                    continue
                value.__class__ = watching(kind, scans)
            sizes.add(len(value))
    return sizes


# -- what there may be many of


def idle_items(pool: Pool[Any], count: int) -> object:
    for item in [pool.acquire() for _ in range(count)]:
        pool.release(item)
    return None


def loans(pool: Pool[Any], count: int) -> object:
    return [pool.acquire() for _ in range(count)]


def lost_items(pool: Pool[Any], count: int) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        while pool.stats().reclaimed < count:
            pool.acquire()
    return None


def discarded_items(pool: Pool[Any], count: int) -> object:
    items = [pool.acquire() for _ in range(count)]
    for item in items:
        pool.discard(item)
    return items


def other_pools(pool: Pool[Any], count: int) -> object:
    return [Pool(Thing) for _ in range(count)]


# -- how to borrow


def in_a_block(pool: Pool[Any]) -> None:
    with pool.connection():
        pass


def by_acquire(pool: Pool[Any]) -> None:
    pool.release(pool.acquire())


def of_any(folder: Path) -> Pool[Any]:
    return Pool(Thing, max_size=2000)


def of_memory(folder: Path) -> Pool[Any]:
    return ConnectionPool(":memory:", max_size=2000)


def of_a_file(folder: Path) -> Pool[Any]:
    return ConnectionPool(folder / "app.db", max_size=2000)


BORROW = pytest.mark.parametrize("borrow", [in_a_block, by_acquire])
MANY = pytest.mark.parametrize(
    ("make_pool", "many", "count"),
    [
        (of_any, idle_items, 1000),
        (of_any, loans, 500),
        (of_any, lost_items, 900),
        (of_any, discarded_items, 300),
        (of_any, other_pools, 300),
        (of_memory, idle_items, 300),
        (of_memory, loans, 300),
        (of_a_file, idle_items, 60),
        (of_a_file, loans, 60),
    ],
)


@MANY
@BORROW
@pytest.mark.parametrize("pause", [0.0, 10.0], ids=["at once", "after a pause"])
def test_a_checkout_costs_the_same_however_many_there_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_pool: Callable[[Path], Pool[Any]],
    many: Callable[[Pool[Any], int], object],
    count: int,
    borrow: Callable[[Pool[Any]], None],
    pause: float,
) -> None:
    """After a pause a connection to a file is looked at more closely, which must not cost more either."""
    clock = Clock(monkeypatch)
    costs, memory = [], []
    for number in (4, count):
        with make_pool(tmp_path) as pool:
            kept = many(pool, number)
            for _ in range(3):
                borrow(pool)
            clock.now += pause
            costs.append(measure(borrow, pool))
            memory.append(peak(borrow, pool))
            for item in kept if many is loans and isinstance(kept, list) else ():
                pool.release(item)
    assert_no_growth(costs[0], costs[1], count - 4)
    assert memory[1] < memory[0] + 4 * (count - 4), "something was copied"


@MANY
@BORROW
def test_a_checkout_looks_through_nothing(
    tmp_path: Path,
    make_pool: Callable[[Path], Pool[Any]],
    many: Callable[[Pool[Any], int], object],
    count: int,
    borrow: Callable[[Pool[Any]], None],
) -> None:
    scans: list[str] = []
    with make_pool(tmp_path) as pool:
        kept = many(pool, count)
        borrow(pool)
        sizes = watch_containers(pool, scans)
        assert many is other_pools or max(sizes) >= count  # else it is kept where nobody watches
        borrow(pool)
        assert scans == []
        for item in kept if many is loans and isinstance(kept, list) else ():
            pool.release(item)


# -- waiting


def wait_and_measure(pool: Pool[Any]) -> Cost:
    items: list[object] = []
    cost = measure(lambda: items.append(pool.acquire(timeout=None)))
    pool.release(items.pop())
    return cost


def hand_over(pool: Pool[Any], others: int, before_the_last: Callable[[], object]) -> dict[str, Cost]:
    """Have callers wait for the only item, then return it to them; they pass it on, one to the next.

    Returns what it cost the first of them, who leaves the others behind, the last, who finds them before it, and the
    one who returned the item.
    """

    def wait_for_line(length: int) -> None:
        eventually(lambda: f" {length} waiting" in repr(pool))  # `stats()` would look through the line

    item = pool.acquire()
    first = start(wait_and_measure, pool)
    wait_for_line(1)
    between = [start(in_a_block, pool) for _ in range(others)]
    wait_for_line(others + 1)
    before_the_last()
    last = start(wait_and_measure, pool)
    wait_for_line(others + 2)
    returning = measure(pool.release, item)
    costs = {"first": first.result(PATIENCE), "last": last.result(PATIENCE), "returning": returning}
    for thread in between:
        thread.result(PATIENCE)
    return costs


@pytest.fixture
def _nobody_looks_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has waited for long looks for lost items and deadlocks. That is a scan, and the only one."""
    monkeypatch.setattr("sqlitepool.lending._PATIENCE", 3600.0)


@pytest.mark.parametrize("fairness", [0, 3600])
@pytest.mark.usefixtures("_nobody_looks_around")
def test_to_wait_and_to_be_served_costs_the_same_however_many_wait(fairness: float) -> None:
    costs = {}
    for others in (4, 64, 200):
        with Pool(Thing, max_size=1, timeout=None, fairness=fairness) as pool:
            costs[others] = hand_over(pool, others, lambda: None)
    for few, many in ((4, 64), (64, 200)):
        for role, cost in costs[few].items():
            assert_no_growth(cost, costs[many][role], many - few)


@pytest.mark.parametrize("fairness", [0, 3600])
@pytest.mark.usefixtures("_nobody_looks_around")
def test_waiters_are_served_without_a_look_through_the_line(fairness: float) -> None:
    scans: list[str] = []
    sizes: set[int] = set()
    with Pool(Thing, max_size=1, timeout=None, fairness=fairness) as pool:
        hand_over(pool, 20, lambda: sizes.update(watch_containers(pool, scans)))
        assert 21 in sizes  # the line
        assert scans == []
        pool.stats()  # looks through everything, which shows that scans are seen
        assert scans


# -- the quick way


@pytest.mark.parametrize(
    ("make_pool", "borrow", "most"),
    [
        (of_any, in_a_block, 20),
        (of_any, by_acquire, 26),
        (of_memory, in_a_block, 19),
        (of_memory, by_acquire, 26),
        (of_a_file, in_a_block, 19),
        (of_a_file, by_acquire, 26),
    ],
)
def test_the_quick_way_makes_no_more_calls_than_it_did(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_pool: Callable[[Path], Pool[Any]],
    borrow: Callable[[Pool[Any]], None],
    most: int,
) -> None:
    """Checkout and return, all calls of Python and C, two of which are `borrow` itself and the clock's.

    A call takes 30 to 100 ns, of some 1,000 for the whole. Whoever adds one here should know; whoever saves one may
    lower the figure.
    """
    Clock(monkeypatch)
    with make_pool(tmp_path) as pool:
        for _ in range(3):
            borrow(pool)
        cost = measure(borrow, pool)
    assert cost.calls.total() <= most, dict(cost.calls)
