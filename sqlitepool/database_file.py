"""The file under a pool: whether it is still the one that the connections have open.

SQLite does not notice when somebody replaces or deletes the file of a database
(https://www.sqlite.org/howtocorrupt.html, section 4). The connections go on with the old file, which has no name any
more, and what they write is lost. Worse, the `-wal` beside it is found by its name: a new connection would replay the
old journal into the new file.
"""

from __future__ import annotations

import contextlib
import os

_FileId = tuple[int, int]


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

    def look(self) -> str | None:
        """Tell what happened to the file since `remember`: "replaced", "deleted", or nothing (None)."""
        found = _identify(self.path)
        if self._file is None or found == self._file:
            return None
        return "deleted" if found is None else "replaced"

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


def _identify(path: str) -> _FileId | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
