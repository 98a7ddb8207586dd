"""Checks of options: each names the option, what it may be and what was seen."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

__all__ = [
    "check_choice",
    "check_flag",
    "check_integer",
    "check_name",
    "check_names",
    "check_range",
    "is_integer",
    "is_number",
    "listed_names",
    "shown",
]

_SHOWN = 200  # characters of a value


def shown(value: object) -> str:
    """Return a value's words for a message, in one line of limited length."""
    try:
        words = repr(value)
    except Exception as error:  # of an integer of thousands of digits, or of an object of the user's
        return f"{type(value).__name__} without a repr ({type(error).__name__})"
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."


def is_integer(value: object, least: int, most: int = sys.maxsize) -> TypeGuard[int]:
    """Return True for an integer in [least, most] that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object) -> bool:
    """Return True for a finite real number that is no bool, and that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_integer(name: str, value: object, least: int, most: int = sys.maxsize) -> None:
    """Hold an option against a range of integers.

    Raises:
        ValueError: it is none in [least, most].
    """
    if not is_integer(value, least, most):
        wanted = f"an integer >= {least}" if most == sys.maxsize else f"an integer in [{least}, {most}]"
        raise ValueError(f"Expected `{name}` to be {wanted}, but got {shown(value)}.")


def check_range(name: str, value: Any, *, least: float = 0.0, above: float | None = None) -> None:
    """Hold an option against a range of numbers.

    Raises:
        ValueError: it is no finite number that is at least `least`, and above `above` if that is given.
    """
    if not is_number(value) or value < least or (above is not None and value <= above):
        wanted = f">= {least:g}" if above is None else f"above {above:g}"
        raise ValueError(f"Expected `{name}` to be a finite number {wanted}, but got {shown(value)}.")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Hold an option against the values that it may have.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, bool) or not any(isinstance(value, type(own)) and value == own for own in allowed):
        known = ", ".join(f'"{own}"' if isinstance(own, str) else repr(own) for own in allowed)
        raise ValueError(f"Expected `{name}` to be one of {known}, but got {shown(value)}.")


def check_flag(name: str, value: object) -> None:
    """Hold an option against True and False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be True or False, but got {shown(value)}.")


def check_name(name: str, value: object, what: str) -> None:
    """Hold an option that may be None against a string.

    Raises:
        ValueError: it is neither.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"Expected `{name}` to be None or {what}, but got {shown(value)}.")


def listed_names(value: object) -> list[str] | None:
    """Return one name, or several, as a list; None for anything else."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Iterable) or isinstance(names, bytes | bytearray | Mapping):
        return None
    listed = list(names)
    return listed if all(isinstance(name, str) and name for name in listed) else None


def check_names(name: str, value: object, what: str) -> list[str]:
    """Return an option of one name or several as a list.

    Raises:
        ValueError: it is anything else.
    """
    names = listed_names(value)
    if names is None:
        raise ValueError(f"Expected `{name}` to be {what}, but got {shown(value)}.")
    return names
