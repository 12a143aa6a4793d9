"""Many threads, four connections: who gets how much, and who waits how long. sqlitepool and its peers, in one run.

    pip install sqlalchemy DBUtils peewee matplotlib
    python stress/contention.py                          # some 11 minutes; needs sqlitepool importable
    python stress/contention.py --quick --check          # 15 seconds; exit status 1 if a target is missed
    python stress/contention.py --json > figures.json    # all figures of all rounds
    python stress/contention.py --replay figures.json --markdown --plot docs/performance

Each cell of the table is a number of threads and what they do with a connection while they hold it. In each round, and
for each cell, the contestants run one after another in a new random order. The figures are medians over the rounds; a
ratio is the median of the ratios within a round, so that a machine that is slow for a while is slow for all.
docs/performance.md says what is measured and why the results are as they are.
"""

import argparse
import os
import platform
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _peers as peers
from _contention_report import HOLDS, NOTHING, READ, WORK, Report, as_markdown, as_text, judge
from _crowd import crowd, median

CONTESTANTS = (
    peers.CONNECTION_POOL,
    peers.SQLALCHEMY_QUEUE_POOL,
    peers.DBUTILS_POOLED_DB,
    peers.PEEWEE_POOLED,
    peers.STDLIB_LIFO_QUEUE,
    peers.CONNECTION_PER_THREAD,
)
THREADS = (1, 4, 8, 16, 64, 256)
CELLS = [(hold, threads) for hold in HOLDS for threads in THREADS]
# enough to judge every target
QUICK_CELLS = [(NOTHING, 16), (READ, 16), (READ, 64), (READ, 256), (WORK, 64)]

EQUAL_SHARE_THREADS = 64
MANY_IDLE = 1000


def machine() -> dict[str, Any]:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return {
        "python": platform.python_version(),
        "gil": gil,
        "sqlite": sqlite3.sqlite_version,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def measure(options: argparse.Namespace, path: str) -> Report:
    report = Report(machine(), options.rounds, options.seconds)
    # a connection in WAL mode has two files open
    enough_files = allow_open_files(MANY_IDLE * 2 + 200)
    present = [peer for peer in CONTESTANTS if takes_part(peer, path, report)]
    measure_cells(report, present, QUICK_CELLS if options.quick else CELLS, path)
    report.equal_share_seconds = 1.0 if options.quick else 5.0
    for peer in present:
        if peer.name == peers.OURS or (peer.bounded and not options.quick):
            progress(f"equal share: {peer.name}")
            work = work_of(peer, WORK)
            report.equal_share[peer.name] = crowd(peer, path, work, EQUAL_SHARE_THREADS, report.equal_share_seconds)
    if enough_files:
        progress(f"{MANY_IDLE:,} idle items")
        measure_idle(report, path, 7 if options.quick else 15, 0.01 if options.quick else 0.02)
    else:
        report.problems.append(f"{MANY_IDLE:,} idle items not measured: this process may not open so many files")
    runs = [
        (f"{name}, {threads} threads, {hold}", median(all_)) for (hold, threads, name), all_ in report.cells.items()
    ]
    runs += [(f"{name}, equal shares", result) for name, result in report.equal_share.items()]
    report.problems += [f"{run}: {one.errors} errors, such as {one.error}" for run, one in runs if one.errors]
    return report


def takes_part(peer: peers.Peer, path: str, report: Report) -> bool:
    try:
        peer.close(peer.open(path))
    except ModuleNotFoundError as error:
        report.problems.append(f"{peer.name} is missing: {error}")
        return False
    except Exception as error:  # one that fails is named, and the others go on
        report.problems.append(f"{peer.name} failed: {type(error).__name__}: {error}")
        return False
    return True


def measure_cells(report: Report, present: list[peers.Peer], cells: list[tuple[str, int]], path: str) -> None:
    turn = list(present)
    order = random.Random()
    started = time.monotonic()
    steps = report.rounds * len(cells)
    for step in range(steps):
        hold, threads = cells[step % len(cells)]
        left = (time.monotonic() - started) / step * (steps - step) / 60 if step else 0.0
        to_go = f", {left:.0f} minutes to go" if left >= 1 else ""
        progress(f"round {step // len(cells) + 1} of {report.rounds}: {threads} threads, {hold}{to_go}")
        order.shuffle(turn)
        for peer in turn:
            result = crowd(peer, path, work_of(peer, hold), threads, report.seconds)
            report.cells.setdefault((hold, threads, peer.name), []).append(result)


def work_of(peer: peers.Peer, hold: str) -> str:
    assert peer.read is not None
    return {NOTHING: "pass", READ: peer.read, WORK: "sleep(0.001)"}[hold]


# ---- many idle items


CHECKOUTS = """
    def batch(times, pool=pool):
        for _ in range(times):
            with pool.connection():
                pass
"""


def measure_idle(report: Report, path: str, rounds: int, seconds: float) -> None:
    """What a checkout costs one thread when few items are idle, and when many are, taking turns."""
    from sqlitepool import ConnectionPool, Pool

    kinds: dict[str, Callable[[int], Any]] = {
        "Pool": lambda size: Pool(peers.Plain, max_size=size),
        "ConnectionPool": lambda size: ConnectionPool(path, max_size=size),
    }
    for kind, make in kinds.items():
        with make(peers.POOL_SIZE) as few, make(MANY_IDLE) as many:
            batches = []
            for pool, size in ((few, peers.POOL_SIZE), (many, MANY_IDLE)):
                for item in [pool.acquire() for _ in range(size)]:
                    pool.release(item)
                batches.append(peers.pasted(CHECKOUTS, {"pool": pool}))
            times = peers.calibrate(batches[0], seconds)
            report.idle[kind] = [pair(batches, times, first=number % 2) for number in range(rounds)]


def pair(batches: list[Any], times: int, first: int) -> tuple[float, float]:
    took = [0.0, 0.0]
    for which in (first, 1 - first):
        took[which] = peers.timed(batches[which], times) / times * 1e6
    return took[0], took[1]


def allow_open_files(wanted: int) -> bool:
    """Raise this process's own limit of open files if need be; tell whether there are enough."""
    try:
        import resource
    except ModuleNotFoundError:  # not Unix: no such limit
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft == resource.RLIM_INFINITY or soft >= wanted


# ---- the program


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each contestant runs in each cell (default: 5)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="how long it runs each time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="few cells, 3 rounds of 0.1 s")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="measure nothing: take the figures of an earlier --json"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json", action="store_true", help="print all figures as one JSON object instead of the tables"
    )
    output.add_argument("--markdown", action="store_true", help="print the tables as docs/performance.md has them")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="also draw plots there (needs matplotlib)")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    if options.quick:
        options.rounds, options.seconds = 3, 0.1
    if options.plot:
        try:
            import _plots
        except ModuleNotFoundError as error:
            parser.error(f"--plot needs matplotlib (pip install matplotlib): {error}")

    if options.replay:
        report = Report.from_json(options.replay.read_text())
    else:
        progress(f"Python {sys.version}")
        with tempfile.TemporaryDirectory(prefix="sqlitepool-contention-") as folder:
            path = str(Path(folder, "users.db"))
            peers.create_database(path)
            report = measure(options, path)
    print(report.as_json() if options.json else as_markdown(report) if options.markdown else as_text(report))
    if options.plot:
        for drawn in _plots.draw(report, options.plot):
            progress(f"drawn: {drawn}")
    ours_failed = any(problem.startswith(peers.OURS) for problem in report.problems)
    missed = any(not verdict.met for verdict in judge(report))
    return 1 if ours_failed or (options.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
