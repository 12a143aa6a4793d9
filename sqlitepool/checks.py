"""Checks of what callers pass in: a clear error at the earliest moment."""

from __future__ import annotations

from types import EllipsisType


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
    return float(value)


def optional_seconds(name: str, value: object, *, above_zero: bool = False) -> float | None:
    """Like `seconds`, but lets None pass."""
    return None if value is None else seconds(name, value, above_zero=above_zero)


def timeout(value: float | EllipsisType | None) -> float | EllipsisType | None:
    """Check a `timeout` argument: seconds, None to wait for ever, `...` for the pool's own."""
    if value is not ...:
        optional_seconds("timeout", value)
    return value


def callable_or_none(name: str, value: object) -> None:
    """Raise TypeError if `value` is neither None nor callable."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {value!r}")
