"""Who takes turns at the same write gate in this process, and so might wait for a block that it is inside of.

A `Database` knows its own write blocks (`Writer.enclosing`). It does not know those of another `Database` on the same
file, and an isolated block cannot be joined: to wait for the right to write inside of one of these would never end.
"""

from __future__ import annotations

import contextlib
import weakref
from types import FrameType
from typing import Protocol

from sqlitepool.errors import PoolDeadlock
from sqlitepool.gate import Gate

#: Where `ExitStack` is at home.
CONTEXTLIB = contextlib.contextmanager.__code__.co_filename


class Claimant(Protocol):
    """Something that has the right to write at times: a `Writer`, or an isolated block."""

    def enclosing(self, frame: FrameType, /) -> object | None:
        """Return what encloses `frame` and has the right to write, if that is so and can be proved."""


class Claimants:
    """Those who take turns at one gate.

    Attributes:
        known: all of them, by weak references. Where there is one only, nobody else can be waited for in vain.
    """

    __slots__ = ("__weakref__", "known")

    def __init__(self) -> None:
        self.known: list[weakref.ref[Claimant]] = []

    def add(self, claimant: Claimant) -> None:
        """From now on `claimant` takes turns at the gate."""
        self.known.append(weakref.ref(claimant))

    def remove(self, claimant: Claimant | None) -> None:
        """Forget `claimant`, and whoever is gone."""
        self.known[:] = [one for one in self.known if one() not in (None, claimant)]

    def refuse_to_wait(self, frame: FrameType, own: Claimant) -> None:
        """See to it that nobody waits for the block of another one than `own` that encloses `frame`.

        Raises:
            PoolDeadlock: there is such a block.
        """
        claimants = [one() for one in self.known]
        for claimant in claimants:
            if claimant is not None and claimant is not own and claimant.enclosing(frame) is not None:
                raise PoolDeadlock(
                    "this call would wait for the right to write, which a block around it has: db.isolated(), or a "
                    "write block of another Database on the same file. Use the connection of that block"
                )
        if None in claimants:
            self.remove(None)


_claimants: weakref.WeakKeyDictionary[Gate, Claimants] = weakref.WeakKeyDictionary()


def claimants_of(gate: Gate) -> Claimants:
    """Return those who take turns at `gate`."""
    return _claimants.setdefault(gate, Claimants())


def caller(frame: FrameType) -> FrameType:
    """Return the frame that is to be named as the one that entered a block: not that of an `ExitStack`."""
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename == CONTEXTLIB:
        outer = outer.f_back
    return frame if outer is None else outer
