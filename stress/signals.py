"""Ctrl-C by the thousand: does a pool lose items, its lock or a wake-up when signal handlers raise anywhere?

    python stress/signals.py                 # 30 seconds; needs sqlitepool importable
    python stress/signals.py --quick         # until 10,000 handlers have raised in each case; some 10 seconds
    python stress/signals.py --seconds 600

The main thread borrows, opens and discards without pause while a timer interrupts it every 100 us or so; the handler
raises wherever the main thread happens to be, inside the pool more often than not. Four other threads borrow from the
same pool, which has two items, so somebody waits at all times. At the end the lock must be free, every item accounted
for, and both of them lent at the same time.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from sqlitepool import ConnectionPool, Pool

POOL_SIZE = 2
OTHERS = 4
ENOUGH = 10_000
PATIENCE = 30.0
"""Seconds: longer than anything takes that is not lost."""
PACKAGE = str(Path(Pool.connection.__code__.co_filename).parent)

AnyPool = Pool[Any]


class Struck(BaseException):
    """What the signal handler raises."""


class Item:
    """One borrower at a time may have it, and nobody after it is closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Storm:
    """Raises in the main thread, as long as that is inside `borrow`."""

    def __init__(self, pool: AnyPool, interval: float) -> None:
        self.pool = pool
        self.interval = interval
        self.raised = self.inside = 0

    def strike(self, number: int, frame: FrameType | None) -> None:
        inside = frame is not None and frame.f_code.co_filename.startswith(PACKAGE)
        while frame is not None:
            if frame.f_code is borrow.__code__:
                self.raised += 1
                self.inside += inside
                raise Struck
            frame = frame.f_back

    def run(self, seconds: float | None) -> None:
        stop = time.monotonic() + (seconds or float("inf"))
        chance = random.Random(1)
        signal.signal(signal.SIGALRM, self.strike)
        signal.setitimer(signal.ITIMER_REAL, self.interval, self.interval)
        try:
            while time.monotonic() < stop and (seconds or self.raised < ENOUGH):
                try:
                    borrow(self.pool, chance)
                except Struck:
                    pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def borrow(pool: AnyPool, chance: random.Random) -> None:
    for _ in range(100):
        way = chance.random()
        if way < 0.6:
            with pool.connection() as item:
                use(item)
        else:
            item = pool.acquire()
            use(item)
            if way < 0.8:
                pool.release(item)
            else:
                pool.discard(item)
        del item  # as long as a variable names an item, it is not lost


def use(item: Any) -> None:
    if isinstance(item, Item):
        assert not item.closed, "a closed item was lent"
    else:
        item.execute("SELECT 1").fetchone()


def find_problems(pool: AnyPool) -> list[str]:
    """Ask for everything that must hold when nobody uses the pool any more."""
    problems = []
    got: list[object] = []
    together = threading.Barrier(POOL_SIZE)

    def take() -> None:
        with pool.connection(timeout=PATIENCE) as item:
            got.append(item)
            use(item)
            together.wait(PATIENCE)

    def try_lock() -> None:
        if not pool._lock.acquire(timeout=PATIENCE):
            problems.append("the lock is held")
        else:
            pool._lock.release()

    def run(target: Any, times: int) -> None:
        threads = [threading.Thread(target=target, daemon=True) for _ in range(times)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)

    run(try_lock, 1)
    if problems:
        return problems
    stats = pool.stats()
    if stats.in_use or stats.opening or stats.waiting or stats.idle != stats.size or stats.size > POOL_SIZE:
        problems.append(f"not everything came back: {stats}")
    run(take, POOL_SIZE)
    if len(set(map(id, got))) != POOL_SIZE:
        problems.append(f"{len(set(map(id, got)))} of {POOL_SIZE} items could be borrowed at once")
    return problems


def storm(name: str, pool: AnyPool, interval: float, seconds: float | None) -> dict[str, Any]:
    stop = threading.Event()
    failures: list[str] = []
    borrowed = [0] * OTHERS

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            while not stop.is_set():
                borrow(pool, chance)
                borrowed[number] += 100
        except BaseException as error:
            failures.append(f"thread {number}: {error!r}")

    others = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(OTHERS)]
    for thread in others:
        thread.start()
    began = time.monotonic()
    blow = Storm(pool, interval)
    blow.run(seconds)
    stop.set()
    for thread in others:
        thread.join(PATIENCE)
        if thread.is_alive():
            failures.append("a thread still waits")
    took = time.monotonic() - began
    problems = failures or find_problems(pool)
    stats = pool.stats() if not problems else None
    return {
        "name": name,
        "raised": blow.raised,
        "in the pool": blow.inside,
        "borrowed by others": sum(borrowed),
        "found again": stats.reclaimed if stats else None,
        "seconds": round(took, 1),
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Raise from signal handlers while a pool is in use.")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long in all (default: 30)")
    parser.add_argument("--quick", action="store_true", help=f"only until {ENOUGH:,} handlers have raised in each case")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)  # of items found again: they are what this is about
    warnings.filterwarnings("ignore", ".*rolled back", RuntimeWarning)
    sys.setswitchinterval(0.0002)  # the main thread must run to be struck
    seconds = None if arguments.quick else arguments.seconds / 2
    with tempfile.TemporaryDirectory() as folder:
        results = [
            storm("Pool", Pool(Item, max_size=POOL_SIZE, timeout=PATIENCE), 0.0001, seconds),
            storm("ConnectionPool", ConnectionPool(Path(folder) / "app.db", max_size=POOL_SIZE), 0.0002, seconds),
        ]
    if arguments.json:
        print(json.dumps({"results": results}))
    else:
        columns = list(results[0])
        print(" | ".join(columns))
        for result in results:
            print(" | ".join(f"{result[column]!s:>{len(column)}}" for column in columns))
    return any(result["problems"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
