"""What a request pays for its connection, through waitress and through Flask's test client: four ways, in one run.

    pip install 'sqlitepool[stress]'
    python stress/requests.py                      # a minute; exit status 1 if a target is missed
    python stress/requests.py --quick              # 10 seconds; exit status 1 only if one is missed by far
    python stress/requests.py --json > figures.json

A request is one point read. The ways: to open a connection for it, with the usual PRAGMAs, and to close it;
SQLAlchemy's QueuePool; a `Scope` over a `ConnectionPool`; one global connection without any safety, where all comes
from one thread. Each on a database with 300 tables, of which a new connection has to read the definitions, and on one
with a single table.

In each round the contestants take four short turns each, in new random orders. The figures are medians over the rounds;
"ours/it" is the median of the ratios within a round, so that a machine that is slow for a while is slow for all. Above
1 in requests per second, and below 1 in processor time, sqlitepool is ahead. p99 is what the clients see: the time that
a request waits for one of the threads counts.

"Busy" is processor time as a share of the run. The server should be near 100 %: if the clients are instead, it is they
who were measured. If neither is, other programs had the machine, and only the columns "CPU" (the serving process's time
for each request) are worth reading. Flask's test client runs in the thread of the application, and is a good part of
its request.
"""

import argparse
import gc
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import _peers as peers
from _requests_load import Clients, Turn, ask_test_client, served_by_waitress, summary
from _requests_report import FLASK, ONE_THREAD, SETTINGS, WAITRESS, Report, as_text, cell, judge, machine, median
from _requests_ways import OURS, WAYS, Way, create_databases

THREADS = {WAITRESS: 4, ONE_THREAD: 1}

TURNS = 4
"""In each round."""
MOSTLY = 0.85
"""From such a share of the run on a process is called busy."""

Ask = Callable[[float], Turn]
"""Has requests made for so many seconds."""


def measure(report: Report, folder: Path) -> None:
    with ExitStack() as opened:
        clients = opened.enter_context(closing(Clients()))
        cells: dict[str, dict[str, Ask]] = {}
        for schema, path in create_databases(folder).items():
            # As long as one is open the last close of a request is not that of the file, which costs a checkpoint.
            opened.enter_context(closing(peers.connect(path))).execute(peers.QUERY, (1,)).fetchone()
            ways = {name: way for name in WAYS if (way := take_part(name, path, report)) is not None}
            for way in ways.values():
                opened.callback(way.close)
            for setting, names in SETTINGS.items():
                asks = cells[cell(setting, schema)] = {}
                for name in names:
                    if name in ways:
                        prepare(asks, setting, ways[name], clients, opened, report)
        for number in range(report.rounds):
            progress(f"round {number + 1} of {report.rounds}")
            for where, asks in cells.items():
                gc.collect()
                turns: dict[str, list[Turn]] = {name: [] for name in asks}
                for _ in range(TURNS):
                    for name in random.sample(list(asks), len(asks)):
                        turns[name].append(asks[name](report.seconds / TURNS))
                for name, found in turns.items():
                    report.cells.setdefault((where, name), []).append(summary(found))


def take_part(name: str, path: str, report: Report) -> Way | None:
    """Open a contestant; one that is missing or fails is named, and the others go on."""
    try:
        way = WAYS[name](path)
        way.read(1)
        return way
    except ModuleNotFoundError as error:
        problem = f"{name} is missing: {error}"
    except Exception as error:
        problem = f"{name} failed: {type(error).__name__}: {error}"
    if problem not in report.problems:
        report.problems.append(problem)
    return None


def prepare(asks: dict[str, Ask], setting: str, way: Way, clients: Clients, opened: ExitStack, report: Report) -> None:
    """Have a way served as `setting` says, until `opened` is closed. One that cannot be is named."""
    try:
        if setting == FLASK:
            asks[way.name] = ask_test_client(way)
        else:
            threads = THREADS[setting]
            port = opened.enter_context(served_by_waitress(way.application(), threads))
            asks[way.name] = lambda seconds: clients.load(port, threads, seconds)
        asks[way.name](0.01)
    except Exception as error:
        asks.pop(way.name, None)
        report.problems.append(f"{way.name}, {setting}: {type(error).__name__}: {error}")


def note_doubts(report: Report) -> None:
    """Say where it was not the server that was measured."""
    found = [(median(results), f"{name}, {where}") for (where, name), results in report.cells.items()]
    report.problems += [f"{where}: the clients were the bottleneck" for one, where in found if one.client_busy > MOSTLY]
    least, where = min(((one.server_busy, where) for one, where in found), default=(1.0, ""))
    if least < MOSTLY and not report.quick:
        report.problems.append(
            f"Servers had a processor for no more than {least:.0%} of the time ({where}): other programs took their "
            "share, and the requests per second are not to be relied upon"
        )


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each contestant runs (default: 15)")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long it runs each time (default: 0.2)")
    parser.add_argument("--quick", action="store_true", help="5 rounds of 0.06 s; only what is far off is missed")
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object instead of tables")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    if options.quick:
        options.rounds, options.seconds = 5, 0.06
    report = Report(machine(), options.rounds, options.seconds, options.quick)
    with tempfile.TemporaryDirectory(prefix="sqlitepool-requests-") as folder:
        measure(report, Path(folder))
    note_doubts(report)
    print(report.as_json() if options.json else as_text(report))
    ours_failed = any(problem.startswith(OURS) for problem in report.problems)
    missed = any(verdict.met is False or (verdict.met is None and not options.quick) for verdict in judge(report))
    return 1 if ours_failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
