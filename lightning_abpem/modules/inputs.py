"""The target's arguments, as the engine's own passes take them."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_abpem.modules.patches import normal_tensor

__all__ = ["OwnInputs", "as_constants"]


class OwnInputs:
    """Arguments as autograd takes them, in containers of their own; copies, if the forward edits its inputs.

    Whether it does is seen in the first pass, which works on copies.
    """

    def __init__(self) -> None:
        self._edited: bool | None = None

    @property
    def edited(self) -> bool:
        """Whether the forward is known to edit its inputs."""
        return self._edited is True

    @contextmanager
    def of(self, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """The engine's own version of the arguments, for one pass."""
        args, kwargs = as_constants(args, kwargs)
        if self._edited is False:
            yield args, kwargs
            return
        copies: list[Tensor] = []
        args, kwargs = _mapped(partial(_copy, copies=copies), args, kwargs)
        versions = [x._version for x in copies]
        yield args, kwargs
        if self._edited is None:
            self._edited = versions != [x._version for x in copies]


def as_constants(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with every tensor as autograd takes a constant; see `normal_tensor`."""
    return _mapped(normal_tensor, args, kwargs)


def _mapped(function: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with `function` applied to every leaf; mostly they are tensors, without containers."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return tuple(map(function, args)), {}
    return tree_map(partial(_in_containers, function), (args, kwargs))


def _in_containers(function: Callable[[Any], Any], x: Any) -> Any:
    """`function` of a leaf, or of all in a copy of a container that torch's trees take for one."""
    inside = partial(tree_map, partial(_in_containers, function))
    own: Any
    if isinstance(x, (dict, UserDict)):
        own = copy.copy(x)
        for key, value in x.items():
            own[key] = inside(value)
        return own
    if is_dataclass(x) and not isinstance(x, type):
        own = copy.copy(x)
        for field in fields(x):
            object.__setattr__(own, field.name, inside(getattr(x, field.name)))  # also of a frozen one
        return own
    return function(x)


def _copy(x: Any, copies: list[Tensor]) -> Any:
    """A copy of a tensor that lies in memory as it does, gaps included, so that kernels round alike; into `copies`."""
    if not isinstance(x, Tensor):
        return x
    is_plain = x.layout == torch.strided and not x.is_nested
    if not is_plain or any(stride == 0 < size - 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        own = x.clone()
    else:
        own = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    copies.append(own)
    return own
