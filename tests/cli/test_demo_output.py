"""The demo whose output nobody reads, and who is interrupted more than once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEMO = [sys.executable, "-X", "dev", "-W", "error", "-m", "sqlitepool", "demo"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a folder for temporary files, which must be empty again at the end."""
    yield os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    assert list(tmp_path.iterdir()) == [], "the demo left temporary files behind"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_no_error_to_talk_about(environment: dict[str, str], options: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [*DEMO, "--seconds", "1.2", "--threads", "2", *options]
        ended = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_no_output_at_all(environment: dict[str, str]) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *DEMO, "--seconds", "1.2", "--threads", "2"]
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("pause", [0.0, 0.003, 0.03])
def test_an_impatient_user_leaves_nothing_behind(environment: dict[str, str], pause: float) -> None:
    with subprocess.Popen(
        [*DEMO, "--seconds", "600", "--threads", "4"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(3):
                process.send_signal(signal.SIGINT)
                time.sleep(pause)
            process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in (130, -signal.SIGINT)


INTERRUPTED_AT_ITS_END = """
import os, runpy, signal, sys, threading
from sqlitepool.cli.demo_load import Load

def interrupted(load):
    raise KeyboardInterrupt

Load._finish = interrupted
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
sys.argv = ["sqlitepool", "demo", "--seconds", "600", "--threads", "2"]
runpy.run_module("sqlitepool", run_name="__main__")
"""


def test_a_second_ctrl_c_ends_the_demo_wherever_it_strikes(environment: dict[str, str]) -> None:
    """Here before the clients were told to stop, of which the process would wait for each."""
    command = [sys.executable, "-c", INTERRUPTED_AT_ITS_END]
    ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=60)
    assert ended.returncode == 130
