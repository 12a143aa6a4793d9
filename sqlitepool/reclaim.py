"""Which items are lost: on the pool's books as lent, but in nobody's hands.

A lease object that died proves nothing, its borrower may have kept the item; a dead thread neither, it may have passed
the item on. What proves it is that nothing but the pool refers to the item: `sys.getrefcount` counts the references,
and those that the pool and the item itself hold are known. For an item that wraps others (a `UserDatabase` around its
connection) the same is asked of its parts, since somebody may have kept just the connection. In doubt an item counts
as held: to lend a thing twice is worse than to lose it.

The audit runs under the pool's lock, when somebody has to wait or asks for statistics; never on the quick way.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import TypeVar

from sqlitepool.lease import Slot
from sqlitepool.waiting import Line, Waiter

T = TypeVar("T")

# Shared by their nature: not parts of an item, and doors to the whole program.
_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, CodeType, FrameType)
_MOST_PARTS = 200


def _measure() -> int:
    thing = object()
    return sys.getrefcount(thing)


# What `getrefcount` says of a thing that one local variable refers to: 2, or 1 where calls borrow (CPython 3.14).
_LOCAL = _measure()


def parts_of(item: object) -> dict[int, int]:
    """Return the `id` of each object that `item` is made of, with the number of references to it from elsewhere.

    "Elsewhere" is everything but these objects themselves. At most 200 objects are looked at.
    """
    parts = [item]
    inside = {id(item): 0}
    for part in parts:
        for other in gc.get_referents(part):
            if id(other) in inside:
                inside[id(other)] += 1
            elif gc.is_tracked(other) and not isinstance(other, _SHARED) and len(parts) < _MOST_PARTS:
                inside[id(other)] = 1
                parts.append(other)
    item = part = other = None
    counts = dict.fromkeys(inside, 0)
    while parts:
        part = parts.pop()
        counts[id(part)] = sys.getrefcount(part) - _LOCAL - inside[id(part)]
    return counts


def lost_slots(slots: Iterable[Slot[T]], idle: Iterable[Slot[T]], index: Mapping[int, Slot[T]]) -> list[Slot[T]]:
    """Return the slots that nobody has: not idle, in no running call, held by no lease; and whose item is lost too.

    Args:
        slots: all slots of the pool, a set; needs the pool's lock.
        idle: those among them that are free.
        index: the pool's other book of them, by the `id` of their items.
    """
    resting = set(map(id, idle))
    every = list(slots)
    lost = []
    for slot in every:
        if id(slot) in resting:
            continue
        booked = 2 + (index.get(id(slot.item)) is slot)  # in `slots`, in `every`, and perhaps in `index`
        on_loan_to_nobody = bool(slot.loan) and slot.borrower is not None and slot.borrower.is_gone
        if sys.getrefcount(slot) - _LOCAL > booked and not on_loan_to_nobody:
            continue
        if slot.item is None or not _is_held(slot):
            lost.append(slot)
    return lost


def _is_held(slot: Slot[T]) -> bool:
    """Tell whether anything but the slot refers to the item, or to a part of it that was the item's own."""
    now = parts_of(slot.item)
    at_first = slot.parts
    if now.pop(id(slot.item)) > (1 if slot.base is not slot.item else 2):  # the slot itself refers to it
        return True
    return any(count > at_first.get(part, 0) for part, count in now.items())


def ghosts(line: Line[T]) -> list[Waiter[T]]:
    """Return the waiters whose thread has left without a word: only the line refers to them."""
    every = list(line)
    return [waiter for waiter in every if sys.getrefcount(waiter) - (waiter is line.woken) <= _ONLY_IN_LINE]


def _measure_waiter() -> int:
    line: OrderedDict[object, None] = OrderedDict([(_Sample(), None)])
    every = list(line)
    return next(sys.getrefcount(sample) for sample in every)


class _Sample:
    """Stands in for a waiter in the measurement."""


_ONLY_IN_LINE = _measure_waiter()
