"""What `test_pool_cost` counts with: calls, instructions, memory, and looks through the containers of a pool."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

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
