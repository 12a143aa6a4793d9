"""What the demo found, as a table for people and as JSON for programs."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Report:
    """The result of one run of the demo. Times are in seconds."""

    database: str
    client_threads: int
    max_size: int
    seconds: float
    interrupted: bool
    reads: int
    acknowledged_writes: int
    failed: int
    errors: dict[str, int]
    median_seconds: float
    p99_seconds: float
    longest_seconds: float
    waited: int
    longest_wait_seconds: float
    connections_opened: int
    server_threads: int
    server_threads_at_once: int
    rows: int

    @property
    def requests(self) -> int:
        """All requests that ended, well or not."""
        return self.reads + self.acknowledged_writes + self.failed

    @property
    def requests_per_second(self) -> float:
        """The average over the whole run."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def locked(self) -> int:
        """How often SQLite said "database is locked"."""
        return sum(times for text, times in self.errors.items() if "database is locked" in text)

    @property
    def complete(self) -> bool:
        """Whether the file holds a row for each acknowledged write, and no other."""
        return self.rows == self.acknowledged_writes

    @property
    def good(self) -> bool:
        """Whether there was no error at all, and the file is complete."""
        return self.complete and not self.errors


def as_json(report: Report) -> str:
    """One JSON object, on several lines."""
    derived = {
        name: getattr(report, name) for name in ("requests", "requests_per_second", "locked", "complete", "good")
    }
    return json.dumps(asdict(report) | derived, indent=2)


def as_table(report: Report) -> str:
    """A table with a headline above it and a verdict below."""
    waited = report.waited / report.requests if report.requests else 0.0
    rows = [
        ("requests", f"{report.requests:,}", f"{report.requests_per_second:,.0f} a second"),
        ("  reads", f"{report.reads:,}", ""),
        ("  writes", f"{report.acknowledged_writes:,}", "each committed before it was answered"),
        ("errors", f"{sum(report.errors.values()):,}", f'"database is locked": {report.locked:,}'),
        ("slowest request", _duration(report.longest_seconds), _typical_request(report)),
        ("waited for a connection", f"{report.waited:,}", f"{waited:.1%} of the requests, {_longest_wait(report)}"),
        ("connections opened", f"{report.connections_opened:,}", f"the pool may have {report.max_size:,}"),
        (
            "threads that used them",
            f"{report.server_threads:,}",
            f"one for each request, at most {report.server_threads_at_once:,} at once",
        ),
        ("rows in the file", f"{report.rows:,}", _rows_against_writes(report)),
    ]
    ran = f"{report.seconds:.1f} seconds, {report.client_threads:,} clients, {report.max_size:,} connections"
    lines = [
        f"{ran}, {report.database}",
        "",
        *(f"  {name:<24} {value:>10}   {remark}".rstrip() for name, value, remark in rows),
        "",
        *(f"  {times:,} x {text}" for text, times in list(report.errors.items())[:5]),
        *([""] if report.errors else []),
        _verdict(report),
    ]
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    ended = "Stopped before its time. " if report.interrupted else ""
    if report.good:
        return ended + "All went well: no request failed, and every acknowledged write is in the file."
    if report.complete:
        return ended + "NOT WELL: there were errors. Every acknowledged write is in the file."
    return ended + "NOT WELL: the file does not hold exactly the acknowledged writes."


def _rows_against_writes(report: Report) -> str:
    if report.complete:
        return "as many as writes acknowledged"
    return f"but {report.acknowledged_writes:,} writes acknowledged"


def _typical_request(report: Report) -> str:
    return f"half within {_duration(report.median_seconds)}, 99 % within {_duration(report.p99_seconds)}"


def _longest_wait(report: Report) -> str:
    return f"the longest {_duration(report.longest_wait_seconds)}" if report.waited else "none of them"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"
