"""A pool on a stage: what the tests of interleavings share.

`explore` runs a few threads again and again, each time in another order of their steps, and looks at the pool after
each run. The scheduler of `frontrun` decides at each access to something shared, inside the library too, which thread
goes on; so a run that failed can be repeated. Time stands still as long as any thread can go on, and when none can it
jumps to the next moment at which a sleep or a timeout ends. Hence the rule of these tests: seconds that pass on this
clock are seconds in which everybody slept, and if something was free meanwhile, a wake-up was lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import frontrun

from sqlitepool import Pool

T = TypeVar("T")
Worker = Callable[[Any], object]

# So many times as many runs of each test, for a search by hand.
DEEPER = int(os.environ.get("DEEPER", "1"))


class Item:
    """An item that notices when two use it at once, or one after its end."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.closed = False

    def use(self, user: str) -> None:
        self.users.append(user)
        assert self.users == [user], f"lent to {self.users} at the same time"
        assert not self.closed, "a closed item was lent"
        self.users.remove(user)


class Scene:
    """A pool, how many of its items are alive, and what the threads of one run leave for the check at its end.

    The lists are written with single steps (`append`, `remove`): the scheduler may change threads anywhere else.
    """

    def __init__(self, *, ready: int = 0, lent: int = 0, **options: Any) -> None:
        """Open `ready` items that are free, and `lent` items that nobody has returned yet."""
        self.alive: list[Item] = []
        self.sizes = [0]
        self.log: list[Any] = []
        self.began = time.monotonic()
        self.pool = Pool(self.open, close=self.close, name="stage", **options)
        items = [self.pool.acquire() for _ in range(lent + ready)]
        self.lent, free = items[:lent], items[lent:]
        for item in free:
            self.pool.release(item)

    def open(self) -> Item:
        item = Item()
        self.alive.append(item)
        self.sizes.append(len(self.alive))
        return item

    def close(self, item: Item) -> None:
        assert not item.closed, "closed twice"
        assert not item.users, "closed while in use"
        item.closed = True
        self.alive.remove(item)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far."""
        return time.monotonic() - self.began

    def borrow(self, user: str = "somebody", **options: Any) -> None:
        """Take an item in a block, use it, and note who had one and when."""
        with self.pool.connection(**options) as item:
            item.use(user)
            self.log.append((user, self.seconds))

    def take(self, **options: Any) -> None:
        """Take an item and keep it."""
        item = self.pool.acquire(**options)
        item.users.append("keeper")
        assert item.users == ["keeper"], "lent twice"
        assert not item.closed, "a closed item was lent"
        self.lent.append(item)

    def give_back(self) -> None:
        """Return an item that was taken."""
        item = self.lent.pop()
        item.users.clear()
        self.pool.release(item)

    def assert_sound(self, *, max_size: int, seconds: float = 0) -> None:
        """All threads ended after `seconds`, and what they kept is returned now: every slot is there and can be lent.

        `repr` describes the pool as it is; `stats()` would look for lost items first, and so hide that they were lost.
        """
        assert self.pool._lock.acquire(blocking=False), "the lock is held"
        self.pool._lock.release()
        assert self.seconds == seconds, f"all slept until {self.seconds} s"
        while self.lent:
            self.give_back()
        size = len(self.alive)
        assert size <= max_size, f"{size} items are left"
        assert repr(self.pool) == f"<Pool 'stage': size {size} of at most {max_size}, {size} idle, 0 waiting>"
        items = [self.pool.acquire(timeout=0) for _ in range(max_size)]
        assert len(set(map(id, items))) == max_size, "an item was lent twice"
        for item in items:
            item.use("the end")
            self.pool.release(item)


def explore(
    setup: Callable[[], T],
    workers: list[Worker],
    check: Callable[[T], object],
    *,
    runs: int = 12,
    at_random: int = 0,
) -> None:
    """Run `workers` on a fresh `setup()` in many orders, and `check` the scene after each.

    Args:
        runs: up to so many orders, twice, that differ in who comes first to something shared, at most two of the
            switches forced ("dynamic partial order reduction"). Whether a deque is empty is not seen as shared there.
        at_random: so many orders drawn by lot, in bursts of a few opcodes, which need not see what is shared.
    """

    def holds(scene: T) -> bool:
        check(scene)
        return True

    def search(threads: list[Worker], **options: Any) -> None:
        frontrun.explore(
            setup=setup,
            workers=threads,
            invariant=holds,
            clock="virtual",
            detect_io=False,
            timeout_per_run=30,
            deadlock_timeout=30,
            reproduce_on_failure=1,
            **options,
        ).assert_holds()

    for order in (workers, workers[::-1]):  # the first run lets each go on until it has to wait, in this order
        search(order, strategy="dpor", preemption_bound=2, max_executions=runs * DEEPER)
    if at_random:
        search(workers, strategy="random", max_attempts=at_random * DEEPER, max_ops=3000, seed=1)
