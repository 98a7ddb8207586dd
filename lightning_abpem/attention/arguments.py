"""A call's arguments in short: their structure, the shapes of tensors less the batch, and the values of scalars."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from enum import Enum
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import slots_of

__all__ = ["Described", "changed_values", "describe"]

_SCALARS = (Number, str, bytes, type(None), Enum, range, slice, torch.dtype, torch.device)
_DEEPEST = 8  # level of objects inside objects that is looked at
_LONGEST = 100  # characters or bytes that are kept as they are


class Described(NamedTuple):
    """The argument at one place: its kind, the sizes of a tensor, the value of a scalar."""

    kind: type
    sizes: tuple[int, ...] = ()
    value: str | None = None


def describe(args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Described]:
    """Describe what the tokens of a batch may depend on, by its place, such as `args[1].rate`.

    Of tensors and arrays these are the sizes without the batch's, and the value of one without dimensions. Numbers,
    strings and other scalars count by value. What is behind a function or a module does not count.
    """
    return dict([*_places(args, "args", ()), *_places(kwargs, "kwargs", ())])


def changed_values(before: Mapping[str, Described], after: Mapping[str, Described]) -> list[str]:
    """List the places where values differ; empty if more than values does."""
    if before.keys() != after.keys():
        return []
    changed = [place for place in before if before[place] != after[place]]
    values = all(own.value is not None for place in changed for own in (before[place], after[place]))
    return changed if values else []


def _places(x: object, place: str, around: tuple[int, ...]) -> Iterator[tuple[str, Described]]:
    if isinstance(x, _SCALARS):
        yield place, Described(type(x), value=_value(x))
        return
    if isinstance(x, Tensor) or (hasattr(type(x), "__array__") and isinstance(getattr(x, "shape", None), tuple)):
        yield place, _describe_array(x)
        return
    yield place, Described(type(x))
    if id(x) not in around and len(around) <= _DEEPEST:
        for name, value in _parts(x):
            yield from _places(value, f"{place}{name}", (*around, id(x)))


def _describe_array(x: Any) -> Described:
    """Describe a tensor or an array. A nested tensor's sizes are its samples' own."""
    if isinstance(x, Tensor) and (x.is_nested or x.is_meta):
        return Described(type(x))
    return Described(type(x), tuple(x.shape[1:])) if x.shape else Described(type(x), value=_value(x.item()))


def _parts(x: object) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a container or of an object of the user's own, by the way to them."""
    if isinstance(x, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in x.items())
    elif isinstance(x, tuple | list):
        yield from ((f"[{i}]", value) for i, value in enumerate(x))
    elif isinstance(x, Set):
        yield from ((f"[{i}]", value) for i, value in enumerate(sorted(x, key=repr)))
    elif not isinstance(x, type | nn.Module) and not callable(x):
        yield from ((f".{name}", value) for name, value in getattr(x, "__dict__", {}).items())
        yield from ((f".{name}", getattr(x, name)) for name in slots_of(type(x)) if hasattr(x, name))


def _value(x: object) -> str:
    """Return a scalar as text; of a long one, such as a raw recording, the digest, for it is not to be kept."""
    if isinstance(x, str | bytes) and len(x) > _LONGEST:
        return hashlib.sha256(x if isinstance(x, bytes) else x.encode("utf-8", "surrogatepass")).hexdigest()
    return repr(x)
