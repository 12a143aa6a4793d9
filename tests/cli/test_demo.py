"""The demo, started as a user starts it: what it prints, how it ends, what it leaves behind."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import sqlitepool
from sqlitepool.cli import main
from sqlitepool.cli.demo_report import Report, as_json, as_table

ROOT = Path(__file__).parent.parent.parent


def environment(temporary_folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary_folder), "PYTHONIOENCODING": "utf-8"}


def run(temporary_folder: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "sqlitepool", *arguments],
        env=environment(temporary_folder),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """The demo's folder for temporary files, which must be empty again at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == [], "the demo left temporary files behind"


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "database": "users.db",
        "client_threads": 16,
        "max_size": 4,
        "seconds": 2.0,
        "interrupted": False,
        "reads": 800,
        "acknowledged_writes": 200,
        "failed": 0,
        "errors": {},
        "median_seconds": 0.01,
        "p99_seconds": 0.02,
        "longest_seconds": 0.03,
        "waited": 50,
        "longest_wait_seconds": 0.004,
        "connections_opened": 4,
        "server_threads": 1000,
        "server_threads_at_once": 16,
        "rows": 200,
    }
    return Report(**(values | changes))


def test_the_demo_serves_reads_and_writes_without_an_error(temporary: Path) -> None:
    ended = run(temporary, "demo", "--seconds", "1", "--threads", "8", "--connections", "3", "--json")

    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert found["requests"] == found["reads"] + found["acknowledged_writes"] + found["failed"]
    assert found["server_threads"] == found["requests"] > 0
    assert found["reads"] > found["acknowledged_writes"] > 0
    assert found["rows"] == found["acknowledged_writes"]
    assert (found["failed"], found["errors"], found["locked"]) == (0, {}, 0)
    assert 1 <= found["connections_opened"] <= 3
    assert 1 <= found["server_threads_at_once"] <= 8
    assert 0 < found["median_seconds"] <= found["p99_seconds"] <= found["longest_seconds"]
    assert 0 <= found["waited"] <= found["requests"]
    assert (found["complete"], found["good"], found["interrupted"]) == (True, True, False)


def test_progress_and_a_table_are_shown(temporary: Path) -> None:
    ended = run(temporary, "demo", "--seconds", "1.2", "--threads", "4")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.match(r"\s*\d s ", ended.stdout)  # 1, unless the machine was busy with other things
    assert set("\r\x1b").isdisjoint(ended.stdout), "lines are rewritten on a terminal only"
    assert '"database is locked": 0' in ended.stdout
    assert "All went well" in ended.stdout


def test_an_existing_database_keeps_what_is_in_it(temporary: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE users (name TEXT)")
        connection.execute("INSERT INTO users VALUES ('Ada')")

    for _ in range(2):
        ended = run(temporary, "demo", "--seconds", "0.3", "--threads", "2", "--database", path, "--json")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert json.loads(ended.stdout)["complete"]

    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM users").fetchall() == [("Ada",)]
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
    assert tables == [("sqlitepool_demo_users",), ("users",)]


def test_a_file_that_is_no_database_is_left_alone(temporary: Path, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear reader, " * 100)

    ended = run(temporary, "demo", "--seconds", "1", "--database", path)

    assert ended.returncode == 1
    assert ended.stderr.startswith("sqlitepool demo: ")
    assert ended.stderr.count("\n") == 1
    assert path.read_text() == "Dear reader, " * 100


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_demo_with_the_table_so_far(number: signal.Signals, status: int, temporary: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "sqlitepool", "demo", "--seconds", "600"],
        env=environment(temporary),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert re.match(r"\s*\d+ s ", process.stdout.readline())
            process.send_signal(number)
            sent = time.monotonic()
            stdout, stderr = process.communicate(timeout=20)
        finally:
            process.kill()

    assert process.returncode == status
    assert time.monotonic() - sent < 10
    assert stderr == ""
    assert "Stopped before its time. All went well" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds: must be more than 0 and at most 3600, not 0"),
        (["--seconds", "3601"], "--seconds: must be more than 0"),
        (["--seconds", "nan"], "--seconds: must be more than 0"),
        (["--seconds", "soon"], "'soon' is not a number of seconds"),
        (["--threads", "0"], "--threads: must be 1 to 1000, not 0"),
        (["--threads", "1001"], "--threads: must be 1 to 1000"),
        (["--connections", "-1"], "--connections: must be 1 to 1000"),
        (["--connections", "1.5"], "'1.5' is not a whole number"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_command_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sqlitepool {sqlitepool.__version__}\n"


def test_a_good_report_reads_as_one() -> None:
    table = as_table(report())
    assert "1,000   500 a second" in table
    assert "5.0% of the requests, the longest 4.0 ms" in table
    assert table.endswith("All went well: no request failed, and every acknowledged write is in the file.")


def test_errors_are_counted_and_shown() -> None:
    errors = {"500 OperationalError: database is locked": 3, "ConnectionResetError: reset": 1}
    bad = report(failed=4, errors=errors)
    assert (bad.good, bad.complete, bad.locked) == (False, True, 3)
    assert '4   "database is locked": 3' in as_table(bad)
    assert "3 x 500 OperationalError: database is locked" in as_table(bad)
    assert "NOT WELL: there were errors" in as_table(bad)


def test_a_lost_write_is_shown() -> None:
    bad = report(rows=199)
    assert (bad.good, bad.complete) == (False, False)
    assert "but 200 writes acknowledged" in as_table(bad)
    assert "NOT WELL: the file does not hold exactly the acknowledged writes" in as_table(bad)
    assert json.loads(as_json(bad))["good"] is False


def test_a_demo_stopped_at_once_has_a_report_too() -> None:
    empty = report(reads=0, acknowledged_writes=0, rows=0, seconds=0.0, waited=0, interrupted=True)
    assert "Stopped before its time." in as_table(empty)
    assert json.loads(as_json(empty))["requests_per_second"] == 0
