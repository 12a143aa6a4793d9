"""The files of the write gate: one gate per database file, its lock files, and what there is where they do not work."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gate_support import Holder, assert_sound, other_process_can_write, use
from pool_support import PATIENCE, open_files, start

from sqlitepool import file_lock, file_queue
from sqlitepool.errors import WriteTimeout
from sqlitepool.gate import Gate, gate_of


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "app.db"
    path.touch()
    return path


# -- one gate per file


def test_a_file_has_one_gate_whatever_its_paths(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gate_of(database)
    (tmp_path / "symlink.db").symlink_to(database)
    (tmp_path / "hard.db").hardlink_to(database)
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in ("app.db", "./app.db", str(database), "symlink.db", "hard.db", "folder/app.db"):
        assert gate_of(path) is gate, path
    assert gate_of(tmp_path / "symlink.db").database == str(database.resolve())


def test_a_file_that_was_replaced_has_a_new_gate(database: Path, tmp_path: Path) -> None:
    gate = gate_of(database)
    (tmp_path / "new.db").touch()
    os.replace(tmp_path / "new.db", database)
    other = gate_of(database)
    assert other is not gate
    with gate.turn(0):
        pass
    with other.turn(0):
        pass


def test_a_number_that_is_used_again_is_not_the_same_file(database: Path, tmp_path: Path) -> None:
    gate = gate_of(database)
    database.rename(tmp_path / "moved.db")  # as a new file with the number of one that was deleted
    other = gate_of(tmp_path / "moved.db")
    assert other is not gate
    assert other.database == str((tmp_path / "moved.db").resolve())


def test_there_is_no_gate_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gate_of(tmp_path / "missing.db")


def test_a_gate_that_nobody_has_closes_its_files(database: Path, tmp_path: Path) -> None:
    gate = gate_of(database)
    use(gate)
    assert open_files(tmp_path) == ["app.db-gate", "app.db-gate-queue"]
    del gate
    assert open_files(tmp_path) == []


def test_the_database_file_is_never_opened(database: Path, tmp_path: Path) -> None:
    opened: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and recording and isinstance(arguments[0], str):
            opened.append(os.path.basename(arguments[0]))

    recording = True
    sys.addaudithook(audit)
    use(gate_of(database))
    recording = False
    assert opened
    assert set(opened) <= {"app.db-gate", "app.db-gate-queue"}


# -- where there is no lock between processes


def fail(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def break_flock(monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    monkeypatch.setattr(file_lock, "flock", fail)


def break_the_queue(monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    monkeypatch.setattr(file_queue, "_lock", fail)


def break_opening(monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    monkeypatch.setattr(file_lock, "_open", fail)


def make_folder_in_the_way(monkeypatch: pytest.MonkeyPatch, database: Path) -> None:
    Path(f"{database}-gate").mkdir()


@pytest.mark.parametrize("what", [break_flock, break_the_queue, break_opening, make_folder_in_the_way])
def test_without_locks_the_gate_warns_once_and_works_in_this_process(
    what: Callable[[pytest.MonkeyPatch, Path], None], database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what(monkeypatch, database)
    gate = gate_of(database)
    with pytest.warns(RuntimeWarning, match="fair within this process only") as warned:
        use(gate)
    assert len(warned) == 1
    with Holder(gate), pytest.raises(WriteTimeout):
        use(gate, 0.01)
    start(use, gate).result(PATIENCE)


def test_a_warning_that_is_an_error_leaves_the_gate_free(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "flock", fail)
    gate = gate_of(database)
    with pytest.raises(RuntimeWarning):
        use(gate)
    use(gate)


def use_three_times(gate: Gate) -> None:
    for _ in range(3):
        start(use, gate).result(PATIENCE)


def test_flock_that_fails_later_is_no_end(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_of(database)
    use(gate)
    monkeypatch.setattr(gate._file, "barge", fail)
    with pytest.warns(RuntimeWarning, match="no locks available"):
        use_three_times(gate)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_enough_for_one_process(database: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.warns(RuntimeWarning, match="fair within this process only"):
            use(gate_of(database))
    finally:
        tmp_path.chmod(0o700)


def test_lock_files_that_were_deleted_are_made_again(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlitepool.process_gate.SLICE", 0.0)
    gate = Gate(str(database))
    use(gate)
    for name in ("app.db-gate", "app.db-gate-queue"):
        (tmp_path / name).unlink()
    with gate.turn(0):
        assert not other_process_can_write(str(database))
    assert_sound(gate)


def test_lock_files_have_the_rights_of_the_database(database: Path) -> None:
    database.chmod(0o664)
    before = os.umask(0o077)
    try:
        use(gate_of(database))
    finally:
        os.umask(before)
    for suffix in ("-gate", "-gate-queue"):
        assert os.stat(f"{database}{suffix}").st_mode & 0o777 == 0o664
