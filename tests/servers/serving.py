"""What the tests of all servers share: the example, its processes, and what must be left when they have ended."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crowd import Crowd
from machine import Processors, family, has_ended, times_open
from pool_support import PATIENCE, eventually

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mod_wsgi"

#: Shown: what is lost from a pool. Not shown: the sockets that the servers leave open.
WARNINGS = "always::ResourceWarning,ignore:unclosed <socket:ResourceWarning,ignore:unclosed file:ResourceWarning"

#: What one process may have open of the database, in one interpreter: `members.READERS`, and one that writes.
BOUND = 4 + 1
#: No write may wait for longer, in seconds.
LONGEST_WRITE = 0.2


def free_port() -> int:
    """Return a port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int, prefix: str = "") -> bool:
    """Tell whether the application is there, and well."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", f"{prefix}/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Watch:
    """Looks all the time at how often each process has the database open. Use as a context manager.

    Attributes:
        most: the largest number seen, by the process's number.
    """

    def __init__(self, pid: int, database: Path) -> None:
        self.most: dict[int, int] = {}
        self._pid = pid
        self._database = database
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._end.wait(0.05):
            for pid in family(self._pid):
                self.most[pid] = max(self.most.get(pid, 0), times_open(pid, self._database))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def users_of(pid: int, database: Path) -> list[int]:
    """Which processes of the family have the database open."""
    return [member for member in family(pid) if times_open(member, database)]


def kill_one(pid: int, database: Path) -> None:
    """SIGKILL one of those that have the database open, and wait until it has ended."""
    victim = next(member for member in reversed(users_of(pid, database)) if member != pid)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: has_ended(victim))


def work_calmly(crowd: Crowd, pid: int, seconds: float) -> None:
    """Let the crowd work, and see that all goes well and no write waits for long.

    The machine may have other things to do, which says nothing about us. So the second or third try is good enough, and
    one does not count in which other programs had much of the processors.
    """
    tries = []
    for _ in range(3):
        begin, processors = time.monotonic(), Processors(pid)
        time.sleep(seconds)
        crowd.check_nothing_failed_since(begin)
        longest = seconds if crowd.idle_since(begin) else crowd.longest("write", begin)
        if longest < LONGEST_WRITE:
            return
        tries.append((longest, processors.share_of_others()))
    print("the longest write of each try, in seconds, and what others had of the processors:", tries)
    assert all(others > 0.25 for _, others in tries), tries


def unexpected(log: str, expected: str) -> list[str]:
    """The lines of a log that are not what the pattern says."""
    return [line for line in log.splitlines() if not re.search(expected, line)]


def check_what_is_left(database: Path, crowd: Crowd) -> None:
    """See that every acknowledged write is in the file, and that the servers have left nothing else."""
    left = {path.name for path in database.parent.iterdir() if not path.name.startswith(f"{database.name}-gate")}
    assert left == {database.name}, left
    conn = sqlite3.connect(database)
    try:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",), "the database is damaged"
        crowd.check_counts(dict(conn.execute("SELECT name, visits FROM member")))
    finally:
        conn.close()


@contextmanager
def running(*command: str, port: int, database: Path, stop: int = signal.SIGTERM) -> Iterator[tuple[int, Path]]:
    """Run a server that is a Python module, and give its process's number and its log. It must end at the signal."""
    log = database.parent.parent / "server.log"
    environment = os.environ | {
        "MEMBERS_DATABASE": str(database),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE), str(Path(__file__).parent)]),
        "PYTHONWARNINGS": WARNINGS,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=log.parent, env=environment, stdout=output, stderr=output
        )
    try:
        eventually(lambda: answers(port) or server.poll() is not None)
        yield server.pid, log
        members = family(server.pid)
        server.send_signal(stop)
        server.wait(PATIENCE)
        eventually(lambda: all(map(has_ended, members)))
    except BaseException:
        print(log.read_text())
        raise
    finally:
        for member in family(server.pid):
            os.kill(member, signal.SIGKILL)
        server.wait()
