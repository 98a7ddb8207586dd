"""The target's arguments, as the engine's own passes take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_abpem.modules import normal_tensor

__all__ = ["OwnInputs"]


class OwnInputs:
    """Arguments as autograd takes them, in containers of their own; copies, if the forward edits its inputs.

    Whether it does is seen in the first pass, which works on copies.
    """

    def __init__(self) -> None:
        self._edited: bool | None = None

    @contextmanager
    def of(self, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """The engine's own version of the arguments, for one pass."""
        args, kwargs = _mapped(normal_tensor, args, kwargs)
        if self._edited is False:
            yield args, kwargs
            return
        args, kwargs = _mapped(_copy, args, kwargs)
        before = [(x, x._version) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        yield args, kwargs
        if self._edited is None:
            self._edited = any(x._version != version for x, version in before)


def _mapped(function: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with `function` applied to every leaf; mostly they are tensors, without containers."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return tuple(map(function, args)), {}
    return tree_map(function, (args, kwargs))


def _copy(x: Any) -> Any:
    """A copy of a tensor that lies in memory as it does, gaps included, so that kernels round alike."""
    if not isinstance(x, Tensor):
        return x
    is_plain = x.layout == torch.strided and not x.is_nested
    if not is_plain or any(stride == 0 < size - 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
