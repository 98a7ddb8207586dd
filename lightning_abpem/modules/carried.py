"""State that a model's forward carries from call to call, and the engine's own passes, which leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CarriedState"]


class _Place(NamedTuple):
    """Where a module keeps a tensor: a buffer or an attribute."""

    owner: dict[str, Any]
    name: str
    is_edited: bool = True  # in place; else another tensor is put there


class CarriedState:
    """The buffers and tensors in attributes that the forward of a model moves, such as a stream's hidden state.

    Which these are is seen in the first pass. What takes another shape is no such state, but a cache made anew.

    Args:
        model: the model; its modules are those of now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._moving: list[_Place] | None = None

    @property
    def moves(self) -> bool:
        """Whether a pass moves anything, as far as is known."""
        return self._moving is None or bool(self._moving)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put what the pass within the block moves back after it."""
        places = self._all() if self._moving is None else self._moving
        before = [(place, place.owner.get(place.name)) for place in places]
        saved = [x.detach().clone() if place.is_edited and isinstance(x, Tensor) else None for place, x in before]
        versions = [_version(x) for _, x in before]
        try:
            yield
        finally:
            moving = []
            for (place, x), copy, version in zip(before, saved, versions, strict=True):
                now, is_edited = place.owner.get(place.name), _version(x) != version
                if is_edited and x is not None and copy is not None:
                    with torch.no_grad():
                        x.copy_(copy)
                if _are_alike(now, x):
                    place.owner[place.name] = x
                if is_edited or now is not x:
                    moving.append(place._replace(is_edited=is_edited))
            if self._moving is None:
                self._moving = moving

    def _all(self) -> list[_Place]:
        owners = [owner for module in self._model.modules() for owner in (module._buffers, module.__dict__)]
        return [
            _Place(owner, name) for owner in owners for name, x in owner.items() if x is None or isinstance(x, Tensor)
        ]


def _are_alike(x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def _version(x: Any) -> int | None:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None
