"""The file under a pool: whether it is still the one that the connections have open.

SQLite does not notice when somebody replaces or deletes the file of a database
(https://www.sqlite.org/howtocorrupt.html, section 4). The connections go on with the old file, which has no name any
more, and what they write is lost. Worse, the `-wal` beside it is found by its name: a new connection would replay the
old journal into the new file. So this process knows the journals of all files that it has open, whichever pool opened
them, and none of its connections finds one beside a file that it does not belong to.

Nor does SQLite notice in WAL mode that the file was emptied: it commits to the journal, which cannot be read without
the file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time

from sqlitepool import fork
from sqlitepool.errors import PoolError
from sqlitepool.waiting import locked

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
# The size of the smallest database, one page, in bytes. With WAL there is that much from the beginning.
_SMALLEST = 512

# Files that were open when this process was forked: not opened here yet, and opened since.
_inherited: set[_FileId] = set()
_guarded: set[_FileId] = set()


class _Journals:
    """Which journal belongs to which file, by the path of the file, as far as this process has them open."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[_FileId, _FileId]] = {}
        self._start_anew()
        fork.register(self)

    def _start_anew(self) -> None:
        self._lock = threading.RLock()

    def note(self, path: str, file: _FileId) -> bool:
        """Note that the journal beside `path` belongs to `file`, which a connection has open; tell if there is one."""
        return locked(self._lock, self._note, path, file)

    def _note(self, path: str, file: _FileId) -> bool:
        journal = _identify(f"{path}-wal")
        if journal is not None and (path not in self._owners or _identify(path) == file):
            self._owners[path] = file, journal
        return journal is not None

    def forget_if_gone(self, path: str) -> None:
        """After a connection was closed: the number of a journal that is no longer there may be used again."""
        locked(self._lock, self._forget_if_gone, path)

    def _forget_if_gone(self, path: str) -> None:
        known = self._owners.get(path)
        if known is not None and _identify(f"{path}-wal") != known[1]:
            del self._owners[path]

    def set_aside(self, path: str) -> str | None:
        """Rename the journal beside `path` if it belongs to another file than the one that is there now."""
        return locked(self._lock, self._set_aside, path)

    def _set_aside(self, path: str) -> str | None:
        journal = f"{path}-wal"
        known = self._owners.get(path)
        if known is None or _identify(path) == known[0] or _identify(journal) != known[1]:
            return None
        aside = f"{journal}-replaced"
        os.replace(journal, aside)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}-shm")
        return aside


_journals = _Journals()


class DatabaseFile:
    """A database file and its journal, known by device and inode: `os.stat` is all that is safe on a live database.

    Attributes:
        path: the path of the file.
        looked_at: when `look` was called last, in monotonic seconds, for the use of the caller.
        left: the file was replaced or deleted, and no connection to what is there now has been opened.
    """

    __slots__ = ("_file", "_has_journal", "_is_truncated", "_real_path", "left", "looked_at", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.looked_at = 0.0
        self.left = False
        self._real_path = path
        self._file: _FileId | None = None
        self._has_journal = self._is_truncated = False

    def identify(self) -> _FileId | None:
        """Return what the file that is there now is known by, None if there is none."""
        return _identify(self.path)

    def remember(self, before: _FileId | None) -> bool:
        """Note which file and journal there are. To be called when a connection to them is open.

        Args:
            before: what `identify` had found before the connection was opened.

        Returns:
            True; False if there is another file now: nobody knows which one was opened, and the one before counts as
            left.
        """
        found = _identify(self.path)
        self._file = file = found if before is None else before
        self.left = file != found
        self._is_truncated = False
        self._real_path = os.path.realpath(self.path)  # SQLite follows links, and has the journal beside the file
        self._has_journal = file is not None and _journals.note(self._real_path, file)
        return not self.left

    def look(self) -> str | None:
        """Tell what happened to the file since `remember`: "replaced", "deleted", "truncated", or nothing (None).

        It counts as truncated if nothing is left of its first page, until there is another file. SQLite itself cuts a
        file to fewer pages at times, so that proves nothing.
        """
        file = self._file
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None if file is None else "deleted"
        if file is None or (status.st_dev, status.st_ino) != file:
            return None if file is None else "replaced"
        if status.st_size < _SMALLEST and self._has_journal:
            self._is_truncated = True
        return "truncated" if self._is_truncated else None

    def closed(self) -> None:
        """Note that a connection was closed, perhaps the last one of the file."""
        _journals.forget_if_gone(self._real_path)

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
        """Rename the journal if it is known to belong to another file, and return its new path; None if it is not.

        It may hold the last commits to that file, so it is kept, instead of the one that was kept before. Connections
        to that file go on with both under their new names, or with none.

        Raises:
            OSError: the folder may not be written.
        """
        return _journals.set_aside(os.path.realpath(self.path))


def damage(what: str) -> sqlite3.DatabaseError:
    """Make the error for a file that SQLite does not know to be damaged."""
    error = sqlite3.DatabaseError(
        f"{what}: nothing can be read or written until a whole file is put in its place, at one stroke (os.replace)"
    )
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT"
    return error


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
