"""`Scope`: an item for each request or thread, taken at its first use and kept until the scope ends."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import gc
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, eventually, start
from storm import Item, assert_sound, at_opcode, count_up, interrupt

from sqlitepool import ConnectionPool, Database, Pool, PoolClosed, PoolTimeout, Scope

LEFT_OPEN = "was never closed"


@pytest.fixture
def pool() -> Iterator[Pool[Item]]:
    with Pool(Item, max_size=4, timeout=PATIENCE) as made:
        yield made


@pytest.fixture
def scope(pool: Pool[Item]) -> Scope[Item]:
    return Scope(pool)


def numbers(pool: ConnectionPool[Any]) -> list[int]:
    with pool.connection() as conn:
        return [n for (n,) in conn.execute("SELECT n FROM t ORDER BY n")]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ConnectionPool[Any]]:
    with ConnectionPool(tmp_path / "app.db") as made:
        with made.connection() as conn:
            conn.execute("CREATE TABLE t (n INTEGER)")
        yield made


def start_and_join(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE)


def in_use(scope: Scope[Any]) -> int:
    return scope._pool.stats().in_use


# -- one scope


def test_the_item_is_taken_at_first_use_and_returned_at_the_end(scope: Scope[Item]) -> None:
    with scope:
        assert in_use(scope) == 0
        item = scope.get()
        assert in_use(scope) == 1
        assert scope.get() is item
        assert in_use(scope) == 1
    assert in_use(scope) == 0
    with scope:
        pass
    assert scope._pool.stats().checkouts == 1


def test_the_item_is_returned_when_the_block_raises(scope: Scope[Item]) -> None:
    def serve() -> None:
        with scope:
            scope.get()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        serve()
    assert in_use(scope) == 0


def test_a_block_commits_when_it_succeeds_and_rolls_back_when_it_raises(files: ConnectionPool[Any]) -> None:
    scope = Scope(files)

    def divide(number: int, by: int) -> None:
        with scope:
            scope.get().execute("INSERT INTO t VALUES (?)", (number,))
            number / by

    divide(1, 1)
    with pytest.raises(ZeroDivisionError):
        divide(2, 0)
    assert numbers(files) == [1]


def test_what_is_open_at_close_is_rolled_back_with_a_warning(files: ConnectionPool[Any]) -> None:
    request = Scope(files).open()
    request.get().execute("INSERT INTO t VALUES (1)")
    with pytest.warns(RuntimeWarning, match=r"test_scope\.py:\d+ in test_what_is_open"):
        request.close()
    request.close()
    assert numbers(files) == []


def test_nested_scopes_have_an_item_each(scope: Scope[Item]) -> None:
    with scope:
        outer = scope.get()
        with scope:
            inner = scope.get()
            assert inner is not outer
            assert scope.get() is inner
        assert scope.get() is outer
        assert in_use(scope) == 1


def test_scopes_over_two_pools_know_nothing_of_each_other(scope: Scope[Item]) -> None:
    with Pool(Item) as other_pool:
        other = Scope(other_pool)
        with scope, other:
            assert scope.get() is not other.get()
            assert (in_use(scope), in_use(other)) == (1, 1)


def test_blocks_may_end_in_another_order_than_they_began(scope: Scope[Item]) -> None:
    def serve() -> Generator[Item, None, None]:
        with scope:
            yield scope.get()
            yield scope.get()

    first, second = serve(), serve()
    one, other = next(first), next(second)
    with scope:
        mine = scope.get()
        first.close()
        assert scope.get() is mine
        assert in_use(scope) == 2
        second.close()
        assert scope.get() is mine
    assert len({id(one), id(other), id(mine)}) == 3
    assert in_use(scope) == 0
    scope.get()  # none of those that have ended is current again
    scope.release()


def test_an_exit_stack_ends_the_scope_that_it_entered(scope: Scope[Item]) -> None:
    with ExitStack() as stack:
        stack.enter_context(scope)
        outer = scope.get()
        stack.enter_context(scope)
        assert scope.get() is not outer
    assert in_use(scope) == 0


def test_a_block_that_ends_where_it_is_not_open_says_so(scope: Scope[Item]) -> None:
    with pytest.raises(RuntimeError, match="in the context in which it began"):
        scope.__exit__(None, None, None)


def test_an_item_that_was_discarded_is_replaced(scope: Scope[Item]) -> None:
    with scope:
        item = scope.get()
        scope._pool.discard(item)
        assert item.closed
        assert scope.get() is not item
    assert_sound(scope._pool, 4)


def test_an_item_may_be_returned_before_the_scope_ends(scope: Scope[Item]) -> None:
    with scope:
        scope.get()
        scope.release()
        assert in_use(scope) == 0
        scope.get()
        assert in_use(scope) == 1
    scope.get()
    scope.release()
    assert in_use(scope) == 0


# -- what is open where


def test_each_thread_sees_its_own_scope(scope: Scope[Item]) -> None:
    everybody = threading.Barrier(4)

    def serve() -> Item:
        with scope:
            item = scope.get()
            everybody.wait(PATIENCE)
            assert scope.get() is item
            return item

    assert len({id(call.result(PATIENCE)) for call in [start(serve) for _ in range(4)]}) == 4
    assert in_use(scope) == 0


def test_each_task_sees_its_own_scope(scope: Scope[Item]) -> None:
    async def serve(everybody: asyncio.Barrier) -> Item:
        with scope:
            item = scope.get()
            await everybody.wait()
            assert scope.get() is item
            return item

    async def main() -> list[Item]:
        everybody = asyncio.Barrier(4)
        return await asyncio.gather(*(serve(everybody) for _ in range(4)))

    assert len(set(map(id, asyncio.run(main())))) == 4
    assert in_use(scope) == 0


def test_work_in_a_copied_context_belongs_to_the_scope_until_that_ends(scope: Scope[Item]) -> None:
    with scope:
        item = scope.get()
        context = contextvars.copy_context()
        assert start(context.run, scope.get).result(PATIENCE) is item
    with pytest.raises(PoolClosed, match=r"test_scope\.py:\d+ in test_work_in_a_copied.* has ended.*of its own"):
        context.run(scope.get)


def test_without_a_scope_the_item_is_bound_to_the_thread_and_returned_when_that_ends(scope: Scope[Item]) -> None:
    seen, go = threading.Event(), threading.Event()

    def serve() -> None:
        item = scope.get()
        assert scope.get() is item
        with scope:
            assert scope.get() is not item
        assert scope.get() is item
        del item
        seen.set()
        assert go.wait(PATIENCE)

    thread = threading.Thread(target=serve)
    thread.start()
    assert seen.wait(PATIENCE)
    assert in_use(scope) == 1
    go.set()
    thread.join(PATIENCE)
    assert in_use(scope) == 0
    assert scope._pool.stats().reclaimed == 0


def test_a_thread_that_ends_serves_whoever_waits_at_once() -> None:
    with Pool(Item, max_size=1, timeout=PATIENCE) as pool:
        scope = Scope(pool)
        waits = threading.Event()

        def hold() -> None:
            scope.get()
            waits.wait(PATIENCE)

        holder = threading.Thread(target=hold)
        holder.start()
        eventually(lambda: pool.stats().in_use == 1)
        waiter = start(pool.acquire)
        eventually(lambda: pool.stats().waiting == 1)
        waits.set()
        pool.release(waiter.result(PATIENCE))
        holder.join(PATIENCE)
        assert pool.stats().reclaimed == 0


def test_a_thread_that_python_did_not_start_returns_its_item_too(scope: Scope[Item]) -> None:
    _thread.start_new_thread(lambda: scope.get(), ())
    eventually(lambda: (scope._pool.stats().checkouts, in_use(scope)) == (1, 0))
    assert threading._active.keys() <= {thread.ident for thread in threading.enumerate()}  # type: ignore[attr-defined]


def test_a_pool_of_threads_keeps_an_item_each_and_opens_no_more(scope: Scope[Item]) -> None:
    with ThreadPoolExecutor(3) as threads:
        items = list(threads.map(lambda _: id(scope.get()), range(100)))
    assert len(set(items)) <= 3
    assert in_use(scope) == 0


# -- a scope that is an object: the edges


def test_an_open_scope_moves_between_threads_and_is_current_only_in_its_run(scope: Scope[Item]) -> None:
    request = scope.open()
    item = start(request.get).result(PATIENCE)
    assert start(request.run, scope.get).result(PATIENCE) is item
    assert request.run(scope.get) is request.get() is item
    assert scope.get() is not item
    scope.release()
    del item
    gc.collect()  # its thread has ended, and nothing but the scope refers to the item
    assert in_use(scope) == 1
    assert scope._pool.stats().reclaimed == 0
    start(request.close).result(PATIENCE)
    assert in_use(scope) == 0
    with pytest.raises(PoolClosed, match="has ended"):
        request.get()


def test_an_open_scope_is_a_block_too(files: ConnectionPool[Any]) -> None:
    with Scope(files).open() as request:
        request.get().execute("INSERT INTO t VALUES (1)")
    assert request.is_closed
    assert "closed, opened at" in repr(request)
    assert numbers(files) == [1]


def test_threads_that_share_a_scope_take_one_item() -> None:
    go = threading.Event()

    def open_slowly() -> Item:
        assert go.wait(PATIENCE)
        return Item()

    with Pool(open_slowly, timeout=PATIENCE) as pool, Scope(pool).open() as request:
        asking = threading.Barrier(3)

        def ask() -> Item:
            asking.wait(PATIENCE)
            return request.get()

        calls = [start(ask) for _ in range(2)]
        asking.wait(PATIENCE)
        eventually(lambda: pool.stats().opening)
        time.sleep(0.05)  # so that the other one, if nothing stopped it, would open an item too
        go.set()
        assert len({id(call.result(PATIENCE)) for call in calls}) == 1
        assert pool.stats().checkouts == 1


def test_a_scope_left_open_is_reported_with_where_it_was_opened(scope: Scope[Item]) -> None:
    with pytest.warns(ResourceWarning, match=rf"test_scope\.py:\d+ in test_a_scope_left_open.*{LEFT_OPEN}"):
        scope.open()

    def leave() -> None:
        scope.__enter__()
        scope.get()

    with pytest.warns(ResourceWarning, match=rf"test_scope\.py:\d+ in .*leave, {LEFT_OPEN}"):
        start_and_join(leave)
    assert in_use(scope) == 0


@pytest.mark.filterwarnings("ignore:.*was lost without being returned:ResourceWarning")
@pytest.mark.filterwarnings(f"ignore:.*{LEFT_OPEN}:ResourceWarning")
def test_the_item_of_a_scope_left_open_comes_back(scope: Scope[Item]) -> None:
    request = scope.open()
    request.get()
    del request
    gc.collect()
    assert in_use(scope) == 0


# -- over what


def test_a_scope_over_wrapped_connections_gives_the_wrapper(tmp_path: Path) -> None:
    class UserDatabase:
        def __init__(self, conn: sqlite3.Connection) -> None:
            self.conn = conn

    with ConnectionPool(tmp_path / "app.db", wrap=UserDatabase) as pool:
        scope = Scope(pool)
        with scope:
            assert isinstance(scope.get(), UserDatabase)


def test_a_scope_over_a_database_reads_and_sees_what_is_written_meanwhile(tmp_path: Path) -> None:
    with Database(tmp_path / "app.db") as db:
        scope = Scope(db)
        db.execute_write("CREATE TABLE t (n INTEGER)")
        with scope:
            conn = scope.get()
            assert conn.execute("SELECT count(*) FROM t").fetchall() == [(0,)]
            db.execute_write("INSERT INTO t VALUES (1)")
            assert conn.execute("SELECT count(*) FROM t").fetchall() == [(1,)]
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                conn.execute("INSERT INTO t VALUES (2)")
            assert db.stats().readers.in_use == 1
        assert db.stats().readers.in_use == 0
    with pytest.raises(PoolClosed), scope:
        scope.get()


@pytest.mark.parametrize("thing", [None, "app.db", Item, Item()])
def test_a_scope_over_anything_else_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="a Pool, a ConnectionPool or a Database"):
        Scope(thing)


def test_errors_of_the_pool_come_through_and_leave_nothing_behind() -> None:
    with Pool(Item, max_size=1) as pool:
        scope = Scope(pool)
        with pool.connection(), pytest.raises(PoolTimeout), scope:
            scope.get(timeout=0)
        with scope:
            scope.get(timeout=0)
        assert_sound(pool, 1)
    with pytest.raises(PoolClosed), scope:
        scope.get()


# -- forks and interruptions


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_in_a_forked_child_an_open_scope_goes_on_with_an_item_of_its_own(scope: Scope[Item]) -> None:
    bound = scope.get()
    with scope:
        item = scope.get()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                mine = scope.get()
                assert mine is not item
                assert mine is not bound
                assert scope.get() is mine
                scope.__exit__(None, None, None)
                assert scope.get() is not bound
                assert not item.closed
                assert in_use(scope) == 1
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert scope.get() is item
    assert scope.get() is bound
    scope.release()


def use(scope: Scope[Item]) -> None:
    with scope:
        scope.get()
        with scope.open() as request:
            request.run(scope.get)
            scope.release()


def use_thread(scope: Scope[Item]) -> None:
    scope.get()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("work", [use, use_thread])
def test_interrupted_between_any_two_steps_nothing_is_lost(work: Callable[[Scope[Item]], None]) -> None:
    with Pool(Item, max_size=2, timeout=PATIENCE) as pool:
        scope = Scope(pool)
        for number in count_up(7):
            seen = at_opcode(number, interrupt, lambda: work(scope))
            gc.collect()
            assert_sound(pool, 2)
            if seen < number:
                break
