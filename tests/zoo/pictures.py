"""Everything that can be reached from some objects, as a flat picture by path, so that two runs can be compared."""

from __future__ import annotations

import itertools
import random
import threading
import types
import weakref
from collections import UserDict, deque
from collections.abc import Mapping
from enum import Enum
from functools import cache, partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Lightning's and torch's own, which hold no state of the model; a compiled forward reaches into the compiler.
_LEFT_OUT = {
    "_trainer",
    "_fabric",
    "_hparams",
    "_compiled_call_impl",
    "dynamo_ctx",
    "_jit_override_can_fuse",
    "trainer",
}
_FLAT = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    PurePath,
    torch.dtype,
    torch.device,
    torch.Size,
    range,
)

_SIMPLE = {type(None), bool, int, float, str}  # told apart fastest
Picture = dict[str, Any]


class Album:
    """Pictures whose objects have numbers: the same object has the same one in each, also in a later picture."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._alive: list[Any] = []

    def picture(self, x: Any, name: str = "") -> Picture:
        """Describe all that is reachable from `x`, by path; a tensor by a pair (description, values)."""
        self._seen: set[int] = set()
        self._out: Picture = {}
        self._walk(x, name)
        return self._out

    def _number(self, x: Any, key: Any = None) -> int:
        self._alive.append(x)
        return self._numbers.setdefault(id(x) if key is None else key, len(self._numbers))

    def _walk(self, x: Any, path: str) -> None:
        if type(x) in _SIMPLE or isinstance(x, _FLAT):
            self._out[path] = repr(x)
        elif isinstance(x, tuple | frozenset):  # nobody can edit it: which one it is does not matter
            self._out[path] = type(x).__qualname__
            self._items(x, path)
        elif isinstance(x, types.FunctionType | types.MethodType | types.BuiltinFunctionType | partial | type):
            self._function(x, path)
        else:
            number = self._number(x)
            self._out[path] = (type(x).__qualname__, number)
            if number not in self._seen:
                self._seen.add(number)
                self._contents(x, path)

    def _contents(self, x: Any, path: str) -> None:
        if isinstance(x, Tensor):
            self._out[f"{path}="] = self._tensor(x)
            if x.is_leaf and x.grad is not None:
                self._out[f"{path}.grad"] = self._tensor(x.grad)
            self._attributes(x, path)
            if x.is_leaf and x._backward_hooks:
                self._walk(dict(x._backward_hooks), f"{path}._backward_hooks")
        elif isinstance(x, np.ndarray):
            self._out[f"{path}="] = torch.from_numpy(x.copy()) if x.dtype.kind in "fiub" else repr(x)
        elif isinstance(x, np.random.Generator):
            self._out[f"{path}="] = repr(x.bit_generator.state)
        elif isinstance(x, random.Random):
            self._out[f"{path}="] = x.getstate()
        elif isinstance(x, torch.Generator):
            self._out[f"{path}="] = x.get_state()
        elif isinstance(x, bytearray):
            self._out[f"{path}="] = bytes(x)
        else:
            self._items(x, path)
            self._attributes(x, path)

    def _items(self, x: Any, path: str) -> None:
        if isinstance(x, Mapping | UserDict):
            is_hooks = "_hooks" in path.rsplit(".", 1)[-1]  # their keys are counted over the whole process
            for i, (key, value) in enumerate(x.items()):
                self._walk(value, f"{path}[{i if is_hooks else repr(key)}]")
            self._out[f"{path}.keys"] = "hooks" if is_hooks else [repr(key) for key in x]
        elif isinstance(x, list | tuple | deque):
            self._out[f"{path}.len"] = (len(x), getattr(x, "maxlen", None))
            for i, value in enumerate(x):
                self._walk(value, f"{path}[{i}]")
        elif isinstance(x, set | frozenset):
            self._out[f"{path}.set"] = sorted(repr(own() if isinstance(own, weakref.ref) else own) for own in x)

    def _attributes(self, x: Any, path: str) -> None:
        kind: Any = type(x)
        own = x.__dict__ if type(x).__dictoffset__ or isinstance(x, threading.local) else {}
        held = {name: getattr(x, name) for name in _slots(kind) if hasattr(x, name)}
        named = {name: value for name, value in {**held, **own}.items() if not _is_left_out(name, value)}
        self._out[f"{path}.attributes"] = sorted(named)
        for name, value in sorted(named.items()):
            self._walk(value, f"{path}.{name}")
        if isinstance(x, nn.Module) and type(x).__module__.startswith("tests."):
            for name, value in sorted(vars(type(x)).items()):  # state that a class keeps for all
                if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__"):
                    self._walk(value, f"{path}.class.{name}")

    def _function(self, x: Any, path: str) -> None:
        if isinstance(x, partial):
            self._walk((x.func, x.args, x.keywords), path)
            return
        self._out[path] = getattr(x, "__qualname__", repr(type(x)))
        if isinstance(x, types.MethodType):
            self._walk(x.__self__, f"{path}.self")
        if isinstance(x, types.FunctionType) and x.__module__.startswith("tests.") and x.__closure__:
            for name, cell in zip(x.__code__.co_freevars, x.__closure__, strict=True):
                self._walk(cell.cell_contents, f"{path}.{name}")

    def _tensor(self, x: Tensor) -> tuple[Any, Tensor]:
        with torch.no_grad():
            values = x.detach().to_dense().clone() if x.layout != torch.strided else x.detach().clone()
        known: tuple[Any, ...] = (x.dtype, tuple(x.shape), x.requires_grad)
        if x.layout == torch.strided:
            storage = x.untyped_storage()
            known += x.stride(), x.storage_offset(), self._number(storage, ("storage", storage._cdata))
        return known, values


@cache
def _slots(kind: Any) -> list[str]:
    of_all = [c.__dict__.get("__slots__", ()) for c in kind.__mro__]
    names = itertools.chain.from_iterable([s] if isinstance(s, str) else s for s in of_all)
    return [name for name in names if name not in ("__weakref__", "__dict__")]


def _is_left_out(name: str, value: Any) -> bool:
    is_no_hook = "_hooks" in name and isinstance(value, dict) and not value
    return is_no_hook or name in _LEFT_OUT or name.startswith("_dynamo")


def differences(got: Picture, expected: Picture, tolerance: float = 0, but: tuple[str, ...] = ()) -> list[str]:
    """The paths at which two pictures differ, and how; of paths that end with `but`, nothing.

    With a tolerance it is values that count: which objects are the same is left to the comparison without one.
    """
    got, expected = ({p: v for p, v in picture.items() if not p.endswith(but)} for picture in (got, expected))
    found = [f"{path}: only with the callback" for path in got.keys() - expected.keys()]
    found += [f"{path}: only without it" for path in expected.keys() - got.keys()]
    for path in got.keys() & expected.keys():
        (x, y) = got[path], expected[path]
        if isinstance(x, tuple) and isinstance(x[-1], Tensor) and isinstance(y, tuple) and isinstance(y[-1], Tensor):
            (known, x), (same, y) = x, y
            if known[:3] != same[:3] or (not tolerance and known != same):
                found.append(f"{path}: {known}, not {same}")
                continue
        elif tolerance and _is_numbered(x) and _is_numbered(y):
            x, y = x[0], y[0]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if not _are_close(x, y, tolerance):
                found.append(f"{path}: values differ")
        elif type(x) is not type(y) or x != y:
            found.append(f"{path}: {str(x)[:80]}, not {str(y)[:80]}")
    return sorted(found)


def _is_numbered(x: Any) -> bool:
    """An object that is edited in place: its class and number."""
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)


def _are_close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    bound = tolerance if x.is_floating_point() else 0
    return bool(torch.allclose(x, y, rtol=bound, atol=bound, equal_nan=True))
