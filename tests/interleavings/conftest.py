"""What the scheduler of `frontrun` must find in the pool's modules, and what must not hide a mistake from it.

These tests are a group of their own, because `frontrun` replaces the locks of the whole process before anything else:

    python -m pytest --frontrun-patch-locks tests/interleavings

DEEPER=20 in the environment has each test try 20 times as many orders; add --timeout=0 then.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from operator import methodcaller
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out when the other tests are run."""
    return None if config.getoption("--frontrun-patch-locks", default=False) else True


@pytest.fixture(autouse=True)
def under_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scheduler have the clock and the conditions; nobody who waits looks around by itself.

    The modules bind both names when they are imported, before `frontrun` replaces what they stand for. A waiter that
    looks around now and then would heal a lost wake-up, and no test could see it.
    """
    monotonic = partial(methodcaller("monotonic"), time)  # looked up at each call, and no Python code to step through
    for module in ("pool", "lending", "books", "lease", "watched_pool"):
        monkeypatch.setattr(f"sqlitepool.{module}.monotonic", monotonic)
    monkeypatch.setattr("sqlitepool.waiting.Condition", lambda lock: threading.Condition(lock))
    monkeypatch.setattr("sqlitepool.lending._PATIENCE", 3600.0)
