"""Iterators, which a pass of the engine would use up: copies of those that have some, refusals in place of others."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NoReturn

__all__ = ["Refusing", "copied"]

_EXAMPLES: list[Any] = [
    [],
    (),
    {},
    {}.items(),
    {}.values(),
    set(),
    range(0),
    range(2**70),
    "",
    "\u20ac",
    b"",
    bytearray(),
]
_INDEPENDENT: set[type] = {itertools.count, itertools.repeat, *(type(iter(x)) for x in _EXAMPLES)}
_INDEPENDENT |= {type(reversed([])), type(reversed({})), type(reversed(range(0)))}


class Refusing:
    """Stands in for an iterator without copies while a pass lasts: whoever asks it for an item is told.

    Args:
        name: where the iterator was found, in words.
        kind: its class.
    """

    def __init__(self, name: str, kind: type) -> None:
        self._message = (
            f"Expected state that can be copied, but {name} is a {kind.__name__}, which the adapting pass would use "
            "up. Pass a list or a tensor instead, or keep a position in one."
        )

    def __iter__(self) -> Refusing:
        return self

    def __next__(self) -> NoReturn:
        raise ValueError(self._message)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(self._message)


def copied(x: Any) -> Any:
    """Return a copy of an iterator that moves by itself; None for one that would move others, such as `zip`'s."""
    return copy.copy(x) if type(x) in _INDEPENDENT else None
