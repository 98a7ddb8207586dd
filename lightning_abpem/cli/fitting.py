"""Values of a file, fitted to the types of the options that they are for."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_abpem.engine.checks import shown

__all__ = ["fit", "option_types"]

_LISTS = {list: list, Sequence: list, Iterable: list, Collection: list, set: set, frozenset: frozenset}
_MAPPINGS = (dict, Mapping)


def option_types(function: Callable[..., object]) -> dict[str, Any]:
    """Return the types of a function's or class's arguments; that of the default where one has no annotation."""
    parameters = inspect.signature(function).parameters
    try:
        hints = get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    except Exception:  # an annotation that only a type checker can resolve
        return dict.fromkeys(parameters, Any)
    defaults = {name: own.default for name, own in parameters.items()}
    return {name: hints.get(name, Any if default is None else type(default)) for name, default in defaults.items()}


def fit(value: object, hint: object, where: str) -> Any:
    """Return a value of a file as an option's type has it: paths for strings, members for an enum's names.

    Raises:
        ValueError: it is of another type, or the type is one whose values can be code.
    """
    if not _is_plain(hint):
        raise ValueError(
            f"Expected {where} on the command line, for a file is no place for what may run ({_words(hint)}), "
            f"but got {shown(value)}."
        )
    try:
        return _fitted(value, hint)
    except TypeError:
        raise ValueError(f"Expected {where} to be {_words(hint)}, but got {shown(value)}.") from None


def _is_plain(hint: object) -> bool:
    if hint in (None, type(None), bool, int, float, str, Path) or get_origin(hint) is Literal:
        return True
    if isinstance(hint, type) and issubclass(hint, Enum):
        return True
    if get_origin(hint) not in (Union, types.UnionType, tuple, *_LISTS, *_MAPPINGS):
        return False
    return all(_is_plain(part) for part in get_args(hint) if part is not Ellipsis)


def _fitted(value: Any, hint: Any) -> Any:
    """Return the value in a plain type, or raise TypeError."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fitted(value, parts)
    if origin is Literal and any(value == part and type(value) is type(part) for part in parts):
        return value
    if hint in (None, type(None)) and value is None:
        return None
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, Enum) and value in hint.__members__:
        return hint[value]
    if origin in _LISTS and isinstance(value, list):
        return _LISTS[origin](_fitted(item, parts[0]) for item in value)
    if origin is tuple and isinstance(value, list):
        own = parts[:1] * len(value) if parts[1:] == (Ellipsis,) else parts
        if len(own) == len(value):
            return tuple(_fitted(item, part) for item, part in zip(value, own, strict=True))
    if origin in _MAPPINGS and isinstance(value, dict):
        return {_fitted(name, parts[0]): _fitted(item, parts[1]) for name, item in value.items()}
    raise TypeError


def _first_fitted(value: object, hints: Iterable[object]) -> Any:
    for hint in hints:
        try:
            return _fitted(value, hint)
        except TypeError:
            continue
    raise TypeError


def _words(hint: object) -> str:
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "").replace("pathlib.", "")
