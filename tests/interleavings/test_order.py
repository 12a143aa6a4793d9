"""Interleavings of two and three threads, a test for each promise about who gets what, and when."""

from __future__ import annotations

import threading
import time

import pytest
from scene import Scene, Worker, explore

from sqlitepool import ForeignItem, PoolClosed, PoolTimeout

NEVER_IN_ORDER = 3600.0  # `fairness`: nobody waits for long enough, so that all depends on wake-ups
LONG = 100.0  # `timeout`: nobody should wait so long


def borrow(name: str, timeout: float = LONG) -> Worker:
    def worker(scene: Scene) -> None:
        scene.borrow(name, timeout=timeout)

    return worker


def take(scene: Scene) -> None:
    scene.take(timeout=LONG)


# -- promise 1: the bound


def test_bound_no_more_than_max_size_items_are_ever_alive() -> None:
    explore(
        lambda: Scene(max_size=1),
        [borrow("a"), borrow("b")],
        lambda scene: scene.assert_sound(max_size=1),
    )


def test_bound_holds_at_every_moment_for_who_looks() -> None:
    def look(scene: Scene) -> None:
        stats = scene.pool.stats()
        assert stats.idle + stats.in_use + stats.opening == stats.size <= 2
        assert min(stats.idle, stats.in_use, stats.opening) >= 0

    explore(
        lambda: Scene(max_size=2, ready=1),
        [borrow("a"), borrow("b"), look],
        lambda scene: scene.assert_sound(max_size=2),
    )


def test_bound_an_item_is_lent_to_one_at_a_time() -> None:
    explore(
        lambda: Scene(max_size=2, ready=2),
        [take, take],
        lambda scene: scene.assert_sound(max_size=2),
        at_random=30,
    )


# -- promise 3: fairness, and wake-ups


@pytest.mark.parametrize("fairness", [0, NEVER_IN_ORDER])
def test_no_wake_up_is_lost_between_two(fairness: float) -> None:
    explore(
        lambda: Scene(max_size=1, ready=1, fairness=fairness),
        [borrow("a"), borrow("b")],
        lambda scene: scene.assert_sound(max_size=1),
        at_random=30,
    )


@pytest.mark.parametrize("fairness", [0, NEVER_IN_ORDER])
def test_no_wake_up_is_lost_between_three(fairness: float) -> None:
    explore(
        lambda: Scene(max_size=1, ready=1, fairness=fairness),
        [borrow("a"), borrow("b"), borrow("c")],
        lambda scene: scene.assert_sound(max_size=1),
    )


@pytest.mark.parametrize("fairness", [0, NEVER_IN_ORDER])
def test_no_wake_up_is_lost_when_two_items_come_back(fairness: float) -> None:
    def both(scene: Scene) -> None:
        scene.give_back()
        scene.give_back()

    explore(
        lambda: Scene(max_size=2, lent=2, fairness=fairness),
        [take, take, both],
        lambda scene: scene.assert_sound(max_size=2),
    )


def test_at_most_one_wake_up_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two items come back while two sleep: one is notified, and the other not before the first has got up."""

    class Bed:
        """A condition that knows whether it has been notified and nobody got up yet."""

        def __init__(self, lock: object) -> None:
            self.condition = threading.Condition(lock)
            self.sleeps = False

        def wait(self, seconds: float) -> None:
            self.sleeps = True
            self.condition.wait(seconds)
            self.sleeps = False
            woken.clear()

        def notify(self) -> None:
            if self.sleeps:
                woken.append(self)
                assert len(woken) == 1, "a second wake-up"
            self.condition.notify()

    def both(scene: Scene) -> None:
        scene.give_back()
        scene.give_back()

    woken: list[Bed] = []

    def setup() -> Scene:
        woken.clear()
        return Scene(max_size=2, lent=2, fairness=NEVER_IN_ORDER)

    monkeypatch.setattr("sqlitepool.waiting.Condition", Bed)
    explore(setup, [take, take, both], lambda scene: scene.assert_sound(max_size=2))


@pytest.mark.parametrize("fairness", [0, NEVER_IN_ORDER])
def test_a_waiter_that_times_out_passes_its_wake_up_on(fairness: float) -> None:
    """The item comes back at the very moment at which the first waiter's time is up; the second must get it then."""

    def impatient(scene: Scene) -> None:
        try:
            scene.borrow("impatient", timeout=1)
        except PoolTimeout:
            scene.log.append(("timed out", scene.seconds))

    def return_late(scene: Scene) -> None:
        time.sleep(1)
        scene.give_back()

    explore(
        lambda: Scene(max_size=1, lent=1, fairness=fairness),
        [impatient, borrow("patient"), return_late],
        lambda scene: scene.assert_sound(max_size=1, seconds=1),
        at_random=6,
    )


@pytest.mark.parametrize("fairness", [0, 0.4])
def test_fairness_who_has_waited_longer_is_served_first(fairness: float) -> None:
    """Who returns the item asks for it again at once, and has to stand behind those who wait."""

    def second(scene: Scene) -> None:
        time.sleep(0.5)
        scene.borrow("second", timeout=LONG)

    def third(scene: Scene) -> None:
        time.sleep(1)
        scene.give_back()
        scene.borrow("third", timeout=LONG)

    def check(scene: Scene) -> None:
        assert scene.log == [("first", 1), ("second", 1), ("third", 1)]
        scene.assert_sound(max_size=1, seconds=1)

    explore(lambda: Scene(max_size=1, lent=1, fairness=fairness), [borrow("first"), second, third], check)


# -- promise 4: nothing is lost


def test_nothing_is_lost_when_a_block_raises_and_when_an_item_is_discarded() -> None:
    def fail(scene: Scene) -> None:
        try:
            with scene.pool.connection(timeout=LONG):
                raise LookupError
        except LookupError:
            pass

    def discard(scene: Scene) -> None:
        scene.pool.discard(scene.pool.acquire(timeout=LONG))

    explore(
        lambda: Scene(max_size=1, ready=1),
        [fail, discard],
        lambda scene: scene.assert_sound(max_size=1),
    )


def test_an_item_returned_by_two_threads_at_once_is_taken_back_once() -> None:
    def release(scene: Scene) -> None:
        try:
            scene.pool.release(scene.lent[0])
        except ForeignItem:
            scene.log.append("refused")

    def check(scene: Scene) -> None:
        assert scene.log == ["refused"]
        scene.lent.clear()
        scene.assert_sound(max_size=1)

    explore(lambda: Scene(max_size=1, lent=1), [release, release], check, at_random=100)


# -- promise 5: a failed open wakes the next waiter


def test_a_failed_open_wakes_the_next_waiter() -> None:
    class Failing(Scene):
        def open(self) -> object:
            if not self.log:
                self.log.append("failed")
                raise LookupError
            return super().open()

    def unlucky(scene: Scene) -> None:
        try:
            scene.borrow("unlucky", timeout=LONG)
        except LookupError:
            pass

    explore(
        lambda: Failing(max_size=1),
        [unlucky, unlucky],
        lambda scene: scene.assert_sound(max_size=1),
    )


# -- promise 10: close, drain, resize


def test_close_wakes_every_waiter_with_pool_closed() -> None:
    def wait(scene: Scene) -> None:
        with pytest.raises(PoolClosed):
            scene.borrow("nobody", timeout=LONG)

    def check(scene: Scene) -> None:
        assert scene.seconds == 0
        scene.give_back()
        assert not scene.alive

    explore(lambda: Scene(max_size=1, lent=1), [wait, wait, lambda scene: scene.pool.close()], check)


def test_close_leaves_nothing_open_whenever_items_come_back() -> None:
    def maybe(scene: Scene) -> None:
        try:
            scene.borrow("maybe", timeout=LONG)
        except PoolClosed:
            pass

    def check(scene: Scene) -> None:
        assert scene.seconds == 0
        assert not scene.alive
        assert repr(scene.pool) == "<Pool 'stage': closed, size 0 of at most 2, 0 idle, 0 waiting>"

    explore(lambda: Scene(max_size=2, ready=1), [maybe, maybe, lambda scene: scene.pool.close()], check)


def test_close_with_a_timeout_returns_when_the_last_item_has_come_back() -> None:
    def close(scene: Scene) -> None:
        assert scene.pool.close(timeout=LONG) == []

    def check(scene: Scene) -> None:
        assert scene.seconds == 0
        assert not scene.alive

    explore(lambda: Scene(max_size=1, lent=1), [close, Scene.give_back], check)


def test_resize_up_serves_the_waiters() -> None:
    explore(
        lambda: Scene(max_size=1, lent=1),
        [take, take, lambda scene: scene.pool.resize(3)],
        lambda scene: scene.assert_sound(max_size=3),
    )


def test_resize_down_closes_what_is_too_many() -> None:
    explore(
        lambda: Scene(max_size=2, lent=2),
        [Scene.give_back, Scene.give_back, lambda scene: scene.pool.resize(1)],
        lambda scene: scene.assert_sound(max_size=1),
    )


def test_drain_replaces_every_item() -> None:
    def drain(scene: Scene) -> None:
        scene.log.append(list(scene.alive))
        scene.pool.drain()

    def check(scene: Scene) -> None:
        old = next(entry for entry in scene.log if isinstance(entry, list))
        scene.assert_sound(max_size=2)
        assert all(item.closed for item in old)

    explore(lambda: Scene(max_size=2, ready=1, lent=1), [borrow("a"), Scene.give_back, drain], check)
