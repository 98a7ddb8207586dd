"""Parameters before a pass of the engine, which no forward may edit: what is theirs besides their values."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_not

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import SavedAttributes
from lightning_abpem.modules.tensors import bit_sum

__all__ = ["SavedParameters"]

_gradient, _version, _attributes = map(attrgetter, ("grad", "_version", "__dict__"))


class SavedParameters:
    """Gradients and versions of parameters, and the first attributes of those that have none.

    Args:
        parameters: all of them; those made in inference mode have no version.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._all = parameters
        self._versions, self._gradients = list(map(_version, parameters)), list(map(_gradient, parameters))
        self._named = {id(p) for p in filter(_attributes, parameters)}
        self._sums: list[Tensor] = []

    def restore(self) -> set[int]:
        """Put gradients and attributes back, but not values; return the ids of what had changed."""
        changed: set[int] = set()
        if any(map(is_not, map(_gradient, self._all), self._gradients)):
            for p, gradient in zip(self._all, self._gradients, strict=True):
                if p.grad is not gradient:
                    p.grad = gradient
                    changed.add(id(p))
        for p in filter(_attributes, self._all):
            if id(p) not in self._named and SavedAttributes(p, {}).restore():
                changed.add(id(p))
        return changed

    def sum(self) -> None:
        """Let `edited` compare all bits too, for edits that do not count a version up."""
        self._sums = list(map(bit_sum, self._all))

    def edited(self) -> list[nn.Parameter]:
        """Return the parameters that were edited in place."""
        edited = [p for p, version in zip(self._all, self._versions, strict=True) if p._version != version]
        return edited + [
            p for p, before in zip(self._all, self._sums, strict=False) if not torch.equal(bit_sum(p), before)
        ]
