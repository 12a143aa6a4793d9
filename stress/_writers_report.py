"""The figures of stress/writers.py and stress/processes.py: what was reached of their targets, and the tables."""

import json
import os
import platform
import sqlite3
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from _contention_report import Figure, Row, Verdict, plain
from _crowd import median, median_ratio
from _writers_peers import OURS, Written


@dataclass
class Report:
    """All figures of a run."""

    machine: dict[str, Any]
    rounds: int
    seconds: float
    cells: dict[tuple[str, str], list[Written]] = field(default_factory=dict)
    """By cell and contestant: a result for each round."""
    problems: list[str] = field(default_factory=list)

    def add(self, cell: str, name: str, result: Written) -> None:
        self.cells.setdefault((cell, name), []).append(result)

    def as_json(self, targets: "Sequence[Target]") -> str:
        cells = [
            {"cell": cell, "contestant": name, "rounds": [asdict(one) for one in results]}
            for (cell, name), results in self.cells.items()
        ]
        verdicts = [asdict(verdict) for verdict in judge(self, targets)]
        return json.dumps({**vars(self), "cells": cells, "targets": verdicts}, indent=1)


def machine(folder_is: str) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "sqlite": sqlite3.sqlite_version,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "file_system": folder_is,
    }


def summed(results: Sequence[Written]) -> Written:
    """The median of each figure over the rounds; what must not happen is added up."""
    return Written(
        **vars(median(results)), busy=sum(one.busy for one in results), lost=sum(one.lost for one in results)
    )


# ---- targets


@dataclass(frozen=True)
class Target:
    text: str
    limit: float
    figure: Callable[[Report], Figure]
    at_most: bool = False

    def verdict(self, report: Report) -> Verdict:
        limit = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        figure = self.figure(report)
        if figure is None:
            return Verdict(self.text, limit, None, "", None)
        met = figure[0] <= self.limit if self.at_most else figure[0] >= self.limit
        return Verdict(self.text, limit, figure[0], figure[1], met)


def judge(report: Report, targets: Sequence[Target]) -> list[Verdict]:
    return [target.verdict(report) for target in targets]


def ratio(cell: str, ours: str, theirs: str) -> Callable[[Report], Figure]:
    """How many times the rate of one the other has: the median of the ratios within a round."""

    def figure(report: Report) -> Figure:
        a, b = (report.cells.get((cell, name)) for name in (ours, theirs))
        times = median_ratio(a, b) if a and b else None
        return None if times is None else (times, "")

    return figure


def longest(cell: str, name: str) -> Callable[[Report], Figure]:
    """The longest wait of any writer, in ms: the median of the rounds, and the worst of them."""

    def figure(report: Report) -> Figure:
        results = report.cells.get((cell, name))
        if not results:
            return None
        worst = max(one.longest for one in results)
        return summed(results).longest * 1e3, f"ms; {worst * 1e3:.0f} ms in the worst round"

    return figure


def evenness(cell: str, name: str) -> Callable[[Report], Figure]:
    """The smallest share as a part of the largest: the median of the rounds."""

    def figure(report: Report) -> Figure:
        results = report.cells.get((cell, name))
        if not results:
            return None
        return statistics.median(one.smallest / one.largest if one.largest else 0.0 for one in results), ""

    return figure


def total(what: str, names: Iterable[str]) -> Callable[[Report], Figure]:
    """The sum of what must not happen, over all cells and rounds of these contestants."""
    wanted = tuple(names)

    def figure(report: Report) -> Figure:
        found = [getattr(one, what) for (_, name), all_ in report.cells.items() if name in wanted for one in all_]
        return (sum(found), f"in {len(found)} runs") if found else None

    return figure


def never(names: Iterable[str] = OURS) -> tuple[Target, ...]:
    """What must not happen to any of ours, in any run."""
    return (
        Target("SQLITE_BUSY that reached a caller", 0, total("busy", names), at_most=True),
        Target("errors of any kind", 0, total("errors", names), at_most=True),
        Target("acknowledged rows that are not in the file", 0, total("lost", names), at_most=True),
    )


# ---- tables


HEAD = ["per second", "longest, ms", "smallest share", "largest share", "errors", "busy", "lost"]


def tables(report: Report, targets: Sequence[Target]) -> Iterable[tuple[str, list[Row]]]:
    """Each table with its title; the first row is the head."""
    for cell in dict.fromkeys(cell for cell, _ in report.cells):
        rows = [["", *HEAD]]
        for (where, name), results in report.cells.items():
            if where == cell:
                one = summed(results)
                wait = f"{one.longest * 1e3:,.1f}" if one.longest < 0.0995 else f"{one.longest * 1e3:,.0f}"
                shares = [f"{one.smallest:.2f}", f"{one.largest:.2f}"]
                counts = [f"{count:,}" for count in (one.errors, one.busy, one.lost)]
                rows.append([name, f"{one.rate:,.0f}", wait, *shares, *counts])
        yield cell, [rows[0], *sorted(rows[1:])]
    yield "Targets", [["", "target", "reached", ""], *_target_rows(report, targets)]


def _target_rows(report: Report, targets: Sequence[Target]) -> list[Row]:
    return [[one.target, one.limit, one.shown(), one.said()] for one in judge(report, targets)]


def heading(report: Report) -> str:
    found = report.machine
    gil = "" if found["gil"] else " without the GIL"
    return (
        f"CPython {found['python']}{gil}, SQLite {found['sqlite']}, {found['cores']} cores, {found['system']}, "
        f"{found['file_system']}; {report.rounds} rounds of {report.seconds:g} s"
    )


def as_text(report: Report, targets: Sequence[Target]) -> str:
    return plain(heading(report), tables(report, targets), report.problems)


def as_markdown(report: Report, targets: Sequence[Target]) -> str:
    parts = [f"{heading(report)}."]
    for title, (head, *rows) in tables(report, targets):
        rule = ["---", *("---" if title == "Targets" else "---:" for _ in head[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (head, rule, *(_emphasised(row) for row in rows))]
        parts.append("\n".join([f"### {title}", "", *lines]))
    if report.problems:
        parts.append("\n".join(f"- {problem}" for problem in report.problems))
    return "\n\n".join(parts)


def _emphasised(row: Row) -> Row:
    return [f"**{cell}**" for cell in row] if row[0] in OURS else row
