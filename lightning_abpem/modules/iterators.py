"""Iterators and the like, which a pass of the engine would use up: copies where there are some, else refusals."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from typing import Any, NoReturn

__all__ = ["ONE_SHOT_MANAGER", "Refusing", "copied", "parts"]

ONE_SHOT_MANAGER = type(contextlib.contextmanager(lambda: iter(()))())  # it can be entered once

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

    def __enter__(self) -> NoReturn:
        raise ValueError(self._message)

    def __exit__(self, *args: object) -> NoReturn:
        raise ValueError(self._message)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(self._message)


def copied(x: Any) -> Any:
    """Return a copy of an iterator that moves by itself; None for one that would move others, such as `zip`'s."""
    if type(x) in _INDEPENDENT:
        return copy.copy(x)
    if isinstance(x, ONE_SHOT_MANAGER) and hasattr(x, "args"):  # nobody has entered it
        return type(x)(x.func, x.args, x.kwds)
    if _is_flat(x):
        own = x.base.flat
        for _ in itertools.islice(own, x.index):
            pass
        return own
    return None


def parts(x: Any) -> tuple[Any, ...]:
    """Return what an object that has a copy reads."""
    if isinstance(x, ONE_SHOT_MANAGER):
        return x.func, x.args, x.kwds
    return (x.base,) if _is_flat(x) else x.__reduce__()[1]


def _is_flat(x: object) -> bool:
    return "numpy" in sys.modules and isinstance(x, sys.modules["numpy"].flatiter)
