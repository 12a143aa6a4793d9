"""sqlitepool: bounded pools that lend SQLite connections, or objects that wrap them, to threads."""

from importlib.metadata import PackageNotFoundError, version

from sqlitepool.connection_pool import ConnectionPool
from sqlitepool.database import Database
from sqlitepool.errors import (
    FileReplaced,
    ForeignItem,
    PoolClosed,
    PoolDeadlock,
    PoolError,
    PoolFull,
    PoolTimeout,
    QueryTimeout,
    WriteTimeout,
)
from sqlitepool.pool import Pool
from sqlitepool.scope import OpenScope, Scope
from sqlitepool.statements import WriteResult
from sqlitepool.stats import DatabaseStats, Durations, GateHolder, LeaseInfo, PoolStats
from sqlitepool.tracking import Connection
from sqlitepool.wal import CheckpointResult

try:
    __version__ = version("sqlitepool")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CheckpointResult",
    "Connection",
    "ConnectionPool",
    "Database",
    "DatabaseStats",
    "Durations",
    "FileReplaced",
    "ForeignItem",
    "GateHolder",
    "LeaseInfo",
    "OpenScope",
    "Pool",
    "PoolClosed",
    "PoolDeadlock",
    "PoolError",
    "PoolFull",
    "PoolStats",
    "PoolTimeout",
    "QueryTimeout",
    "Scope",
    "WriteResult",
    "WriteTimeout",
]
