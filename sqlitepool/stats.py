"""What a pool tells of itself: frozen dataclasses, and the tally that feeds them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from math import frexp

# Bucket e holds durations in [2**(e-1), 2**e) seconds, for e from -31 (half a nanosecond) to 32 (a century). A negative
# index counts from the end of the list, as Python's do: recording needs no arithmetic.
_BUCKETS = 64
_SHORTEST = 2.0**-32


# So many durations are kept as they come: sorting and counting many at once is five times as fast as one by one.
MOST_PENDING = 256


class Tally(list[float]):
    """Durations as they come, appended by one thread at a time: whoever owns the slot, or holds the lock.

    A list of those that came last, on top of the counts of those before. When the list is longer than `MOST_PENDING`,
    its owner puts `folded()` in its place; that is one step, so whoever reads meanwhile misses nothing and counts
    nothing twice.

        tally.append(seconds)
        if len(tally) > MOST_PENDING:
            tally = tally.folded()
    """

    __slots__ = ("_counted",)

    def __init__(self, counted: Durations | None = None) -> None:
        self._counted = counted if counted is not None else Durations(0, 0.0, 0.0, (0,) * _BUCKETS)

    def folded(self) -> Tally:
        """Return an empty tally on top of all that was counted so far."""
        return Tally(self.durations())

    def durations(self) -> Durations:
        """Return all that was counted so far."""
        pending = sorted(self)
        if not pending:
            return self._counted
        buckets = list(self._counted.buckets)
        start, exponent = 0, frexp(max(pending[0], _SHORTEST))[1]
        while start < len(pending):
            end = bisect_left(pending, 2.0**exponent, start)
            buckets[exponent] += end - start
            start, exponent = end, exponent + 1
        return Durations(
            self._counted.count + len(pending),
            self._counted.total + sum(pending),
            max(self._counted.max, pending[-1]),
            tuple(buckets),
        )


@dataclass(frozen=True, slots=True)
class Durations:
    """How long something took, over the life of a pool. All times are seconds."""

    count: int
    total: float
    max: float
    buckets: tuple[int, ...] = field(repr=False)

    def __add__(self, other: Durations) -> Durations:
        return Durations(
            self.count + other.count,
            self.total + other.total,
            max(self.max, other.max),
            tuple(mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)),
        )

    @property
    def mean(self) -> float:
        """The average, 0.0 when nothing was counted."""
        return self.total / self.count if self.count else 0.0

    @property
    def p50(self) -> float:
        """The median, as exact as `quantile`."""
        return self.quantile(0.50)

    @property
    def p99(self) -> float:
        """What 99 of 100 stayed below, as exact as `quantile`."""
        return self.quantile(0.99)

    def quantile(self, q: float) -> float:
        """Return the duration, in seconds, that the share `q` of all stayed below; 0.0 when nothing was counted.

        Durations are counted in buckets that double in width, so the answer is an upper bound that is at most twice
        the true value, and never more than `max`.

        Args:
            q: the share, from 0.0 to 1.0.

        Raises:
            ValueError: `q` is outside that range.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"a quantile is a share from 0.0 to 1.0, not {q!r}")
        wanted, seen = q * self.count, 0
        for exponent in range(-_BUCKETS // 2 + 1, _BUCKETS // 2 + 1):
            seen += self.buckets[exponent]
            if seen and seen >= wanted:
                return min(2.0**exponent, self.max)
        return self.max


class Counts:
    """What a pool counts under its lock, until it becomes `PoolStats`. `checkouts` and `held` are of closed items."""

    __slots__ = ("checkouts", "closed", "discarded", "held", "opened", "reclaimed", "timeouts", "waits")

    def __init__(self) -> None:
        self.checkouts = self.timeouts = self.opened = self.closed = self.discarded = self.reclaimed = 0
        self.held = Tally().durations()
        self.waits = Tally()

    def count_wait(self, seconds: float) -> None:
        """Count a checkout that had to wait so long."""
        self.waits.append(seconds)
        if len(self.waits) > MOST_PENDING:
            self.waits = self.waits.folded()


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool at one moment. `idle + in_use + opening == size`, always; the counters are exact.

    Attributes:
        name: the pool's name.
        size: items alive, those being opened included; at most `max_size`.
        idle: items that nobody has.
        in_use: items lent, or on their way out of the pool or back into it.
        opening: items whose factory is running.
        waiting: callers that wait for an item.
        max_size: the bound.
        min_size: how many stay open however long they are idle.
        checkouts: how often an item was lent.
        timeouts: how often a caller got `PoolTimeout`.
        opened: how often the factory succeeded.
        closed: how many items were closed.
        discarded: how many of those were closed because they could not be lent again (`discard`, a failed reset or
            check), and not for their age or with the pool.
        reclaimed: items that their borrower lost without returning them and that the pool took back.
        wait_seconds: the waits of those checkouts that had to wait.
        held_seconds: how long items were lent.
    """

    name: str
    size: int
    idle: int
    in_use: int
    opening: int
    waiting: int
    max_size: int
    min_size: int
    checkouts: int
    timeouts: int
    opened: int
    closed: int
    discarded: int
    reclaimed: int
    wait_seconds: Durations
    held_seconds: Durations


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """One item on loan: who has it, since when, and which line took it.

    Attributes:
        thread_name: the name of the thread that took it (a lease may have moved on to another since).
        thread_id: that thread's `threading.get_ident()`.
        since: when it was taken, in seconds since the epoch, as `time.time()` counts.
        age: for how long it has been lent, in seconds.
        where: `file:line in function` that took it.
    """

    thread_name: str
    thread_id: int
    since: float
    age: float
    where: str

    def __str__(self) -> str:
        return f"thread {self.thread_name!r} for {self.age:.3f} s, taken at {self.where}"


@dataclass(frozen=True, slots=True)
class GateHolder(LeaseInfo):
    """Who has the right to write: see `LeaseInfo`.

    Attributes:
        last_sql: the statement that was begun last, None if that is not known.
    """

    last_sql: str | None

    def __str__(self) -> str:
        said = LeaseInfo.__str__(self)
        return said if self.last_sql is None else f"{said}, last statement {self.last_sql!r}"


@dataclass(frozen=True, slots=True)
class DatabaseStats:
    """A `Database` at one moment.

    Attributes:
        name: the name of the database.
        readers: the pool of the readers.
        commits: how many transactions were committed.
        batches: how many of those were group commits (`run_write`, `submit`, `execute_write`, `executemany_write`).
        jobs: how many jobs were committed in them.
        queued: how many jobs wait in the queue.
        wait_seconds: how long each transaction waited for the right to write, from its call on.
        job_wait_seconds: how long each job waited to be run, from its call on.
        gate_waiting: how many threads of this process wait for the right to write to this file.
        holder: who in this process has the right to write, with its last statement; None if nobody has.
        wal_bytes: the size of the write-ahead log, 0 where there is none.
    """

    name: str
    readers: PoolStats
    commits: int
    batches: int
    jobs: int
    queued: int
    wait_seconds: Durations
    job_wait_seconds: Durations
    gate_waiting: int
    holder: GateHolder | None
    wal_bytes: int

    @property
    def mean_batch(self) -> float:
        """How many jobs a group commit had on average; 0.0 before the first."""
        return self.jobs / self.batches if self.batches else 0.0
