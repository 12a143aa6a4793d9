"""Interleavings of threads that use real SQLite connections."""

from __future__ import annotations

from scene import explore

from sqlitepool import ConnectionPool


class Counter:
    """A number in a database."""

    def __init__(self) -> None:
        self.pool = ConnectionPool(":memory:", max_size=1, name="counter")
        with self.pool.connection() as conn:
            conn.execute("CREATE TABLE counter (n INTEGER)")
            conn.execute("INSERT INTO counter VALUES (0)")

    def count(self) -> None:
        with self.pool.connection(timeout=100) as conn:
            (n,) = conn.execute("SELECT n FROM counter").fetchone()
            conn.execute("UPDATE counter SET n = ?", (n + 1,))

    def spoil(self) -> None:
        conn = self.pool.acquire(timeout=100)
        conn.row_factory = lambda cursor, row: None
        conn.execute("UPDATE counter SET n = 100")
        conn.rollback()
        self.pool.release(conn)

    def assert_is(self, n: int) -> None:
        with self.pool.connection(timeout=0) as conn:
            assert not conn.in_transaction
            assert conn.execute("SELECT n FROM counter").fetchall() == [(n,)]
        assert repr(self.pool) == "<ConnectionPool 'counter': size 1 of at most 1, 1 idle, 0 waiting>"
        self.pool.close()


def test_a_block_is_committed_before_the_next_borrower_begins() -> None:
    explore(Counter, [Counter.count, Counter.count], lambda counter: counter.assert_is(2))


def test_what_one_borrower_changes_never_reaches_the_next() -> None:
    explore(Counter, [Counter.count, Counter.spoil], lambda counter: counter.assert_is(1))
