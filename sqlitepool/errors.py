"""The errors of sqlitepool.

None of them is a `sqlite3.Error`: code that retries on "database is locked" must not take an exhausted pool for a
busy database.
"""


class PoolError(Exception):
    """The root of all errors of this library."""


class PoolTimeout(PoolError, TimeoutError):
    """No item came free in time. The message says who holds them, since when and where they were taken."""


class WriteTimeout(PoolTimeout):
    """The right to write could not be had in time."""


class QueryTimeout(PoolError, TimeoutError):
    """A query ran longer than its time limit and was interrupted."""


class PoolClosed(PoolError):
    """The pool is closed, or was closed while the caller waited."""


class PoolFull(PoolError):
    """As many callers wait already as `max_waiting` allows."""


class PoolDeadlock(PoolError):
    """Every item is held by a `with` block whose own thread waits for this pool: nobody could ever go on."""


class ForeignItem(PoolError, ValueError):
    """The item is not on loan from this pool: returned twice, or never lent by it."""


class FileReplaced(PoolError):
    """The database file was replaced or deleted while the pool had it open, and that cannot be passed over.

    By `if_replaced="raise"`; or because a block was about to commit to the file that is gone; or because a connection
    to the old file is still lent, beside which none to the new one is opened.
    """
