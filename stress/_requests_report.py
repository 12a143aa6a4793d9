"""The figures of stress/requests.py: what was reached of its targets, and the tables."""

import json
import os
import platform
import sqlite3
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from _contention_report import Row, Verdict, plain
from _requests_load import Served
from _requests_ways import GLOBAL, MANY_TABLES, ONE_TABLE, OURS, PER_REQUEST, SQLALCHEMY

WAITRESS, ONE_THREAD, FLASK = "waitress, 4 threads", "waitress, 1 thread", "Flask's test client"
SETTINGS = {
    WAITRESS: (PER_REQUEST, SQLALCHEMY, OURS),
    ONE_THREAD: (GLOBAL, OURS),
    FLASK: (PER_REQUEST, SQLALCHEMY, OURS, GLOBAL),
}
"""Who takes part where. A global connection is for one thread only."""

FAR_OFF = 0.6
"""A short run has missed a target if it reached less than this part of it, in processor time as well."""
BUSY_ENOUGH = 0.5
"""A short run says nothing where a server had a processor for a smaller share of the time."""


def cell(setting: str, schema: str) -> str:
    return f"{setting}, {schema}"


@dataclass
class Report:
    """All figures of a run."""

    machine: dict[str, Any]
    rounds: int
    seconds: float
    quick: bool
    cells: dict[tuple[str, str], list[Served]] = field(default_factory=dict)
    """By cell and contestant: a result for each round."""
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        cells = [
            {"cell": where, "contestant": name, "rounds": [asdict(one) for one in results]}
            for (where, name), results in self.cells.items()
        ]
        verdicts = [asdict(verdict) for verdict in judge(self)]
        return json.dumps({**vars(self), "cells": cells, "targets": verdicts}, indent=1)


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def median(results: Sequence[Served]) -> Served:
    """The median of each figure over the rounds."""
    figures = zip(*(asdict(one).values() for one in results), strict=True)
    return Served(*(statistics.median(values) for values in figures))


def ratio(report: Report, where: str, theirs: str, what: str = "rate") -> float | None:
    """Our figure as a multiple of theirs: the median of the ratios within a round."""
    a, b = (report.cells.get((where, name)) for name in (OURS, theirs))
    if not a or not b or len(a) != len(b):
        return None
    return statistics.median(getattr(x, what) / getattr(y, what) for x, y in zip(a, b, strict=True))


# ---- targets


@dataclass(frozen=True)
class Target:
    where: str
    peer: str
    least: float

    def verdict(self, report: Report) -> Verdict:
        times = ratio(report, self.where, self.peer)
        met = None if times is None else times >= self.least
        limit = f"at least {self.least:g}"
        if report.quick:
            limit += ", or not far off"
            cost = ratio(report, self.where, self.peer, "cost")
            met = None
            if times is not None and cost is not None and self._had_a_processor(report):
                met = max(times, 1 / cost) >= self.least * FAR_OFF
        return Verdict(f"{self.where}: times {self.peer}", limit, times, "", met)

    def _had_a_processor(self, report: Report) -> bool:
        both = (median(report.cells[self.where, name]) for name in (OURS, self.peer))
        return all(one.server_busy >= BUSY_ENOUGH for one in both)


TARGETS = (
    *(
        Target(cell(setting, MANY_TABLES), peer, least)
        for setting in (WAITRESS, FLASK)
        for peer, least in ((PER_REQUEST, 1.5), (SQLALCHEMY, 1.0))
    ),
    *(
        Target(cell(setting, schema), GLOBAL, 0.98)
        for setting in (ONE_THREAD, FLASK)
        for schema in (MANY_TABLES, ONE_TABLE)
    ),
)


def judge(report: Report) -> list[Verdict]:
    return [target.verdict(report) for target in TARGETS]


# ---- tables


HEAD = ["requests/s", "p99, ms", "CPU us", "ours/it", "ours/it, CPU", "server busy", "client busy"]


def tables(report: Report) -> Iterable[tuple[str, list[Row]]]:
    """Each table with its title; the first row is the head."""
    for where in dict.fromkeys(where for where, _ in report.cells):
        rows = [["", *HEAD]]
        for (found, name), results in report.cells.items():
            if found == where:
                rows.append([name, *_figures(report, where, name, median(results))])
        yield where, rows
    verdicts = ([one.target, one.limit, one.shown(), one.said()] for one in judge(report))
    yield "Targets", [["ours, in requests per second", "target", "reached", ""], *verdicts]


def _figures(report: Report, where: str, name: str, one: Served) -> Row:
    ratios = [ratio(report, where, name, what) for what in ("rate", "cost")]
    return [
        f"{one.rate:,.0f}",
        f"{one.p99 * 1e3:.2f}",
        f"{one.cost * 1e6:.0f}",
        *("" if times is None or name == OURS else f"{times:.3f}" for times in ratios),
        f"{one.server_busy:.0%}",
        f"{one.client_busy:.0%}" if one.client_busy else "",
    ]


def as_text(report: Report) -> str:
    found = report.machine
    heading = (
        f"CPython {found['python']}, SQLite {found['sqlite']}, {found['cores']} cores, {found['system']}; "
        f"{report.rounds} rounds of {report.seconds:g} s for each contestant"
    )
    return plain(heading, tables(report), report.problems)
