"""What docs/scope.md says: its code runs as it stands there, and what it warns of is so."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, start
from storm import Item

from sqlitepool import Connection, ConnectionPool, Pool, PoolDeadlock, PoolTimeout, Scope

PAGE = Path(__file__).parents[1] / "docs" / "scope.md"


@pytest.fixture
def scope() -> Iterator[Scope[Item]]:
    with Pool(Item, max_size=4, timeout=PATIENCE) as pool:
        yield Scope(pool)


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, "scope.md", "exec"), names)
    assert capsys.readouterr().out == "1\n['/']\n"
    assert names["db"]._pool.close() == []


def test_generators_that_take_turns_have_an_item_each_by_open(scope: Scope[Item]) -> None:
    def work() -> Generator[Item, None, None]:
        with scope.open() as job:
            yield job.get()
            yield job.run(scope.get)

    one, other = work(), work()
    first, second = next(one), next(other)
    assert first is not second
    assert scope.get() not in (first, second)
    assert (next(one), next(other)) == (first, second)
    one.close()
    other.close()
    scope.release()
    assert scope._pool.stats().in_use == 0


def test_a_scope_in_a_context_manager_is_open_for_its_block(scope: Scope[Item]) -> None:
    @contextmanager
    def request() -> Iterator[Item]:
        with scope:
            yield scope.get()

    with request() as outer:
        assert scope.get() is outer
        with request() as inner:
            assert scope.get() is inner is not outer
        assert scope.get() is outer
    assert scope._pool.stats().in_use == 0


def test_nested_scopes_in_a_pool_too_small_wait_because_anybody_may_release() -> None:
    with Pool(Item, max_size=1, timeout=0.2) as pool:
        scope = Scope(pool)
        with scope:
            scope.get()
            with pytest.raises(PoolTimeout) as caught, scope:
                scope.get()
            assert not isinstance(caught.value, PoolDeadlock)
            with scope.open() as other:
                wait = start(other.get, PATIENCE)
                scope.release()
                assert isinstance(wait.result(PATIENCE), Item)


@pytest.mark.filterwarnings("ignore:.*was replaced:RuntimeWarning")
def test_a_thread_that_releases_goes_on_with_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "app.db"

    def tables(conn: Connection) -> list[str]:
        return [name for (name,) in conn.execute("SELECT name FROM sqlite_master")]

    with ConnectionPool(path) as pool:
        scope = Scope(pool)
        scope.get().execute("CREATE TABLE old (n)")
        restored = sqlite3.connect(tmp_path / "restored.db")
        restored.execute("CREATE TABLE restored (n)")
        restored.close()
        os.replace(tmp_path / "restored.db", path)
        assert tables(scope.get()) == ["old"]
        scope.release()
        assert tables(scope.get()) == ["restored"]
        scope.release()
