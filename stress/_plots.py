"""The plots of docs/performance.md: throughput and longest wait over the number of threads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from _contention_report import HOLDS, NAMES, Report
from _crowd import Result, median
from _peers import DBUTILS, LIFO_QUEUE, OURS, PEEWEE, PER_THREAD, SQLALCHEMY
from matplotlib.ticker import FuncFormatter, NullLocator

# Colours of Okabe and Ito, which people with any kind of colour vision can tell apart; and a marker for each.
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#0072B2", "marker": "o", "linewidth": 3, "markersize": 7, "zorder": 5},
    SQLALCHEMY: {"color": "#D55E00", "marker": "s"},
    DBUTILS: {"color": "#009E73", "marker": "^"},
    PEEWEE: {"color": "#CC79A7", "marker": "D"},
    LIFO_QUEUE: {"color": "#E69F00", "marker": "v"},
    PER_THREAD: {"color": "#777777", "marker": "x", "linestyle": "--"},
}
LABELS = {PER_THREAD: "a connection per thread (no bound)"}
HIGHEST = 2.5


def draw(report: Report, folder: Path) -> Iterator[Path]:
    """Draw both plots into `folder`, as SVG and as PNG; give the files."""
    folder.mkdir(parents=True, exist_ok=True)
    # the same text in each run that has the same figures, so that a changed file means changed figures
    plt.rcParams.update(
        {"svg.hashsalt": "sqlitepool", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    for name, figure in (("throughput", throughput(report)), ("longest-wait", longest_wait(report))):
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
            path = folder / f"{name}{suffix}"
            figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
            yield path
        plt.close(figure)


def throughput(report: Report) -> Any:
    figure, panels = draw_panels(report, "checkouts per second", lambda one: one.rate)
    for axes in panels.values():
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        most = {line: max(line.get_ydata()) for line in axes.lines}
        top = max((rate for line, rate in most.items() if line.get_label() != PER_THREAD), default=0)
        for line, rate in most.items():
            if rate > top * HIGHEST:  # drawn, it would press the others flat
                note = f"{PER_THREAD}: up to {rate:,.0f}, not drawn"
                style = {"ha": "right", "va": "top", "fontsize": 8, "color": STYLES[PER_THREAD]["color"]}
                axes.annotate(note, (1, 1), xycoords="axes fraction", **style)
                line.remove()
        axes.relim()
        axes.autoscale_view()
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    return figure


def longest_wait(report: Report) -> Any:
    figure, panels = draw_panels(
        report, "longest wait of any thread (ms, logarithmic)", lambda one: one.longest * 1e3, sharey=True
    )
    for axes in panels.values():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axhline(report.seconds * 1e3, color="black", linewidth=0.8, linestyle=":", zorder=1)
        axes.annotate(
            "the whole run",
            (0.02, report.seconds * 1e3),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
    return figure


def draw_panels(
    report: Report, what: str, value: Callable[[Result], float], sharey: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A panel for each hold, a line for each contestant; `value` is what is drawn of a result."""
    holds = [hold for hold in HOLDS if report.threads(hold)]
    figure, grid = plt.subplots(
        1, len(holds), figsize=(4.4 * len(holds), 4.2), squeeze=False, sharey=sharey, layout="constrained"
    )
    panels = dict(zip(holds, grid[0], strict=True))
    for hold, axes in panels.items():
        for name in NAMES:
            found = [(n, report.cells[hold, n, name]) for n in report.threads(hold) if (hold, n, name) in report.cells]
            if found:
                figures = [value(median(rounds)) for _, rounds in found]
                style = {"linewidth": 1.4, "markersize": 5, **STYLES[name]}
                axes.plot([threads for threads, _ in found], figures, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(report.threads(hold), [str(number) for number in report.threads(hold)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"holding {hold}")
        axes.set_xlabel("threads (4 connections)")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    first = grid[0][0]
    first.set_ylabel(what)
    lines, names = first.get_legend_handles_labels()
    figure.legend(lines, [LABELS.get(name, name) for name in names], loc="outside lower center", ncols=3, frameon=False)
    return figure, panels
