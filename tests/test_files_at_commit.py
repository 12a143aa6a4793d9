"""A block does not commit to a file that is no longer there: nobody would ever see what it wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from test_files import look, make_database, path, read, told

from sqlitepool import Connection, ConnectionPool, FileReplaced, Scope

__all__ = ["path"]  # the fixture

Block = Callable[[ConnectionPool[Connection]], AbstractContextManager[Connection]]


@pytest.fixture(
    params=[lambda pool: pool.connection(), lambda pool: pool.transaction()], ids=["connection()", "transaction()"]
)
def block(request: pytest.FixtureRequest) -> Block:
    return request.param


def put_in_place(path: Path) -> None:
    make_database(path.with_suffix(".tmp"), "new")
    os.replace(path.with_suffix(".tmp"), path)


def write(conn: Connection) -> None:
    conn.execute("INSERT INTO t VALUES ('written')")


def write_and(block: AbstractContextManager[Connection], change: Callable[[Path], object], path: Path) -> None:
    with block as conn:
        write(conn)
        change(path)


def replace_and_fail(path: Path) -> None:
    put_in_place(path)
    raise LookupError


@pytest.mark.parametrize("change", [put_in_place, os.unlink], ids=["replaced", "deleted"])
def test_a_block_during_which_the_file_goes_fails_and_writes_nothing(path: Path, block: Block, change: Any) -> None:
    with ConnectionPool(path) as pool:
        with pytest.raises(FileReplaced, match="nothing of the block was written"):
            write_and(block(pool), change, path)
        if change is put_in_place:
            assert look(pool) == ["new"]


def test_at_once_after_the_file_was_replaced_nothing_is_written_to_the_old_one(path: Path, block: Block) -> None:
    """As long as a connection is lent the file is looked at once in a millisecond only, and before each COMMIT."""
    make_database(path.with_suffix(".tmp"), "new")
    with ConnectionPool(path) as pool:
        with pool.connection() as lent:
            assert read(lent) == look(pool) == ["old"]
            os.replace(path.with_suffix(".tmp"), path)
            with pytest.raises(FileReplaced), block(pool) as conn:
                write(conn)
        with told("opened anew"):
            assert look(pool) == ["new"]
        with block(pool) as conn:
            write(conn)
        assert look(pool) == ["new", "written"]


def test_a_scope_fails_too(path: Path) -> None:
    with ConnectionPool(path) as pool:
        scope = Scope(pool)
        with pytest.raises(FileReplaced), scope:
            write_and(nullcontext(scope.get()), put_in_place, path)


def test_who_has_only_read_notices_nothing(path: Path) -> None:
    with ConnectionPool(path) as pool:
        with pool.connection() as conn:
            assert read(conn) == ["old"]
            put_in_place(path)
        with told("opened anew"):
            assert look(pool) == ["new"]


def test_a_block_that_fails_by_itself_raises_its_own_error(path: Path, block: Block) -> None:
    with ConnectionPool(path) as pool:
        with pytest.raises(LookupError):
            write_and(block(pool), replace_and_fail, path)
        with told("opened anew"):
            assert look(pool) == ["new"]
