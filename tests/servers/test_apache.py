"""The example under a real Apache with mod_wsgi: under load, through a graceful restart and the death of a process.

Skipped where Apache is not installed, unless SQLITEPOOL_REQUIRE_APACHE is set. Apache has a Python of its own, so it is
enough to run this on one.
"""

from __future__ import annotations

import os
import time

import pytest
from apache import Apache, find_apache
from crowd import Crowd
from serving import BOUND, Watch, check_what_is_left, kill_one, unexpected, work_calmly

try:
    find_apache()
except FileNotFoundError as error:
    if os.environ.get("SQLITEPOOL_REQUIRE_APACHE"):
        raise
    pytest.skip(str(error), allow_module_level=True)

GLOBAL = ("%{GLOBAL}",)
SUB_INTERPRETERS = ("first", "second")

# What the log says of what the test itself does to the server.
EXPECTED = (
    r"\[(mpm_event|core):notice\] .*(resuming normal operations|Command line|Doing graceful restart)"
    r"|\[(mpm_event|core):notice\] .*(caught SIGTERM, shutting down|exit signal Killed)"
    r"|\[core:warn\] .*did not exit, sending a SIGTERM"  # after 3 s; if it comes to SIGKILL something is wrong
    # On a slow machine a thread is still busy with the end of its answer when the client has come again.
    r"|\[mpm_event:error\] .*(server (reached|is within MinSpareThreads of) MaxRequestWorkers|scoreboard is full)"
    r"|\[wsgi:warn\] .*mod_wsgi: (Compiled for|Runtime using) Python/"  # of two patch releases
    r"|Unable to connect to WSGI daemon process|Failed to proxy response from daemon|proxying data to daemon process"
    r"|Truncated or oversized response headers received from daemon process"
)


@pytest.mark.parametrize("groups", [GLOBAL, SUB_INTERPRETERS], ids=["main interpreter", "sub-interpreters"])
@pytest.mark.parametrize("mode", ["daemon", "embedded"])
def test_nothing_is_lost_under_load_through_a_restart_and_a_kill(mode: str, groups: tuple[str, ...]) -> None:
    with Apache(mode, groups) as apache:
        with Watch(apache.pid, apache.database) as watch, Crowd(apache.port, apache.prefixes) as crowd:
            crowd.wait_until_all_came(1)
            work_calmly(crowd, apache.pid, seconds=2)

            apache.restart_gracefully()
            restarted = time.monotonic()
            crowd.wait_until_all_came(8)
            crowd.check_all_went_well_since(restarted)

            kill_one(apache.pid, apache.database)
            killed = time.monotonic()
            crowd.wait_until_all_came(8)
            crowd.check_all_went_well_since(killed)
        print(crowd, watch.most)
        apache.stop()

        check_what_is_left(apache.database, crowd)
        assert 1 < max(watch.most.values()) <= BOUND * len(groups)
        assert len({process for process, _ in crowd.seen()}) > 1
        assert {group for _, group in crowd.seen()} == {group.replace("%{GLOBAL}", "") for group in groups}
        assert unexpected(apache.log, EXPECTED) == []
