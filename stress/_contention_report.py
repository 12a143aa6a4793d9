"""The figures of stress/contention.py: what was reached of its targets, and the tables."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from _crowd import Result, median, median_ratio
from _peers import DBUTILS, LIFO_QUEUE, OURS, PEEWEE, PER_THREAD, SQLALCHEMY

NOTHING, READ, WORK = HOLDS = ("nothing", "a point read", "1 ms of work")
NAMES = (OURS, SQLALCHEMY, DBUTILS, PEEWEE, LIFO_QUEUE, PER_THREAD)
POOLS = (SQLALCHEMY, DBUTILS, PEEWEE)
BOUNDED_PEERS = (*POOLS, LIFO_QUEUE)


@dataclass
class Report:
    """All figures of a run."""

    machine: dict[str, Any]
    rounds: int
    seconds: float
    cells: dict[tuple[str, int, str], list[Result]] = field(default_factory=dict)
    """By hold, threads and contestant: a result for each round."""
    equal_share: dict[str, Result] = field(default_factory=dict)
    equal_share_seconds: float = 0.0
    idle: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By kind of pool: microseconds for a checkout with few and with many items idle, a pair for each round."""
    problems: list[str] = field(default_factory=list)

    def threads(self, hold: str) -> list[int]:
        return sorted({threads for held, threads, _ in self.cells if held == hold})

    def as_json(self) -> str:
        cells = [
            {"hold": hold, "threads": threads, "contestant": name, "rounds": [asdict(one) for one in results]}
            for (hold, threads, name), results in self.cells.items()
        ]
        equal_share = {name: asdict(result) for name, result in self.equal_share.items()}
        targets = [asdict(verdict) for verdict in judge(self)]
        return json.dumps({**vars(self), "cells": cells, "equal_share": equal_share, "targets": targets}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        found = json.loads(text)
        del found["targets"]
        found["cells"] = {
            (cell["hold"], cell["threads"], cell["contestant"]): [Result(**one) for one in cell["rounds"]]
            for cell in found["cells"]
        }
        found["equal_share"] = {name: Result(**one) for name, one in found["equal_share"].items()}
        return cls(**found)


# ---- figures that targets are about. Each with where it was seen; None if it was not measured.


Figure = tuple[float, str] | None


def ratio(report: Report, hold: str, threads: int, peer: str) -> float | None:
    """How many times the checkouts per second of `peer` ours has: the median of the ratios within a round."""
    ours, theirs = (report.cells.get((hold, threads, name)) for name in (OURS, peer))
    return median_ratio(ours, theirs) if ours and theirs else None


def least_ratio(report: Report, holds: Iterable[str], threads: Iterable[int] | None, of: tuple[str, ...]) -> Figure:
    """The smallest of the ratios to these peers over these cells."""
    found = [
        (times, f"({peer}, {number} threads, {hold})")
        for hold in holds
        for number in threads or report.threads(hold)
        for peer in of
        if (times := ratio(report, hold, number, peer)) is not None
    ]
    return min(found, default=None)


def longest_wait(report: Report, hold: str, threads: int) -> Figure:
    results = report.cells.get((hold, threads, OURS))
    if not results:
        return None
    worst = max(one.longest for one in results)
    return median(results).longest * 1e3, f"ms; {worst * 1e3:.0f} ms in the worst round"


def growth(report: Report, few: int, many: int) -> Figure:
    """What a checkout costs with many threads, as a multiple of what it costs with few."""
    before, after = (report.cells.get((READ, threads, OURS)) for threads in (few, many))
    times = median_ratio(before, after) if before and after else None
    return None if times is None else (times, "")


def share(report: Report, which: str) -> Figure:
    result = report.equal_share.get(OURS)
    return None if result is None else (getattr(result, which), f"over {report.equal_share_seconds:g} s")


def idle_growth(report: Report, kind: str) -> Figure:
    pairs = report.idle.get(kind)
    return (statistics.median(many / few for few, many in pairs), "") if pairs else None


@dataclass(frozen=True)
class Target:
    text: str
    limit: float
    figure: Callable[[Report], Figure]
    at_most: bool = False


# With 1 ms of work everybody is at the ceiling of 4 connections, and who is ahead is noise: 5 % are allowed there.
TARGETS = (
    Target("point reads, 16 threads: times SQLAlchemy", 3.0, lambda r: least_ratio(r, [READ], [16], (SQLALCHEMY,))),
    Target("point reads, 64 threads: times SQLAlchemy", 3.0, lambda r: least_ratio(r, [READ], [64], (SQLALCHEMY,))),
    Target(
        "point reads, 16 threads: times the best bounded peer",
        1.5,
        lambda r: least_ratio(r, [READ], [16], BOUNDED_PEERS),
    ),
    Target(
        "point reads, 64 threads: times the best bounded peer",
        1.5,
        lambda r: least_ratio(r, [READ], [64], BOUNDED_PEERS),
    ),
    Target("1 ms of work: times the best bounded peer", 0.95, lambda r: least_ratio(r, [WORK], None, BOUNDED_PEERS)),
    Target("point reads, 64 threads: longest wait", 60.0, lambda r: longest_wait(r, READ, 64), at_most=True),
    Target("1 ms of work, 64 threads: smallest share", 0.8, lambda r: share(r, "smallest")),
    Target("1 ms of work, 64 threads: largest share", 1.2, lambda r: share(r, "largest"), at_most=True),
    Target("a point read at 256 threads: times its cost at 64", 1.3, lambda r: growth(r, 64, 256), at_most=True),
    Target("Pool, 1,000 idle: times the cost with 4", 1.1, lambda r: idle_growth(r, "Pool"), at_most=True),
    Target(
        "ConnectionPool, 1,000 idle: times the cost with 4",
        1.1,
        lambda r: idle_growth(r, "ConnectionPool"),
        at_most=True,
    ),
    Target(
        "nothing or a point read, any cell: times any pool", 1.0, lambda r: least_ratio(r, [NOTHING, READ], None, POOLS)
    ),
    Target("1 ms of work, any cell: times any pool", 0.95, lambda r: least_ratio(r, [WORK], None, POOLS)),
)


@dataclass(frozen=True)
class Verdict:
    target: str
    limit: str
    figure: float | None
    where: str
    met: bool | None
    """None: it was not measured."""

    def said(self) -> str:
        return {True: "ok", False: "MISSED", None: "not measured"}[self.met]

    def shown(self) -> str:
        return "" if self.figure is None else f"{self.figure:.4g} {self.where}".strip()


def judge(report: Report) -> list[Verdict]:
    """Each target with what was reached."""
    verdicts = []
    for target in TARGETS:
        limit = f"{'at most' if target.at_most else 'at least'} {target.limit:g}"
        figure = target.figure(report)
        if figure is None:
            verdicts.append(Verdict(target.text, limit, None, "", None))
        else:
            met = figure[0] <= target.limit if target.at_most else figure[0] >= target.limit
            verdicts.append(Verdict(target.text, limit, figure[0], figure[1], met))
    return verdicts


# ---- tables


Row = list[str]
KINDS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("checkouts per second", lambda one: f"{one.rate:,.0f}"),
    (
        "longest wait, ms",
        lambda one: f"{one.longest * 1e3:,.1f}" if one.longest < 0.0995 else f"{one.longest * 1e3:,.0f}",
    ),
    ("smallest and largest share", lambda one: f"{one.smallest:.2f} to {one.largest:.2f}"),
)


def cell_tables(report: Report) -> Iterable[tuple[str, list[Row]]]:
    """Each table with its title; the first row is the head."""
    for hold in HOLDS:
        numbers = report.threads(hold)
        results = {key: median(rounds) for key, rounds in report.cells.items()}
        for kind, show_result in KINDS if numbers else ():
            rows = [["threads", *(str(number) for number in numbers)]]
            for name in NAMES:
                row = [results.get((hold, number, name)) for number in numbers]
                if any(row):
                    rows.append([name, *("" if one is None else show_result(one) for one in row)])
            yield f"Holding {hold}: {kind}", rows


def section_tables(report: Report) -> Iterable[tuple[str, list[Row]]]:
    if report.equal_share:
        rows = [["64 threads", "checkouts per second", "longest wait, ms", "smallest share", "largest share"]]
        for name, one in report.equal_share.items():
            rows.append(
                [name, f"{one.rate:,.0f}", f"{one.longest * 1e3:,.0f}", f"{one.smallest:.2f}", f"{one.largest:.2f}"]
            )
        yield f"Equal shares: 1 ms of work for {report.equal_share_seconds:g} s", rows
    if report.idle:
        rows = [["one thread, nobody waits", "4 idle, us", "1,000 idle, us", "ratio"]]
        for kind, pairs in report.idle.items():
            few, many = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows.append([kind, f"{few:.2f}", f"{many:.2f}", f"{statistics.median(b / a for a, b in pairs):.2f}"])
        yield "A checkout with many idle items", rows


def target_table(report: Report) -> tuple[str, list[Row]]:
    rows = [["", "target", "reached", ""]]
    rows += [[one.target, one.limit, one.shown(), one.said()] for one in judge(report)]
    return "Targets", rows


def heading(report: Report) -> str:
    machine = report.machine
    gil = "" if machine["gil"] else " without the GIL"
    return (
        f"CPython {machine['python']}{gil}, SQLite {machine['sqlite']}, {machine['cores']} cores, {machine['system']}; "
        f"{report.rounds} rounds of {report.seconds:g} s for each cell"
    )


def as_text(report: Report) -> str:
    tables = (*cell_tables(report), *section_tables(report), target_table(report))
    return plain(heading(report), tables, report.problems)


def plain(heading: str, tables: Iterable[tuple[str, list[Row]]], problems: list[str]) -> str:
    """Tables for a terminal, with aligned columns. What a target says is aligned to the left, as words are."""
    parts = [heading]
    for title, rows in tables:
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if not at or title == "Targets" else cell.rjust(width) for at, (cell, width) in line
            )
            for line in (enumerate(zip(row, widths, strict=True)) for row in rows)
        ]
        parts.append("\n".join([title, *(f"  {line}".rstrip() for line in lines)]))
    if problems:
        parts.append("\n".join(problems))
    return "\n\n".join(parts)


def as_markdown(report: Report) -> str:
    parts = [f"{heading(report)}."]
    for title, (head, *rows) in (target_table(report), *cell_tables(report), *section_tables(report)):
        left = title == "Targets"
        rule = ["---", *("---" if left else "---:" for _ in head[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (head, rule, *(emphasised(row) for row in rows))]
        parts.append("\n".join([f"### {title}", "", *lines]))
    if report.problems:
        parts.append("\n".join(f"- {problem}" for problem in report.problems))
    return "\n\n".join(parts)


def emphasised(row: Row) -> Row:
    return [f"**{cell}**" for cell in row] if row[0] == OURS else row
