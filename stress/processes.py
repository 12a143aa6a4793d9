"""Processes that write to one file: how many commits, who gets how much, and who waits how long.

    python stress/processes.py                     # some 3 minutes; needs sqlitepool importable, and nothing else
    python stress/processes.py --quick --check     # 20 seconds; exit status 1 if a target is missed
    python stress/processes.py --json > figures.json

Processes with a connection of their own and `busy_timeout`, which is how SQLite waits, against processes with a
`Database`. Each writes rows of 100 bytes, one row a transaction, and counts a row when it is committed; at the end of
each run all rows that were acknowledged must be in the file. A share is that of a process, not of a thread. The
figures are medians over the rounds; a ratio is the median of the ratios within a round.

The folder must be on a real disk: where files are kept in memory a sync costs nothing, and nothing would be shown.
"""

import multiprocessing
import random
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _writers_peers as peers
from _crowd import GRACE, Tally, crowd, summary
from _writers_peers import BUSY_TIMEOUT, RUN_WRITE, WAYS, WRITE, Recorded, Written
from _writers_program import arguments, new_log, progress, run, takes_part
from _writers_report import Report, Target, evenness, longest, never, ratio

LEVELS = ("FULL", "NORMAL")
PROCESSES = 4
THREADS = (1, 4)
CONTESTANTS = (BUSY_TIMEOUT, WRITE, RUN_WRITE)
NUMBERS = 10_000_000
"""Each process writes rows whose numbers begin so far from those of the one before."""
START_UP = 120.0
"""Seconds that a process may take until it is ready."""


def cell(threads: int, synchronous: str) -> str:
    each = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{PROCESSES} processes of {each}, {synchronous}: commits"


def targets_of(synchronous: str, name: str, least: float) -> tuple[Target, ...]:
    where, says = cell(1, synchronous), f"{PROCESSES} processes, {synchronous}, {name.removeprefix('sqlitepool ')}"
    return (
        Target(f"{says}: times busy_timeout", least, ratio(where, name, BUSY_TIMEOUT)),
        Target(f"{says}: smallest to largest share", 0.6, evenness(where, name)),
        Target(f"{says}: longest wait", 200, longest(where, name), at_most=True),
    )


TARGETS = (
    *targets_of("FULL", WRITE, 0.85),
    *targets_of("FULL", RUN_WRITE, 0.85),
    *targets_of("NORMAL", WRITE, 0.7),
    *targets_of("NORMAL", RUN_WRITE, 0.7),
    *never(),
)


def measure(report: Report, folder: Path, quick: bool) -> None:
    present = [name for name in CONTESTANTS if takes_part(name, folder, report)]
    cells = [(threads, synchronous) for threads in (THREADS[:1] if quick else THREADS) for synchronous in LEVELS]
    for number in range(report.rounds):
        progress(f"round {number + 1} of {report.rounds}")
        for threads, synchronous in cells:
            for name in random.sample(present, len(present)):
                with new_log(folder) as path:
                    result = write_in_processes(name, path, synchronous, threads, report.seconds)
                report.add(cell(threads, synchronous), name, result)


def write_in_processes(name: str, path: str, synchronous: str, threads: int, seconds: float) -> Written:
    context = multiprocessing.get_context("spawn")  # so that nothing is inherited
    barrier = context.Barrier(PROCESSES)
    pipes, processes = [], []
    for number in range(PROCESSES):
        ours, theirs = context.Pipe()
        first = (number + 1) * NUMBERS
        process = context.Process(
            target=write, args=(theirs, barrier, name, path, synchronous, threads, seconds, first), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    tallies, acknowledged, busy = [], list[int](), 0
    for pipe in pipes:
        tally = Tally(seconds)
        if pipe.poll(START_UP + seconds + 2 * GRACE):
            told = pipe.recv()
            tally.served, tally.longest, tally.errors, tally.error = told["tally"]
            acknowledged += told["acknowledged"]
            busy += told["busy"]
        else:
            tally.note(TimeoutError("a process never came back"))
        tallies.append(tally)
    for process in processes:
        process.join(GRACE)
        process.kill()
        process.join()
    return Written(**vars(summary(tallies, seconds)), busy=busy, lost=peers.lost(path, acknowledged))


def write(
    pipe: Connection, barrier: Any, name: str, path: str, synchronous: str, threads: int, seconds: float, first: int
) -> None:
    """What each of the processes does. Its own threads start together; the processes do within some ms."""
    way = WAYS[name](path, synchronous)
    recorded = Recorded(way, first)
    recorded.write()
    barrier.wait(START_UP)
    result = crowd(peers.as_peer(name, recorded), path, "pass", threads, seconds)
    tally = (round(result.rate * seconds), result.longest, result.errors, result.error)
    pipe.send({"tally": tally, "acknowledged": recorded.acknowledged, "busy": len(recorded.busy)})


def main() -> int:
    return run(arguments(__doc__, 2.0), TARGETS, measure)


if __name__ == "__main__":
    sys.exit(main())
