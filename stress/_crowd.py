"""Many threads at one pool for a while, and what each of them got.

All threads are started, and have used the pool once, before the clock runs. A wait lasts from asking for a connection
to having it. A thread that still waits when time is up counts with its wait so far: one that starved during the whole
run shows with the whole run.
"""

import gc
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _peers import Peer, pasted

GRACE = 60.0
"""Seconds after the end of a run in which all threads must have come back, from a slow and busy disk too."""

ONCE = """
    def once():
        USE
"""

# The loop of a thread. The line USE becomes the peer's own way to take a connection, to HOLD it and to give it back.
LOOP = """
    def loop(window, tally, pool=pool, clock=perf_counter):
        served = 0
        longest = 0.0
        end = window.open()
        asked = clock()
        while True:
            try:
                while True:
                    USE
                    served += 1
                    waited = got - asked
                    if waited > longest:
                        longest = waited
                    asked = clock()
                break
            except Exception as error:
                tally.note(error)
                longest = max(longest, min(clock(), end) - asked)
                asked = clock()
                if asked >= end:
                    break
        tally.served = served
        tally.longest = max(longest, end - asked)
"""
HAVING = """got = clock()
if got >= end:
    break
WORK"""


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Attributes:
        rate: checkouts per second, of all threads together.
        longest: the longest wait of any thread, in seconds.
        smallest: what the thread served least got, as a share of what each would have got if all had got the same.
        largest: the same of the thread served most.
        errors: how many exceptions the threads saw, and threads that had not come back some time after the end.
        error: one of them.
    """

    rate: float
    longest: float
    smallest: float
    largest: float
    errors: int = 0
    error: str = ""


class Tally:
    """What one thread got. Until it has said so itself, that is nothing, and a wait of the whole run."""

    def __init__(self, seconds: float) -> None:
        self.served = 0
        self.longest = seconds
        self.errors = 0
        self.error = ""

    def note(self, error: BaseException) -> None:
        self.errors += 1
        self.error = f"{type(error).__name__}: {error}"


class Window:
    """The time that counts: the same for all threads, and not before each of them is ready."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.seconds = seconds
        self.start = 0.0
        # a margin, because a barrier lets threads go one after another
        self._margin = 0.01 + threads * 0.0002
        self._barrier = threading.Barrier(threads, action=self._set)

    def _set(self) -> None:
        self.start = time.perf_counter() + self._margin

    def open(self) -> float:
        """Wait until everybody is here and the clock runs; return when it ends."""
        self._barrier.wait()
        time.sleep(max(0.0, self.start - time.perf_counter()))
        return self.start + self.seconds

    def abort(self) -> None:
        """Let go those who wait for one that will not come."""
        self._barrier.abort()


def crowd(peer: Peer, path: str, work: str, threads: int, seconds: float) -> Result:
    """Have that many threads check out, do `work` and return, all the time, for `seconds`."""
    gc.collect()
    pool = peer.open(path)
    names: dict[str, Any] = {"pool": pool, "sleep": time.sleep, "perf_counter": time.perf_counter}
    once = pasted(ONCE, names, USE=peer.use, HOLD=work)
    loop = pasted(LOOP, names, USE=peer.use, HOLD=HAVING, WORK=work)
    window = Window(threads, seconds)
    tallies = [Tally(seconds) for _ in range(threads)]

    def thread(tally: Tally) -> None:
        try:
            once()
            loop(window, tally)
        except BaseException as error:
            tally.note(error)
            window.abort()

    # daemons, so that one that never comes back does not keep the program from ending
    running = [threading.Thread(target=thread, args=(tally,), daemon=True) for tally in tallies]
    for one in running:
        one.start()
    deadline = time.perf_counter() + seconds + GRACE
    for one in running:
        one.join(max(0.0, deadline - time.perf_counter()))
    left_behind = sum(one.is_alive() for one in running)
    if not left_behind:
        peer.close(pool)
    return summary(tallies, seconds, left_behind)


def summary(tallies: Sequence[Tally], seconds: float, left_behind: int = 0) -> Result:
    """Put together what the threads got in `seconds`."""
    served = [tally.served for tally in tallies]
    equal = statistics.fmean(served)
    error = next((tally.error for tally in tallies if tally.error), "")
    return Result(
        rate=sum(served) / seconds,
        longest=max(tally.longest for tally in tallies),
        smallest=min(served) / equal if equal else 0.0,
        largest=max(served) / equal if equal else 0.0,
        errors=sum(tally.errors for tally in tallies) + left_behind,
        error=error or (f"{left_behind} threads never came back" if left_behind else ""),
    )


def median(results: Sequence[Result]) -> Result:
    """The median of each figure over the rounds; errors are added up."""
    return Result(
        rate=statistics.median(one.rate for one in results),
        longest=statistics.median(one.longest for one in results),
        smallest=statistics.median(one.smallest for one in results),
        largest=statistics.median(one.largest for one in results),
        errors=sum(one.errors for one in results),
        error=next((one.error for one in results if one.error), ""),
    )


def median_ratio(ours: Sequence[Result], theirs: Sequence[Result]) -> float | None:
    """How many times the rate of theirs ours has: the median of the ratios within a round.

    A round in which nobody of theirs got anything, as may be in a short run on a busy machine, says nothing.
    """
    found = [a.rate / b.rate for a, b in zip(ours, theirs, strict=True) if b.rate]
    return statistics.median(found) if found else None
