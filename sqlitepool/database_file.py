"""The file under a pool: whether it is still the one that the connections have open.

SQLite does not notice when somebody replaces or deletes the file of a database
(https://www.sqlite.org/howtocorrupt.html, section 4). The connections go on with the old file, which has no name any
more, and what they write is lost. Worse, the `-wal` beside it is found by its name: a new connection would replay the
old journal into the new file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time

from sqlitepool.errors import PoolError

try:
    import fcntl
except ImportError:  # Windows, which has no fork either
    fcntl = None  # type: ignore[assignment]

_FileId = tuple[int, int]

# Where SQLite locks what, as (start, length): https://www.sqlite.org/fileformat2.html and walformat.html, "locks".
_SHARED_LOCK = (0x40000002, 510)  # in the database: it is in use
_READ_LOCKS = (123, 6)  # in the -shm: a reader needs this part of the journal, and the -shm itself is in use
# Errors of these kinds come from the disk or the file, not from the SQL.
_OF_THE_FILE = frozenset(
    (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN)
)
# How long to wait, in seconds, for another process that has just these locks to itself, as a checkpoint has.
_PATIENCE = 5.0

# Files that were open when this process was forked: not opened here yet, and opened since.
_inherited: set[_FileId] = set()
_guarded: set[_FileId] = set()


class DatabaseFile:
    """A database file and its journal, known by device and inode: `os.stat` is all that is safe on a live database.

    Attributes:
        path: the path of the file.
        looked_at: when `is_same` was asked last, in monotonic seconds, for the use of the caller.
        left: the file was replaced or deleted, and no connection to what is there now has been opened.
    """

    __slots__ = ("_file", "_journal", "_real_path", "left", "looked_at", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.looked_at = 0.0
        self.left = False
        self._real_path = path
        self._file: _FileId | None = None
        self._journal: _FileId | None = None

    def remember(self) -> None:
        """Note which file and journal there are. To be called when a connection to them is open."""
        self._file = _identify(self.path)
        self._real_path = os.path.realpath(self.path)  # SQLite follows links, and has the journal beside the file
        self._journal = _identify(f"{self._real_path}-wal")

    def identify(self) -> _FileId | None:
        """Return what the file that is there now is known by, None if there is none."""
        return _identify(self.path)

    def was_opened_as(self, file: _FileId) -> bool:
        """Tell whether `remember` found that file, which `identify` had found before the connection was opened.

        If not, nobody knows which one was opened, and the one before counts as left.
        """
        if self._file == file:
            return True
        self._file = file
        self.left = True
        return False

    def look(self) -> str | None:
        """Tell what happened to the file since `remember`: "replaced", "deleted", or nothing (None)."""
        found = _identify(self.path)
        if self._file is None or found == self._file:
            return None
        return "deleted" if found is None else "replaced"

    def inherit(self) -> None:
        """In a forked child: note that connections to the file were open when it was forked."""
        if self._file is not None:
            _inherited.add(self._file)
        _inherited.update(_guarded)
        _guarded.clear()

    def hold_inherited_locks(self) -> None:
        """In a forked child: take the locks on the file that SQLite believes to have. Before a connection is opened.

        SQLite counts the locks of a process in its memory, which a child inherits; the locks themselves it does not. A
        connection opened in the child finds them counted already, and takes none. For other processes it is not there:
        they would delete the `-wal` that it writes to. So what may be missing is taken here, for the life of the child.
        What this costs: as long as the child lives, the `-wal` is neither deleted nor begun anew. A right to write that
        the parent had at that moment stays taken in the child, whose writes meet "database is locked". Without a `-wal`
        nothing is done: SQLite then has a lock only while it reads or writes.

        Raises:
            PoolError: another process keeps the locks to itself.
        """
        if not _inherited or fcntl is None:
            return
        path = os.path.realpath(self.path)
        file = _identify(path)
        if file is None or file not in _inherited:
            return
        if _identify(f"{path}-shm") is not None:
            for name, (start, length) in ((path, _SHARED_LOCK), (f"{path}-shm", _READ_LOCKS)):
                # never closed: that would drop every lock of this process on the file
                _lock(os.open(name, os.O_RDONLY | os.O_CLOEXEC), start, length, path)
        _guarded.add(file)
        _inherited.discard(file)

    def set_journal_aside(self) -> str | None:
        """Rename what is left of the old file's journal, and return its new path, None if there was none.

        It may hold the last commits to the old file, so it is kept. Needs all connections to the old file closed.

        Raises:
            OSError: the folder may not be written.
        """
        journal = f"{self._real_path}-wal"
        if self._journal is None or _identify(journal) != self._journal:
            return None
        aside = f"{journal}-replaced"
        os.replace(journal, aside)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._real_path}-shm")
        return aside


def name_file(error: BaseException, path: str | None, step: str) -> None:
    """Note in an error that the file system or a damaged file is behind which file it was and at which step."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _OF_THE_FILE and path is not None and not getattr(error, "__notes__", None):
        error.add_note(f"sqlitepool: {step}, on {path} ({getattr(error, 'sqlite_errorname', code)})")


def is_inherited(path: str) -> bool:
    """In a forked child: tell whether connections to the file were open when this process was forked."""
    file = _identify(path)
    return file in _inherited or file in _guarded


def _identify(path: str) -> _FileId | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _lock(descriptor: int, start: int, length: int, path: str) -> None:
    """Take a shared lock."""
    assert fcntl is not None
    for _ in range(int(_PATIENCE * 1000)):
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, length, start)
            return
        except OSError:
            time.sleep(0.001)
    raise PoolError(
        f"{path} was open when this process was forked, and another process keeps it from being opened safely here: "
        "fork before the first use of the pool"
    )
