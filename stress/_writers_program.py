"""What stress/writers.py and stress/processes.py share as programs: options, folders, and the end."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from _writers_peers import OURS, create_log, file_system, syncs_for_nothing, write_all
from _writers_report import Report, Target, as_markdown, as_text, judge, machine


def takes_part(name: str, folder: Path, report: Report) -> bool:
    """Try a contestant; one that is missing or fails is named, and the others go on."""
    try:
        with new_log(folder) as path:
            tried = write_all(name, path, "NORMAL", 1, 0.01)  # nothing, on a busy machine, is no failure
        if tried.errors:
            raise RuntimeError(tried.error)
    except ModuleNotFoundError as error:
        report.problems.append(f"{name} is missing: {error}")
        return False
    except Exception as error:
        report.problems.append(f"{name} failed: {type(error).__name__}: {error}")
        return False
    return True


@contextmanager
def new_log(folder: Path) -> Iterator[str]:
    """Make a database for one run, in a folder that is gone at its end."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = str(Path(own, "log.db"))
        create_log(path)
        yield path


def note_errors(report: Report) -> None:
    for (cell, name), results in report.cells.items():
        errors = [one for one in results if one.errors]
        if errors:
            report.problems.append(
                f"{name}, {cell}: {sum(one.errors for one in errors)} errors, such as {errors[0].error}"
            )


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def arguments(text: str | None, seconds: float) -> argparse.ArgumentParser:
    """The options of this program and of stress/processes.py."""
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant runs in each cell")
    parser.add_argument("--seconds", type=float, default=seconds, help="how long it runs each time")
    parser.add_argument("--folder", help="where the databases are (default: the temporary folder)")
    parser.add_argument("--quick", action="store_true", help="the cells that have targets, 3 short rounds")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print all figures as one JSON object instead of tables")
    output.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    return parser


def run(
    parser: argparse.ArgumentParser,
    targets: Sequence[Target],
    measure: Callable[[Report, Path, bool], object],
) -> int:
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    if options.quick:
        options.rounds, options.seconds = 3, 0.5
    progress(f"Python {sys.version}")
    with tempfile.TemporaryDirectory(prefix="sqlitepool-writers-", dir=options.folder) as folder:
        kind = file_system(folder)
        report = Report(machine(kind), options.rounds, options.seconds)
        if syncs_for_nothing(kind):
            report.problems.append(f"{folder} is on a {kind}, where a sync costs nothing: choose another with --folder")
        measure(report, Path(folder), options.quick)
        note_errors(report)
    if options.json:
        print(report.as_json(targets))
    else:
        print(as_markdown(report, targets) if options.markdown else as_text(report, targets))
    verdicts = judge(report, targets)
    ours_failed = any(problem.startswith(OURS) for problem in report.problems)
    wrong = ours_failed or any(verdict.met is False and verdict.limit == "at most 0" for verdict in verdicts)
    return 1 if wrong or (options.check and any(not verdict.met for verdict in verdicts)) else 0
