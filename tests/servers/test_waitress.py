"""The example under waitress: one process with many threads."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from crowd import Crowd
from pool_support import eventually
from serving import BOUND, Watch, answers, check_what_is_left, free_port, running, unexpected, work_calmly


@pytest.fixture
def database(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "members.db"


def waitress(port: int, database: Path) -> AbstractContextManager[tuple[int, Path]]:
    options = (f"--listen=127.0.0.1:{port}", "--threads=16")
    return running("waitress", *options, "members:application", port=port, database=database, stop=signal.SIGINT)


def test_nothing_fails_or_waits_under_load_and_ctrl_c_leaves_a_tidy_folder(database: Path) -> None:
    port = free_port()
    with waitress(port, database) as (pid, log):
        with Watch(pid, database) as watch, Crowd(port) as crowd:
            crowd.wait_until_all_came(1)
            work_calmly(crowd, pid, seconds=2)
        print(crowd, watch.most)
    check_what_is_left(database, crowd)
    assert 1 < max(watch.most.values()) <= BOUND
    assert unexpected(log.read_text(), "INFO:waitress:Serving on|Task queue depth") == []


def test_sigterm_ends_it_at_once_and_what_was_acknowledged_is_there_at_the_next_start(database: Path) -> None:
    port = free_port()
    with waitress(port, database) as (pid, _), Crowd(port) as crowd:
        crowd.wait_until_all_came(10)
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not answers(port))
    with waitress(port, database):
        pass
    check_what_is_left(database, crowd)
