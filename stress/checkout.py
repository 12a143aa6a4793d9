"""What a checkout and its return cost with nobody waiting: sqlitepool and its peers, measured in one run.

    pip install sqlalchemy DBUtils peewee sqlspec
    python stress/checkout.py                    # some 7 seconds; needs sqlitepool importable
    python stress/checkout.py --quick --check    # 2 seconds; exit status 1 if a target is missed

One thread, a pool of 4, a database file in WAL mode, the connections usable from any thread, garbage collection on.
The contestants take turns: in each round each of them, in a new order, runs a batch of about 20 ms. The figures are
medians over the rounds, and the ratios are medians of the ratios within a round, so that a machine that is slow for
a while is slow for all. A ratio below 1 means that sqlitepool's ConnectionPool, used with `with pool.connection()`, is
the cheaper one. Each peer is used as its own documentation says; what it does when a connection is returned stands
beside it, because it is not the same for all.
"""

import argparse
import json
import random
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import _peers as peers

TARGETS = {peers.SQLALCHEMY: 0.25, peers.DBUTILS: 0.70}

BATCH = """
    def batch(times, pool=pool):
        for _ in repeat(None, times):
            USE
"""

Batch = Callable[[int], None]
"""Takes and returns a connection that many times."""


@dataclass
class Contestant:
    peer: peers.Peer
    problem: str = ""
    missing: bool = False
    checkout: list[float] = field(default_factory=list)
    """Microseconds for each checkout and return, one figure a round."""
    read: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.peer.name


def contestants() -> list[Contestant]:
    return [
        Contestant(peer)
        for peer in (
            peers.CONNECTION_POOL,
            peers.CONNECTION_POOL_ACQUIRE,
            peers.PLAIN_POOL,
            peers.SQLALCHEMY_QUEUE_POOL,
            peers.DBUTILS_POOLED_DB,
            peers.PEEWEE_POOLED,
            peers.SQLSPEC_POOL,
            peers.STDLIB_LIFO_QUEUE,
            peers.STDLIB_SIMPLE_QUEUE,
        )
    ]


def batch(peer: peers.Peer, pool: object, hold: str) -> Batch:
    names = {"pool": pool, "repeat": repeat}
    function: Batch = peers.pasted(BATCH, names, USE=peer.use, HOLD=hold)
    return function


# ---- measuring


def measure(everybody: list[Contestant], path: str, rounds: int, batch_seconds: float) -> None:
    """Run all rounds; the figures, and the problems of those that could not take part, are noted in the contestants."""
    with running(everybody, path) as batches:
        lengths = {(name, kind): peers.calibrate(batch, batch_seconds) for (name, kind), batch in batches.items()}
        order = random.Random(1)
        for _ in range(rounds):
            for kind in ("checkout", "read"):
                turn = [one for one in everybody if (one.name, kind) in batches]
                order.shuffle(turn)
                for one in turn:
                    times = lengths[one.name, kind]
                    getattr(one, kind).append(peers.timed(batches[one.name, kind], times) / times * 1e6)


@contextmanager
def running(everybody: list[Contestant], path: str) -> Iterator[dict[tuple[str, str], Batch]]:
    """Open all contestants; gives the batches that can be run, by contestant's name and "checkout" or "read"."""
    batches: dict[tuple[str, str], Batch] = {}
    opened = []
    for one in everybody:
        try:
            pool = one.peer.open(path)
            opened.append((one.peer, pool))
            for kind, hold in (("checkout", "pass"), ("read", one.peer.read)):
                if hold is not None:
                    batches[one.name, kind] = batch(one.peer, pool, hold)
                    batches[one.name, kind](100)
        except ModuleNotFoundError as error:
            one.missing, one.problem = True, f"missing: {error}"
        except Exception as error:  # one that fails is named in the table, and the others go on
            one.problem = f"failed: {type(error).__name__}: {error}"
    try:
        yield batches
    finally:
        for peer, pool in opened:
            peer.close(pool)


# ---- showing


def ratio(ours: list[float], theirs: list[float]) -> float | None:
    """The median of what ours took in each round, as a share of theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if ours and theirs else None


def judge(everybody: list[Contestant]) -> list[dict[str, Any]]:
    """Each target with what was reached; `met` is None where it could not be measured."""
    by_name = {one.name: one for one in everybody}
    verdicts = []
    for peer, at_most in TARGETS.items():
        reached = ratio(by_name[peers.OURS].checkout, by_name[peer].checkout)
        verdicts.append(
            {"peer": peer, "at_most": at_most, "ratio": reached, "met": None if reached is None else reached <= at_most}
        )
    return verdicts


def show_table(title: str, everybody: list[Contestant], kind: str) -> None:
    ours: list[float] = getattr(everybody[0], kind)
    print(f"{title}\n  {'':<30} {'median us':>9} {'least':>7} {'ours/it':>8}   on return")
    for one in everybody:
        figures: list[float] = getattr(one, kind)
        share = ratio(ours, figures)
        if one.problem:
            print(f"  {one.name:<30} {one.problem}")
        elif figures:
            shown = "" if share is None or one is everybody[0] else f"{share:.2f}"
            figures_shown = f"{statistics.median(figures):9.2f} {min(figures):7.2f} {shown:>8}"
            print(f"  {one.name:<30} {figures_shown}   {one.peer.on_return}")
    print()


def show(everybody: list[Contestant], verdicts: list[dict[str, Any]], rounds: int) -> None:
    print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {rounds} rounds\n")
    show_table("Checkout and return, nobody waiting", everybody, "checkout")
    show_table("The same with one point read for each checkout", everybody, "read")
    for verdict in verdicts:
        said = {True: "met", False: "NOT MET", None: "not measured"}[verdict["met"]]
        reached = "" if verdict["ratio"] is None else f", reached {verdict['ratio']:.2f}"
        print(f"target: {peers.OURS} at most {verdict['at_most']:.2f} of {verdict['peer']}{reached}: {said}")


def as_json(everybody: list[Contestant], verdicts: list[dict[str, Any]], rounds: int) -> str:
    rows = []
    for one in everybody:
        row: dict[str, Any] = {
            "name": one.name.strip(),
            "on_return": one.peer.on_return,
            "problem": one.problem or None,
        }
        for kind in ("checkout", "read"):
            figures: list[float] = getattr(one, kind)
            row[f"{kind}_us"] = statistics.median(figures) if figures else None
            row[f"{kind}_ratio"] = ratio(getattr(everybody[0], kind), figures)
        rows.append(row)
    versions = {"python": sys.version.split()[0], "sqlite": sqlite3.sqlite_version}
    return json.dumps({**versions, "rounds": rounds, "contestants": rows, "targets": verdicts}, indent=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each contestant runs (default: 15)")
    parser.add_argument("--quick", action="store_true", help="5 rounds of shorter batches")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds, batch_seconds = (5, 0.01) if options.quick else (options.rounds, 0.02)

    everybody = contestants()
    with tempfile.TemporaryDirectory(prefix="sqlitepool-checkout-") as folder:
        path = str(Path(folder, "users.db"))
        peers.create_database(path)
        measure(everybody, path, rounds, batch_seconds)
    verdicts = judge(everybody)
    if options.json:
        print(as_json(everybody, verdicts, rounds))
    else:
        show(everybody, verdicts, rounds)
    failed = any(one.problem and not one.missing for one in everybody) or everybody[0].missing
    missed = any(not verdict["met"] for verdict in verdicts)
    return 1 if failed or (options.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
