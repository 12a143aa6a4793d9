"""The example under gunicorn: several workers with threads, which are replaced, and one of which is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from crowd import Crowd
from machine import family, has_ended
from pool_support import eventually
from serving import BOUND, Watch, check_what_is_left, free_port, kill_one, running, unexpected, work_calmly


@pytest.mark.parametrize(
    ("module", "options"),
    [("members", []), ("members", ["--preload"]), ("warmed_up", ["--preload"])],
    ids=["loaded by each worker", "loaded before the fork", "opened before the fork"],
)
def test_nothing_is_lost_under_load_through_a_restart_and_a_kill(
    module: str, options: list[str], tmp_path: Path
) -> None:
    database = tmp_path / "data" / "members.db"
    database.parent.mkdir()
    port = free_port()
    command = ["gunicorn", f"--bind=127.0.0.1:{port}", "--no-control-socket", "--worker-class=gthread"]
    workers = ["--workers=3", "--threads=8", *options, f"{module}:application"]
    with running(*command, *workers, port=port, database=database) as (pid, log):
        with Watch(pid, database) as watch, Crowd(port) as crowd:
            crowd.wait_until_all_came(1)
            work_calmly(crowd, pid, seconds=2)

            old = set(family(pid)) - {pid}
            os.kill(pid, signal.SIGHUP)
            eventually(lambda: all(map(has_ended, old)))
            restarted = time.monotonic()
            crowd.wait_until_all_came(8)
            crowd.check_all_went_well_since(restarted)

            kill_one(pid, database)
            killed = time.monotonic()
            crowd.wait_until_all_came(8)
            crowd.check_all_went_well_since(killed)
        print(crowd, watch.most)
    check_what_is_left(database, crowd)
    # A connection that was open at the fork cannot be closed in the worker, and one more descriptor holds its locks.
    inherited = watch.most[pid] + 1 if module == "warmed_up" else 0
    assert 1 < max(watch.most.values()) <= BOUND + inherited
    assert len({process for process, _ in crowd.seen()}) > 1
    assert unexpected(log.read_text(), r"\[INFO\]|\[ERROR\] Worker \(pid:\d+\) was sent SIGKILL!") == []
