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
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar

from sqlitepool.lease import Slot
from sqlitepool.limits import NEVER
from sqlitepool.waiting import Line, Waiter

T = TypeVar("T")

# Shared by their nature: not parts of an item, and doors to the whole program.
_SHARED = (type, ModuleType, CodeType, FrameType)
# Values, which nobody can use an item through.
_VALUES = frozenset((str, bytes, int, float, complex, bool, type(None)))
_MOST_PARTS = 200
# From Python 3.13 on, objects of such types show their attributes to the collector and not the `__dict__` around them.
_INLINE_VALUES = 1 << 2 if sys.version_info >= (3, 13) else 0


def _measure() -> int:
    thing = object()
    return sys.getrefcount(thing)


# What `getrefcount` says of a thing that nothing refers to.
_OF_A_CALL = sys.getrefcount(object())
# What `getrefcount` says of a thing that one local variable refers to: 2, or 1 where calls borrow (CPython 3.14).
_LOCAL = _measure()


def parts_at_first(item: object, base_id: int) -> dict[int, float]:
    """Return the `id` of each part of a new item, with how many references to it from elsewhere are no news.

    None for the item's own parts; as many as there are now for those that can be closed, such as a connection that the
    factory has entered in a list of its own; any number for what is shared with others (a logger, settings), and for
    what those refer to. "Elsewhere" is everything but the parts themselves. At most 200 are looked at.

    Args:
        item: the item, as the factory returned it.
        base_id: the `id` of what the pool itself refers to besides the item, see `Slot.base`.
    """
    counted = _count_from_elsewhere(item)
    known: dict[int, float] = {}
    shared = []
    for part, count in counted:
        known[id(part)] = count
        if part is not item and count > (id(part) == base_id) and not callable(getattr(type(part), "close", None)):
            shared.append(part)
    mine = (id(item), base_id)
    for part in shared:  # grows meanwhile
        known[id(part)] = NEVER
        for other in _referents(part):
            if known.get(id(other), NEVER) < NEVER and id(other) not in mine:
                known[id(other)] = NEVER
                shared.append(other)
    return known


def _count_from_elsewhere(item: object) -> list[tuple[object, int]]:
    """Return the parts of `item`, and how many references to each there are from elsewhere, the caller's included."""
    parts = [item]
    inside = {id(item): 0}
    for part in parts:
        for other in _referents(part):
            if id(other) in inside:
                inside[id(other)] += 1
            elif type(other) not in _VALUES and not isinstance(other, _SHARED) and len(parts) < _MOST_PARTS:
                inside[id(other)] = 1
                parts.append(other)
    item = part = other = None
    counted = []
    while parts:
        part = parts.pop()
        count = sys.getrefcount(part) - _LOCAL - inside[id(part)]
        counted.append((part, count))
    return counted


def _referents(part: object) -> list[Any]:
    if isinstance(part, FunctionType):  # a function refers to its whole module; what it can hold of an item is less
        return [x for x in (part.__closure__, part.__defaults__, part.__kwdefaults__) if x is not None]
    return gc.get_referents(part)


def lost_slots(
    slots: Iterable[Slot[T]], idle: Iterable[Slot[T]], index: Mapping[int, Slot[T]]
) -> list[tuple[Slot[T], bool]]:
    """Return the slots that nobody has: not idle, in no running call, held by no lease; and whose item is lost too.

    Args:
        slots: all slots of the pool, a set; needs the pool's lock.
        idle: those among them that are free.
        index: the pool's other book of them, by the `id` of their items.

    Returns:
        Each slot, and whether it was on loan.
    """
    resting = set(map(id, idle))
    every = list(slots)
    lost = []
    for slot in every:
        if id(slot) in resting:
            continue
        checkouts, on_loan = slot.checkouts, bool(slot.loan)
        booked = 2 + (index.get(id(slot.item)) is slot)  # in `slots`, in `every`, and perhaps in `index`
        borrower_is_gone = on_loan and slot.borrower is not None and slot.borrower.is_gone
        if sys.getrefcount(slot) - _LOCAL > booked and not borrower_is_gone:
            continue
        if (checkouts, on_loan) != (slot.checkouts, bool(slot.loan)):
            continue  # lent or returned while we looked: the quick way does not ask for the lock
        # Without a loan the slot was on its way in or out: that some borrower of before refers to the item is nothing.
        if not on_loan or not _is_held(slot):
            lost.append((slot, on_loan))
        elif not borrower_is_gone and slot.is_of_with_block:
            # The block has ended, or its frame would hold the lease. Who still refers to the item shall not share it.
            slot.condemn()
            lost.append((slot, on_loan))
    return lost


def _is_held(slot: Slot[T]) -> bool:
    """Tell whether anything but the slot refers to the item, or more than at first to a part of it."""
    at_first = slot.parts
    for part, count in _count_from_elsewhere(slot.item):
        if part is slot.item:
            if count > 1 + (slot.base is part):  # the slot itself refers to it
                return True
        elif count > at_first.get(id(part), 0 if type(part) is dict else NEVER):  # `vars(item)` may be new
            return True
        if type(part).__flags__ & _INLINE_VALUES and sys.getrefcount(vars(part)) - _OF_A_CALL > 1:
            return True
    return False


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
