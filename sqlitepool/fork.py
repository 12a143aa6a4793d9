"""What a forked child may do: use its pools, which start empty, and never touch what it inherited.

An SQLite connection must not be carried across a fork (https://www.sqlite.org/howtocorrupt.html, section 2.6), and
closing it in the child is already too much: closing drops locks and may write. Interpreter exit and garbage collection
close connections too. So a child neither uses nor closes inherited items, and it makes them immortal: one reference
more than anybody will ever give back.

A fork is noticed in two ways. `os.register_at_fork` is prompt, but its hooks run only when Python itself forks; a
server that embeds Python may call `fork()` in C. So each checkout also looks at a page of memory that the kernel wipes
in the child (`MADV_WIPEONFORK`, Linux 4.14), which costs a tenth of `os.getpid()`; without such a page it asks for the
pid.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Protocol

try:
    import ctypes
except ImportError:  # a Python built without it
    ctypes = None  # type: ignore[assignment]

if sys.platform == "linux":
    import mmap  # which not every platform has

_MADV_WIPEONFORK = 18


class Forkable(Protocol):
    """A thing that must start anew in a forked child."""

    def _start_anew(self) -> None: ...


class _Page(Protocol):
    def __getitem__(self, index: int, /) -> int: ...


class _PidPage:
    """The slow stand-in for the wiped page: asks the kernel whose process this is."""

    def __getitem__(self, index: int, /) -> int:
        return os.getpid() == _pid


def _make_page() -> _Page:
    if not hasattr(os, "fork"):
        return b"\x01"
    if sys.platform == "linux":
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            page.madvise(_MADV_WIPEONFORK)
        except OSError:
            page.close()
        else:
            page[0] = 1
            return page
    return _PidPage()


_pid = os.getpid()
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
_kept: dict[int, object] = {}

#: `same_process[0]` is true in the process that last called `start_anew`, and false in a child that it forked.
same_process: _Page = _make_page()


def register(forkable: Forkable) -> None:
    """Have `forkable._start_anew()` called in every child."""
    _forkables.add(forkable)


def start_anew() -> None:
    """In a forked child: have every registered object start anew. Does nothing in the process that it knows."""
    global _pid
    if os.getpid() == _pid:
        return
    for forkable in list(_forkables):
        forkable._start_anew()
    _pid = os.getpid()
    if sys.platform == "linux" and isinstance(same_process, mmap.mmap):
        same_process[0] = 1


def keep_forever(thing: object) -> None:
    """Make `thing` immortal in this process, so that nothing ever finalizes it, interpreter exit included."""
    _kept[id(thing)] = thing
    if ctypes is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def is_kept(thing: object) -> bool:
    """Tell whether `thing` was inherited across a fork."""
    return id(thing) in _kept


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
