"""What callers may ask of a pool: checks with clear errors at the earliest moment, and the limits they set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

NEVER = float("inf")

# An item idle for this long (seconds) is looked at by `check` before it is lent.
_CHECK_AFTER = 1.0


def count(name: str, value: object, least: int) -> int:
    """Return `value` if it is a whole number of at least `least`.

    Raises:
        TypeError: it is not an int.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def seconds(name: str, value: object, *, above_zero: bool = False) -> float:
    """Return `value` as a float if it is a number of seconds that is not negative, or above zero if so wished.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, not a number in the sense of IEEE 754, or zero where that makes no sense.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not value >= 0 or (above_zero and value == 0):
        raise ValueError(f"{name} must be {'above' if above_zero else 'at least'} 0 seconds, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is a number of seconds beyond all bounds; None is for ever") from None


def optional_seconds(name: str, value: object, *, above_zero: bool = False) -> float | None:
    """Like `seconds`, but lets None pass, which an infinite number becomes: for ever."""
    found = NEVER if value is None else seconds(name, value, above_zero=above_zero)
    return found if found < NEVER else None


def timeout(value: float | EllipsisType | None) -> float | EllipsisType | None:
    """Check a `timeout` argument: seconds, None to wait for ever, `...` for the pool's own."""
    if value is not ...:
        optional_seconds("timeout", value)
    return value


def callable_or_none(name: str, value: object) -> None:
    """Raise TypeError if `value` is neither None nor callable."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {value!r}")


def sizes(max_size: object, min_size: object) -> tuple[int, int]:
    """Return both if they are whole numbers that fit together; raise TypeError or ValueError if not."""
    most, least = count("max_size", max_size, 1), count("min_size", min_size, 0)
    if least > most:
        raise ValueError(f"min_size must be at most max_size, not {least} > {most}")
    return most, least


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a pool that never change. Times are seconds; `Pool` says what each is for.

    Attributes:
        trusted_for: an item that was idle for less may be lent without a closer look.
        trim_every: how often the free items are looked through for those that are too old.
    """

    timeout: float | None
    max_waiting: int | None
    max_idle: float | None
    max_lifetime: float | None
    fairness: float
    trusted_for: float
    trim_every: float

    @classmethod
    def checked(
        cls,
        timeout: object,
        max_waiting: object,
        max_idle: object,
        max_lifetime: object,
        fairness: object,
        check: Callable[[Any], object] | None,
    ) -> Limits:
        """Return the limits that a caller asks for; raise TypeError or ValueError, naming the one that is wrong."""
        idle = optional_seconds("max_idle", max_idle, above_zero=True)
        lifetime = optional_seconds("max_lifetime", max_lifetime, above_zero=True)
        return cls(
            timeout=optional_seconds("timeout", timeout),
            max_waiting=None if max_waiting is None else count("max_waiting", max_waiting, 0),
            max_idle=idle,
            max_lifetime=lifetime,
            fairness=seconds("fairness", fairness),
            trusted_for=min(_CHECK_AFTER if check is not None else NEVER, idle or NEVER),
            trim_every=min(idle or NEVER, lifetime or NEVER) / 4,
        )

    def check_is_due(self, idle_for: float) -> bool:
        """Tell whether an item that was idle for so long needs a `check`."""
        return idle_for >= _CHECK_AFTER
