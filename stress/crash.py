"""Processes that write and are killed at random moments: what was acknowledged is there, and nothing is half there.

    python stress/crash.py                       # 200 rounds, some 40 seconds; needs sqlitepool importable
    python stress/crash.py --quick               # as many rounds as fit into 10 seconds
    python stress/crash.py --rounds 2000 --seed 7
    python stress/crash.py --json

In each round some processes write to one file, each with `run_write`, `submit` and `write()` in three threads, while a
fourth reads. Each write inserts a row into two tables; some raise between the two, on purpose. When a writer is told
that its row is committed, or that it is not, it writes that down in a file of its own before it goes on. At a random
moment one process is killed with SIGKILL, and the others must go on at once; or all are. Then a new process asks for
the right to write, and compares the database with what was written down. Each database lives through ten rounds.

Exit status 1 if anything was lost or half there; with `--check` also if somebody had to wait too long.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

from _writers_peers import file_system

from sqlitepool import Database

WRITERS = 3
ROUNDS_OF_A_DATABASE = 10
QUICK = 10.0
"""Seconds."""
AT_ONCE = 1.0
"""Seconds in which those who live must be able to write again."""
START_UP = 30.0
IN_FLIGHT = 8
REFUSED = 7
"""One in so many writes raises half way."""
SCHEMA = "CREATE TABLE a (id INTEGER PRIMARY KEY, text TEXT); CREATE TABLE b (id INTEGER PRIMARY KEY, text TEXT)"
RECORD = struct.Struct("q")


# ---- in the processes that are killed


class Refused(Exception):
    """Raised between the two halves of a write."""


def write_both(connection: sqlite3.Connection, number: int) -> None:
    connection.execute("INSERT INTO a VALUES (?, 'first half')", (number,))
    if number % REFUSED == 0:
        raise Refused
    connection.execute("INSERT INTO b VALUES (?, 'second half')", (number,))


class Writer:
    """One process: writes until it is killed.

    Args:
        notes: the file in which it writes down the numbers of the rows that were acknowledged; those of writes that
            were refused as negative numbers.
        first: the number of its first row.
    """

    def __init__(self, path: str, notes: str, durable: bool, first: int) -> None:
        self.database = Database(path, durable=durable)
        self.notes = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.first = first

    def run(self) -> None:
        for at, work in enumerate((self.run_write, self.write, self.submit)):
            numbers = count(self.first + at * 1_000_000)
            threading.Thread(target=fatal, args=(work, numbers), daemon=True).start()
        fatal(self.read)

    def note(self, number: int, call: Callable[[], object]) -> None:
        """Write down what became of a write, before anything else is done."""
        try:
            call()
        except Refused:
            number = -number
        os.write(self.notes, RECORD.pack(number))

    def run_write(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            self.note(number, partial(self.database.run_write, write_both, number))

    def write(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            self.note(number, partial(self._write_in_block, number))

    def _write_in_block(self, number: int) -> None:
        with self.database.write() as connection:
            write_both(connection, number)

    def submit(self, numbers: Iterator[int]) -> None:
        sent: deque[tuple[int, Future[None]]] = deque()
        for number in numbers:
            sent.append((number, self.database.submit(write_both, number)))
            if len(sent) == IN_FLIGHT:
                number, future = sent.popleft()
                self.note(number, future.result)

    def read(self) -> None:
        while True:
            with self.database.read() as connection:
                a, b = connection.execute("SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)").fetchone()
            if a != b:
                raise AssertionError(f"{a} first halves, {b} second halves")
            time.sleep(0.005)


def fatal(work: Callable[..., object], *args: object) -> None:
    """Run `work`; the process ends with it if it fails."""
    try:
        work(*args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


# ---- in the next process


def look(path: str, folder: Path, durable: bool) -> dict[str, Any]:
    """Write as whoever comes next does, then compare the file with what the writers wrote down."""
    asked = monotonic()
    with closing(Database(path, durable=durable)) as database:
        with database.write():
            waited = monotonic() - asked
        database.run_write(lambda connection: connection.execute("DELETE FROM a WHERE id < 0").rowcount)
    with closing(sqlite3.connect(path)) as connection:
        integrity = [line for (line,) in connection.execute("PRAGMA integrity_check")]
        a, b = ({number for (number,) in connection.execute(f"SELECT id FROM {table}")} for table in "ab")
    notes = {number for file in folder.glob("notes-*") for (number,) in RECORD.iter_unpack(whole(file))}
    acknowledged = {number for number in notes if number > 0}
    return {
        "waited": waited,
        "acknowledged": len(acknowledged),
        "refused": len(notes) - len(acknowledged),
        "lost": len(acknowledged - (a & b)),
        "half": len(a ^ b),
        "undead": len((a | b) & {-number for number in notes}),
        "corrupt": int(integrity != ["ok"]),
    }


def whole(file: Path) -> bytes:
    """What was written into a file: the last record may be cut short."""
    found = file.read_bytes()
    return found[: len(found) // RECORD.size * RECORD.size]


# ---- the program


@dataclass
class Report:
    """What came of all rounds. Numbers of rows, unless something else is said.

    Attributes:
        killed: processes.
        failed: processes that ended by themselves.
        half: rows of which one half is there.
        undead: rows that are there although their writer was told that they are not.
        corrupt: databases for which `integrity_check` was not "ok".
        survivors: seconds until the others went on, for each time that one of them was killed.
        next_process: seconds until the next process could write, for each round.
    """

    rounds: int = 0
    killed: int = 0
    acknowledged: int = 0
    refused: int = 0
    lost: int = 0
    half: int = 0
    undead: int = 0
    corrupt: int = 0
    failed: int = 0
    survivors: list[float] = field(default_factory=list)
    next_process: list[float] = field(default_factory=list)

    def wrong(self) -> bool:
        return bool(self.lost or self.half or self.undead or self.corrupt or self.failed or not self.acknowledged)

    def late(self) -> bool:
        return max(self.survivors + self.next_process, default=0.0) >= AT_ONCE


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a forked process. This one has no threads and has opened no database, so nothing is inherited."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    return pid


def answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` in a process of its own and return what it returns."""
    reading, writing = os.pipe()
    pid = forked(lambda: os.write(writing, json.dumps(work()).encode()))
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError("the process that comes next failed")
    found: dict[str, Any] = json.loads(said)
    return found


def create(path: str) -> dict[str, Any]:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)
    return {}


class Arena:
    """One database, and the processes that write to it."""

    def __init__(self, folder: Path, chance: random.Random, report: Report) -> None:
        self.folder, self.chance, self.report = folder, chance, report
        self.path = str(folder / "app.db")
        self.durable = chance.random() < 0.5
        self.started = count(1)
        answer(lambda: create(self.path))

    def start(self) -> tuple[int, Path]:
        number = next(self.started)
        notes = self.folder / f"notes-{number}"
        notes.touch()
        first = number * 10_000_000
        return forked(lambda: Writer(self.path, str(notes), self.durable, first).run()), notes

    def run(self, rounds: int, end: float) -> None:
        """Have some rounds, no more than that, until `end`, or until something is wrong."""
        found: dict[str, Any] = {}
        for _ in range(rounds):
            self.round()
            found = answer(lambda: look(self.path, self.folder, self.durable))
            self.report.rounds += 1
            self.report.next_process.append(found.pop("waited"))
            wrong = any(found[what] for what in ("lost", "half", "undead", "corrupt"))
            if wrong:
                print(f"round {self.report.rounds}: {found}", file=sys.stderr, flush=True)
            if wrong or monotonic() >= end:
                break
        for what, number in found.items():
            setattr(self.report, what, getattr(self.report, what) + number)

    def round(self) -> None:
        alive = dict(self.start() for _ in range(WRITERS))
        try:
            if self.chance.random() < 0.2:
                time.sleep(self.chance.uniform(0, 0.1))  # while they start
            else:
                self.wait_for_more(alive, {})
                time.sleep(self.chance.uniform(0, 0.2))
                if self.chance.random() < 0.5:
                    victim = self.chance.choice(list(alive))
                    self.kill({victim: alive.pop(victim)})
                    began = monotonic()
                    sizes = {pid: notes.stat().st_size for pid, notes in alive.items()}
                    self.wait_for_more(alive, sizes)
                    self.report.survivors.append(monotonic() - began)
                    time.sleep(self.chance.uniform(0, 0.05))
        finally:
            self.kill(alive)

    def wait_for_more(self, alive: dict[int, Path], sizes: dict[int, int]) -> None:
        """Wait until each of the processes has written down more than it had."""
        deadline = monotonic() + START_UP
        for pid, notes in alive.items():
            while notes.stat().st_size <= sizes.get(pid, 0):
                if monotonic() > deadline or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    print(f"process {pid} does not go on", file=sys.stderr)
                    return
                time.sleep(0.001)

    def kill(self, victims: dict[int, Path]) -> None:
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for pid in victims:
            _, status = os.waitpid(pid, 0)
            if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                self.report.killed += 1
            else:
                self.report.failed += 1


def run(folder: Path, rounds: int, seconds: float, chance: random.Random) -> Report:
    report = Report()
    end = monotonic() + seconds
    while report.rounds < rounds and monotonic() < end:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            arena = Arena(Path(own), chance, report)
            arena.run(min(ROUNDS_OF_A_DATABASE, rounds - report.rounds), end)
        print(f"{report.rounds} rounds, {report.acknowledged:,} rows", file=sys.stderr, flush=True)
    return report


def as_text(report: Report) -> str:
    def longest(times: list[float]) -> str:
        return f"{max(times) * 1e3:.0f} ms (limit: {AT_ONCE * 1e3:.0f} ms)" if times else "not measured"

    return "\n".join(
        [
            f"{report.rounds} rounds, {report.killed:,} processes killed, {report.acknowledged:,} rows acknowledged, "
            f"{report.refused:,} writes refused half way",
            f"acknowledged rows that are not there:  {report.lost:,}",
            f"rows of which one half is there:       {report.half:,}",
            f"rows that had been refused, but are:   {report.undead:,}",
            f"databases with a failed integrity_check: {report.corrupt:,}",
            f"processes that ended by themselves:    {report.failed:,}",
            f"longest until the survivors went on:   {longest(report.survivors)}",
            f"longest until the next process wrote:  {longest(report.next_process)}",
            "FAILED" if report.wrong() else "TOO LATE" if report.late() else "ok",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="how often processes are killed (default: 200)")
    parser.add_argument("--quick", action="store_true", help=f"as many rounds as fit into {QUICK:g} seconds")
    parser.add_argument(
        "--seed", type=int, help="of the random moments; they are not the same again to the millisecond"
    )
    parser.add_argument("--folder", help="where the databases are (default: the temporary folder)")
    parser.add_argument("--check", action="store_true", help="exit status 1 also if somebody had to wait too long")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not hasattr(os, "fork"):
        print("not measured: this program needs fork()")
        return 0
    with tempfile.TemporaryDirectory(prefix="sqlitepool-crash-", dir=options.folder) as folder:
        kind = file_system(folder)
        rounds, seconds = (sys.maxsize, QUICK) if options.quick else (options.rounds, float("inf"))
        report = run(Path(folder), rounds, seconds, random.Random(options.seed))
    if options.json:
        print(json.dumps({**asdict(report), "file_system": kind}, indent=1))
    else:
        print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {kind}\n{as_text(report)}")
    return 1 if report.wrong() or (options.check and report.late()) else 0


if __name__ == "__main__":
    sys.exit(main())
