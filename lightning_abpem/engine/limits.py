"""Bounds on a step and on the way from the source: none of them needs labels, and by default there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_abpem.engine.checks import is_number, shown
from lightning_abpem.functional import widen

__all__ = ["Limits", "length", "way"]


@dataclass(frozen=True)
class Limits:
    """Bounds on every step of the adapted weights theta, whose source values are theta_0.

    Args:
        clip_gradients: greatest length of the gradient over all adapted weights together; a longer one is scaled down.
        anchor: share a of the way back to the source that every step ends with: theta <- (1 - a) theta + a theta_0.
        max_step: greatest length of a step, relative to that of theta_0. A longer step is scaled down, the optimizer's
            moments are not.
        max_drift: greatest length of theta - theta_0, relative to that of theta_0. Weights farther away go back along
            a straight line to that distance.

    Raises:
        ValueError: naming the option, the value seen and its range.
    """

    clip_gradients: float | None = None
    anchor: float = 0.0
    max_step: float | None = None
    max_drift: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip_gradients", "max_step", "max_drift"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"Expected `{name}` to be None or a finite number > 0, but got {shown(value)}.")
        if not (is_number(self.anchor) and 0 <= self.anchor < 1):
            raise ValueError(f"Expected `anchor` to be a number in [0, 1), but got {shown(self.anchor)}.")

    @torch.no_grad()
    def clipped(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the gradients, all scaled alike if together they are longer than `clip_gradients`."""
        there = [gradient for gradient in gradients if gradient is not None]
        if self.clip_gradients is None or not there:
            return gradients
        # Not below 1: a gradient that is not finite stays so, and its step is not taken.
        longer = (length(there) / self.clip_gradients).clamp(min=1)
        return [None if gradient is None else gradient / longer.to(gradient) for gradient in gradients]

    @torch.no_grad()
    def hold(self, weights: Sequence[Tensor], before: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        """Move weights, in place, as far back as the bounds say: towards `before` the step, then towards the source."""
        if self.max_step is not None:
            _pull(weights, before, way(weights, before, source) / self.max_step)
        if self.anchor:
            for own, start in zip(weights, source, strict=True):
                own.lerp_(start.to(own), self.anchor)
        if self.max_drift is not None:
            _pull(weights, source, way(weights, source, source) / self.max_drift)


def _pull(weights: Sequence[Tensor], towards: Sequence[Tensor], times: Tensor) -> None:
    """Move weights, in place, to a `times`-th of their way from there, if that is nearer."""
    share = 1 / times.clamp(min=1)
    for own, start in zip(weights, towards, strict=True):
        own.copy_(start.to(own).lerp(own, share.to(own)))  # exact where the share is 1, and where it is tiny


def length(tensors: Sequence[Tensor]) -> Tensor:
    """Return the length of several tensors taken as one vector: a scalar, 0 of none."""
    if not tensors:
        return torch.zeros(())
    return torch.stack([widen(x).norm() for x in tensors]).norm()


@torch.no_grad()
def way(weights: Sequence[Tensor], start: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Return the length of the weights' way from `start`, relative to the source's length: a scalar.

    Where the source is 0 it is the way's own length.
    """
    far = length([widen(own) - widen(other).to(widen(own)) for own, other in zip(weights, start, strict=True)])
    whole = length(source)
    return far / whole.where(whole > 0, 1)
