"""`python -m sqlitepool demo`: a threaded server on a pooled SQLite database, under load, for some seconds."""

import argparse
import contextlib
import os
import secrets
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from sqlitepool import ConnectionPool, PoolError
from sqlitepool.cli.demo_load import Load
from sqlitepool.cli.demo_report import Report, as_json, as_table
from sqlitepool.cli.demo_server import ThreadedServer, UserApplication, UserDatabase

SEEDED_USERS = 1000
_OPEN_FILES_BESIDES = 64  # what Python and the demo have open apart from sockets and database files


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo` with its options to the command line's subcommands."""
    parser = commands.add_parser(
        "demo",
        help="serve a pooled database to many threads for some seconds and show what happened",
        description="Start a threaded web server on 127.0.0.1 whose handlers share a pool of SQLite connections, send "
        "it reads and writes from many threads, and show what happened. Exit status: 0 if no request failed and every "
        "acknowledged write is in the file, 1 if not, 130 after Ctrl-C.",
    )
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="how long to send requests (default: 5)")
    parser.add_argument("--threads", type=_count, default=16, help="clients at the same time (default: 16)")
    parser.add_argument("--connections", type=_count, default=4, help="the size of the pool (default: 4)")
    parser.add_argument(
        "--database",
        metavar="PATH",
        type=Path,
        help="the file to use; one that exists gets a table of the demo's own and WAL mode, nothing else in it is "
        "changed (default: a file in a temporary folder, removed at the end)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, and nothing before it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo as `options` say, print its result, and return the exit status."""
    with _catch_signals() as caught:
        try:
            _allow_open_files(2 * options.threads + 3 * options.connections + _OPEN_FILES_BESIDES)
            with _database_path(options.database) as path:
                report = _serve_and_load(path, options, caught)
        except BrokenPipeError:  # all requests are caught where they are made: it is the output
            return _nobody_reads()
        except (OSError, ValueError, RuntimeError, sqlite3.Error, PoolError) as error:
            print(f"sqlitepool demo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # a second Ctrl-C, while the first one was ending the demo
            return 130
    try:
        print(as_json(report) if options.json else as_table(report), flush=True)
    except BrokenPipeError:
        return _nobody_reads()
    if caught:
        return 128 + caught[0]
    return 0 if report.good else 1


def _serve_and_load(path: Path, options: argparse.Namespace, caught: list[int]) -> Report:
    run_name = secrets.token_hex(8)
    with ConnectionPool(path, wrap=UserDatabase, max_size=options.connections) as pool:
        user_ids = _seed(pool, run_name)
        with (
            ThreadedServer(UserApplication(pool, run_name)) as server,
            Load(options.threads, ("127.0.0.1", server.server_port), user_ids, caught) as load,
        ):
            _watch(load, pool, options, caught)
        stats = pool.stats()
        with pool.connection() as users:
            rows = users.count(run_name) - SEEDED_USERS
    latencies = load.latencies()
    errors = load.errors() + server.failures
    return Report(
        database=str(path),
        client_threads=options.threads,
        max_size=options.connections,
        seconds=load.seconds,
        interrupted=bool(caught),
        reads=load.reads,
        acknowledged_writes=load.acknowledged_writes,
        failed=load.failed,
        errors=dict(errors.most_common()),
        median_seconds=_quantile(latencies, 0.5),
        p99_seconds=_quantile(latencies, 0.99),
        longest_seconds=_quantile(latencies, 1.0),
        waited=stats.wait_seconds.count,
        longest_wait_seconds=stats.wait_seconds.max,
        connections_opened=stats.opened,
        server_threads=server.threads,
        server_threads_at_once=server.threads_at_once,
        rows=rows,
    )


def _seed(pool: ConnectionPool[UserDatabase], run_name: str) -> range:
    """Write the users that the clients will read, in one transaction, and return their ids."""
    with pool.connection() as users:
        users.create_table()
    with pool.connection() as users:
        ids = [users.add(run_name, f"user {number}") for number in range(SEEDED_USERS)]
    return range(ids[0], ids[-1] + 1)


def _watch(load: Load, pool: ConnectionPool[UserDatabase], options: argparse.Namespace, caught: list[int]) -> None:
    """Show how it goes, once a second, until the time is over or a signal came."""
    started = time.monotonic()
    rewrite = sys.stdout is not None and sys.stdout.isatty()  # it is None after `>&-`
    shown_second = shown_requests = 0
    while not caught and (elapsed := time.monotonic() - started) < options.seconds:
        time.sleep(min(0.05, options.seconds - elapsed))
        second = int(time.monotonic() - started)
        if second == shown_second or options.json:
            continue
        requests, stats = load.requests, pool.stats()
        rate = (requests - shown_requests) / (second - shown_second)
        line = (
            f"{second:4} s   {requests:9,} requests   {rate:7,.0f}/s   {load.failed} errors   "
            f"{stats.in_use} of {stats.size} connections in use, {stats.waiting} waiting"
        )
        print(f"\r{line}\x1b[K" if rewrite else line, end="" if rewrite else "\n", flush=True)
        shown_second, shown_requests = second, requests
    if rewrite and shown_second:
        print("\r\x1b[K", end="", flush=True)


@contextlib.contextmanager
def _database_path(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
    else:
        with tempfile.TemporaryDirectory(prefix="sqlitepool-demo-") as folder:
            try:
                yield Path(folder, "demo.db")
            finally:  # nothing is left to be interrupted but the removal of the folder
                if threading.current_thread() is threading.main_thread():
                    for number in (signal.SIGINT, signal.SIGTERM):
                        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list it gives, so that neither can strike while something is being closed.

    After the first of them the previous handlers are back: a second Ctrl-C is not held up, and there is no table then.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def _nobody_reads() -> int:
    """Say nothing more, as a program that ends by SIGPIPE does. Python would complain at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _allow_open_files(needed: int) -> None:
    """Raise this process's own limit of open files to `needed` if it is lower. Raises OSError where it may not."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit, ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    if ceiling != resource.RLIM_INFINITY and ceiling < needed:
        raise OSError(f"so many threads and connections need {needed} open files, the limit is {ceiling} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, ceiling))


def _quantile(ascending: list[float], share: float) -> float:
    return ascending[min(int(len(ascending) * share), len(ascending) - 1)] if ascending else 0.0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most 3600, not {text}")
    return seconds


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 1 <= count <= 1000:
        raise argparse.ArgumentTypeError(f"must be 1 to 1000, not {text}")
    return count
