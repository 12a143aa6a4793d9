"""What the kernel tells of processes: who descends from whom, what they have open, what they use of the processors."""

from __future__ import annotations

import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all that descend from it, without those that have ended."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path("/proc", entry, "stat").read_text().rpartition(") ")[2].split()[:2]
            except OSError:
                continue
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry))
    found = [pid] if any(pid in pids for pids in children.values()) else []
    for member in found:
        found += children.get(member, [])
    return found


def has_ended(pid: int) -> bool:
    """Tell whether no thread of a process runs any more, so that all it had open is closed.

    Its first thread may have ended before the others. And its number may stay in use, if nobody asks how it ended.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except OSError:
        return True


def times_open(pid: int, path: Path) -> int:
    """How many descriptors of a process point to a file. 0 if it has ended, or is about to."""
    count = 0
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                count += os.readlink(f"/proc/{pid}/fd/{descriptor}") == str(path)
            except OSError:
                pass
    except OSError:
        pass
    return count


class Processors:
    """From when it is made: who uses the processors, a family of processes together with this one, or others?

    A processor that waits for the disk counts as used by others.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._at_first = self._ticks()

    def share_of_others(self) -> float:
        """How much other programs have had since then: 0.0 nothing, 1.0 all processors all the time."""
        everybody, idle, ours = (now - then for now, then in zip(self._ticks(), self._at_first, strict=True))
        return (everybody - idle - ours) / max(everybody, 1)

    def _ticks(self) -> tuple[int, int, int]:
        with open("/proc/stat") as stat:
            ticks = [int(field) for field in stat.readline().split()[1:9]]  # user, nice, system, idle, iowait, ...
        return sum(ticks), ticks[3], sum(_ticks_of(pid) for pid in [os.getpid(), *family(self._pid)])


def _ticks_of(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
