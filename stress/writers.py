"""Threads that write to one file, each waiting for its commit: how many commits, and who waits how long.

    pip install 'sqlitepool[stress]'
    python stress/writers.py                       # some 8 minutes; needs sqlitepool importable
    python stress/writers.py --quick --check       # half a minute; exit status 1 if a target is missed
    python stress/writers.py --json > figures.json

Every contestant writes rows of 100 bytes, one row a transaction, and counts a row when it is told that the row is
committed; at the end of each run all rows that were acknowledged must be in the file. In each round, and for each cell,
the contestants run one after another in a new random order, each on a new file. The figures are medians over the
rounds; a ratio is the median of the ratios within a round. Datasette's writers are tasks of an event loop, all others
are threads.

The last cells have 8 threads that read beside 8 that write. The readers are the same in all of them, blocks of
`Database.read()` with a point read; the writers are ours, or threads with connections of their own.

The folder must be on a real disk: where files are kept in memory a sync costs nothing, and nothing would be shown.
"""

import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _writers_peers as peers
from _crowd import Result, crowd
from _peers import Peer
from _writers_peers import BUSY_TIMEOUT, RUN_WRITE, WAYS, WRITE, Recorded, Written
from _writers_program import arguments, new_log, progress, run, takes_part
from _writers_report import Report, Target, longest, never, ratio, total

LEVELS = ("FULL", "NORMAL")
THREADS = (1, 8, 32)
READERS = WRITERS = 8
READER = "with pool.database.read() as connection:\n    connection.execute(POINT_READ, (7,)).fetchone()\n    HOLD"
HEAD_START = 0.1
"""Seconds for which the writers have been at it when the readers begin, and go on when they have ended."""


def writers_cell(threads: int, synchronous: str) -> str:
    return f"{threads} writing {'threads' if threads > 1 else 'thread'}, {synchronous}: commits"


def readers_cell(synchronous: str) -> str:
    return f"{READERS} readers beside {WRITERS} writers, {synchronous}: reads"


CROWD = writers_cell(32, "FULL")
BESIDE = {RUN_WRITE: f"beside {RUN_WRITE}", WRITE: f"beside {WRITE}", BUSY_TIMEOUT: f"beside {BUSY_TIMEOUT}"}
TARGETS = (
    Target("32 threads, FULL, run_write: times busy_timeout", 4, ratio(CROWD, RUN_WRITE, BUSY_TIMEOUT)),
    Target("32 threads, FULL, run_write: longest wait", 100, longest(CROWD, RUN_WRITE), at_most=True),
    Target("32 threads, FULL, write(): times busy_timeout", 0.9, ratio(CROWD, WRITE, BUSY_TIMEOUT)),
    Target("32 threads, FULL, write(): longest wait", 100, longest(CROWD, WRITE), at_most=True),
    *(
        Target(
            f"readers beside {name}, {synchronous}: times beside busy_timeout",
            0.8,
            ratio(readers_cell(synchronous), BESIDE[name], BESIDE[BUSY_TIMEOUT]),
        )
        for synchronous in LEVELS
        for name in (RUN_WRITE, WRITE)
    ),
    Target("errors of readers", 0, total("errors", BESIDE.values()), at_most=True),
    *never(),
)


def measure(report: Report, folder: Path, quick: bool) -> None:
    present = [name for name in WAYS if takes_part(name, folder, report)]
    cells = [(32, "FULL")] if quick else [(threads, synchronous) for synchronous in LEVELS for threads in THREADS]
    for number in range(report.rounds):
        progress(f"round {number + 1} of {report.rounds}")
        for threads, synchronous in cells:
            writers(report, present, folder, threads, synchronous)
        for synchronous in LEVELS:
            readers(report, present, folder, synchronous)


def writers(report: Report, present: Sequence[str], folder: Path, threads: int, synchronous: str) -> None:
    """Each contestant once, in a random order."""
    cell = writers_cell(threads, synchronous)
    for name in random.sample(present, len(present)):
        with new_log(folder) as path:
            report.add(cell, name, peers.write_all(name, path, synchronous, threads, report.seconds))


def readers(report: Report, present: Sequence[str], folder: Path, synchronous: str) -> None:
    """The same readers beside each of the writers."""
    cell = readers_cell(synchronous)
    for name in random.sample(list(BESIDE), len(BESIDE)):
        if name in present and RUN_WRITE in present:
            with new_log(folder) as path:
                reads, writes = read_beside(name, path, synchronous, report.seconds)
            report.add(cell, BESIDE[name], Written(**vars(reads)))
            report.add(f"The writers of: {cell.replace(': reads', '')}", name, writes)


def read_beside(name: str, path: str, synchronous: str, seconds: float) -> tuple[Result, Written]:
    way = WAYS[name](path, synchronous)
    reading: Any = way if isinstance(way, peers.Ours) else peers.OursWrite(path, synchronous)
    recorded = Recorded(way)
    results: list[Result] = []
    # closed here at the end: the readers use it too
    writing = Peer(name, lambda path: recorded, "pool.write()\nHOLD", None, lambda pool: None, "")
    length = seconds + 2 * HEAD_START
    thread = threading.Thread(target=lambda: results.append(crowd(writing, path, "pass", WRITERS, length)))
    thread.start()
    time.sleep(HEAD_START)
    use = READER.replace("POINT_READ", repr("SELECT text FROM log WHERE id = ?"))
    reads = crowd(Peer(name, lambda path: reading, use, None, lambda pool: None, ""), path, "pass", READERS, seconds)
    thread.join()
    way.close()
    if reading is not way:
        reading.close()
    return reads, peers.as_written(results[0], recorded, path)


# ---- the program


def main() -> int:
    return run(arguments(__doc__, 1.0), TARGETS, measure)


if __name__ == "__main__":
    sys.exit(main())
