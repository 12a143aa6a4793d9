"""Proof that nobody can go on: every item is held by a `with` block of a thread that waits for the pool itself.

Which thread took an item proves nothing, since leases move between threads: a web framework may enter a generator on
one thread and leave it on another, while the first serves somebody else. What proves it is the stack: a `with` block
can end only when the frame that entered it goes on, and a frame on the stack of a waiting thread can go on only when
the wait ends.

A block is known by the `id` of its frame. That is exact as long as the block was entered by a `with` statement of that
very frame: then the frame lives until the block is left, and while it lives no other frame has its `id`. A lease that
something else entered (`ExitStack.enter_context`) is never part of a proof; there a timeout has to do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import TypeVar

from sqlitepool.errors import PoolDeadlock
from sqlitepool.lease import Slot
from sqlitepool.waiting import Waiter

T = TypeVar("T")


def find_circle(
    slots: Iterable[Slot[T]], line: Iterable[Waiter[Slot[T]]]
) -> tuple[Waiter[Slot[T]], PoolDeadlock] | None:
    """Return the waiter that closed the circle, and its error; None if somebody can still go on.

    Needs the pool's lock. The caller's own stack is looked at first: only who holds something has closed a circle, and
    only then the stacks of all who wait are worth the walk.
    """
    missing: dict[int, list[Slot[T]]] = {}
    for slot in slots:
        if not slot.loan or not slot.frame:
            return None
        missing.setdefault(slot.frame, []).append(slot)
    if missing.keys().isdisjoint(_frame_ids(sys._getframe())):
        return None
    for held in missing.values():
        for slot in held:
            if not slot.is_of_with_block:
                return None
    stacks = sys._current_frames()
    last: Waiter[Slot[T]] | None = None
    blocks: list[str] = []
    try:
        for waiter in line:
            for frame_id in _frame_ids(stacks.get(waiter.thread_id)):
                for slot in missing.pop(frame_id, ()):
                    blocks.append(slot.where)
                    last = waiter
    finally:
        stacks.clear()  # it holds this very frame: a cycle that would keep the frames of all threads alive
    if missing or last is None:
        return None
    places = "; ".join(blocks)
    return last, PoolDeadlock(
        "this thread waits for an item while every item is held by a `with` block that cannot end before a wait like "
        f"this one does. The blocks began at {places}. Pass the item on instead of taking a second one, or make the "
        "pool larger"
    )


def refuse_to_wait_for_own_block(slots: Iterable[Slot[T]]) -> None:
    """See to it that nobody waits for ever for the end of a `with` block that it is inside of.

    Needs the pool's lock.

    Raises:
        PoolDeadlock: an item is lent to a block that encloses this call.
    """
    mine = set(_frame_ids(sys._getframe()))
    for slot in slots:
        if slot.loan and slot.frame in mine and slot.is_of_with_block:
            raise PoolDeadlock(f"this call waits for the end of the block around it, which began at {slot.where}")


def _frame_ids(frame: FrameType | None) -> list[int]:
    """Return the `id` of each frame of a stack, the innermost first. Holds on to none of them."""
    ids = []
    while frame is not None:
        ids.append(id(frame))
        frame = frame.f_back
    return ids
