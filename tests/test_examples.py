"""Each example runs by itself, as a reader would start it, and says what it is meant to show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SHOWS = {
    "one_writer_many_readers.py": ["800 transfers asked for", "the sums that the readers saw: {10000}"],
    "threaded_server.py": ["100 entries in the guest book", "connections served 101 threads"],
    "user_database.py": ["wrap=UserDatabase: 200 users", "Pool(lambda: ...): 400 users"],
}


def test_every_example_is_tried_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_runs_by_itself_and_ends(name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", ROOT / "examples" / name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stderr == ""
    assert ended.returncode == 0
    for text in SHOWS[name]:
        assert text in ended.stdout
    assert list(tmp_path.iterdir()) == [], "the example left files behind"
