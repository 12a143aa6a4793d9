"""The programs in stress/ say what happened: a thread that starved, one that failed, a target that was missed."""

import importlib
import socket
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pool_support import PATIENCE, start

STRESS = Path(__file__).parent.parent / "stress"
SECONDS = 0.1


@pytest.fixture(name="load")
def _load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STRESS))
    return importlib.import_module


@pytest.fixture(name="crowds")
def _crowds(load: Any) -> ModuleType:
    module: ModuleType = load("_crowd")
    return module


class Hog:
    """Lets whoever comes have it, but the first to come waits from its second time on."""

    def __init__(self) -> None:
        self.victim: int | None = None
        self.enough = threading.Event()

    def take(self) -> None:
        me = threading.get_ident()
        if self.victim is None:
            self.victim = me
        elif self.victim == me:
            self.enough.wait(SECONDS * 10)


@pytest.fixture(name="peer")
def _peer(load: Any) -> Any:
    peers = load("_peers")

    def make(pool: object, use: str) -> Any:
        return peers.Peer("fake", lambda path: pool, use, None, lambda pool: None, "")

    return make


def test_a_thread_that_starves_shows_with_the_whole_run(crowds: ModuleType, peer: Any) -> None:
    seconds = SECONDS * 5  # the victim's thread may begin late
    result = crowds.crowd(peer(Hog(), "pool.take()\nHOLD"), "", "sleep(0.001)", 3, seconds)
    assert seconds * 0.2 < result.longest <= seconds
    assert result.smallest == 0
    assert result.rate > 0
    assert result.errors == 0


def test_an_error_of_one_thread_is_counted_and_the_others_go_on(crowds: ModuleType, peer: Any) -> None:
    class Failing:
        calls = 0

        def take(self) -> None:
            self.calls += 1
            if self.calls == 10:
                raise ValueError("the tenth")

    result = crowds.crowd(peer(Failing(), "pool.take()\nHOLD"), "", "sleep(0.001)", 2, SECONDS * 5)
    assert (result.errors, result.error) == (1, "ValueError: the tenth")
    assert result.rate * SECONDS * 5 > 10


def test_threads_that_cannot_begin_do_not_keep_the_others_waiting(crowds: ModuleType, peer: Any) -> None:
    result = crowds.crowd(peer(None, "pool.take()\nHOLD"), "", "pass", 3, SECONDS)
    assert (result.rate, result.longest) == (0, SECONDS)
    assert result.errors == 3


def test_shares_are_parts_of_an_equal_share(crowds: ModuleType) -> None:
    tallies = [crowds.Tally(2.0) for _ in range(3)]
    for tally, served in zip(tallies, (10, 20, 30), strict=True):
        tally.served, tally.longest = served, served / 1000
    result = crowds.summary(tallies, 2.0)
    assert (result.rate, result.longest, result.smallest, result.largest) == (30, 0.03, 0.5, 1.5)


@pytest.fixture(name="report")
def _report(load: Any, crowds: ModuleType) -> Any:
    reports, peers = load("_contention_report"), load("_peers")
    report = reports.Report({"python": "3", "gil": True, "sqlite": "3", "cores": 2, "system": "any"}, 2, 1.0)
    for name, rates in ((peers.OURS, (300, 200)), (peers.SQLALCHEMY, (100, 50)), (peers.LIFO_QUEUE, (100, 400))):
        results = [crowds.Result(rate=rate, longest=0.05, smallest=1.0, largest=1.0) for rate in rates]
        report.cells[reports.READ, 16, name] = results
    return report


def test_a_ratio_is_the_median_of_the_ratios_within_a_round(load: Any, report: Any) -> None:
    reports, peers = load("_contention_report"), load("_peers")
    assert reports.ratio(report, reports.READ, 16, peers.SQLALCHEMY) == 3.5
    assert reports.ratio(report, reports.READ, 16, peers.LIFO_QUEUE) == 1.75
    assert reports.ratio(report, reports.READ, 16, peers.PEEWEE) is None


def test_targets_are_met_missed_or_not_measured(load: Any, report: Any) -> None:
    verdicts = {verdict.target: verdict for verdict in load("_contention_report").judge(report)}
    assert verdicts["point reads, 16 threads: times SQLAlchemy"].said() == "ok"
    assert verdicts["point reads, 64 threads: times SQLAlchemy"].said() == "not measured"
    report.equal_share[load("_peers").OURS] = load("_crowd").Result(1, 0.1, 0.7, 1.1)
    said = {verdict.target: verdict.said() for verdict in load("_contention_report").judge(report)}
    assert said["1 ms of work, 64 threads: smallest share"] == "MISSED"
    assert said["1 ms of work, 64 threads: largest share"] == "ok"


def test_figures_that_were_saved_give_the_same_tables(load: Any, report: Any) -> None:
    reports = load("_contention_report")
    again = reports.Report.from_json(report.as_json())
    assert reports.as_text(again) == reports.as_text(report)
    assert reports.as_markdown(again) == reports.as_markdown(report)


@pytest.fixture(name="requests_report")
def _requests_report(load: Any) -> Any:
    reports, ways, served = load("_requests_report"), load("_requests_ways"), load("_requests_load").Served

    def make(ours: list[float], theirs: list[float], quick: bool, costs: tuple[float, float] = (1.0, 1.0)) -> Any:
        machine = {"python": "3", "sqlite": "3", "cores": 2, "system": "any"}
        report = reports.Report(machine, len(ours), 0.1, quick)
        where = reports.cell(reports.FLASK, ways.MANY_TABLES)
        for name, rates, cost in ((ways.OURS, ours, costs[0]), (ways.SQLALCHEMY, theirs, costs[1])):
            report.cells[where, name] = [served(rate, 0.001, cost, 1.0) for rate in rates]
        return report, {verdict.target: verdict for verdict in reports.judge(report)}

    return make


def test_requests_are_compared_within_a_round(load: Any, requests_report: Any) -> None:
    report, verdicts = requests_report([300, 200, 90], [100, 100, 100], quick=False)
    verdict = verdicts["Flask's test client, 300 tables: times SQLAlchemy QueuePool"]
    assert (verdict.figure, verdict.said()) == (2.0, "ok")
    assert verdicts["waitress, 4 threads, 300 tables: times SQLAlchemy QueuePool"].said() == "not measured"
    assert "2.000" in load("_requests_report").as_text(report)


@pytest.mark.parametrize(
    ("rate", "cost", "quick", "said"),
    [
        (99, 1.01, False, "MISSED"),
        (99, 1.01, True, "ok"),
        (50, 1.01, True, "ok"),  # other programs had the machine
        (50, 2.0, True, "MISSED"),
    ],
)
def test_a_short_run_misses_a_target_only_by_far(
    requests_report: Any, rate: float, cost: float, quick: bool, said: str
) -> None:
    _, verdicts = requests_report([rate], [100], quick, costs=(cost, 1.0))
    assert verdicts["Flask's test client, 300 tables: times SQLAlchemy QueuePool"].said() == said


def test_the_turns_of_a_round_count_together(load: Any) -> None:
    module = load("_requests_load")
    found = module.summary([module.Turn([0.01] * 30, 0.3, 0.2, 0.1), module.Turn([0.01] * 9 + [0.5], 1.7, 0.2, 0.1)])
    assert (found.rate, found.cost, found.server_busy, found.client_busy) == pytest.approx((20, 0.01, 0.2, 0.1))
    assert found.p99 == 0.5


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nuser 6", None),
        (b"HTTP/1.1 500 Error\r\nContent-Length: 6\r\n\r\nuser 6", "500 Error"),
        (b"", "unexpected answer"),
    ],
)
def test_only_the_right_answer_counts_as_served(load: Any, answer: bytes, error: str | None) -> None:
    module = load("_requests_load")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            while theirs.recv(65536) and answer:
                theirs.sendall(answer[:-3])
                theirs.sendall(answer[-3:])

    server = start(serve)
    with ours:
        if error is None:
            latencies, elapsed, _ = module._ask([ours], 0.01)
            assert 0 < sum(latencies) <= elapsed
        else:
            with pytest.raises(ValueError, match=error):
                module._ask([ours], 0.01)
    server.result(PATIENCE)
