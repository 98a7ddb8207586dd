"""The scale of a loss whose gradients pass through float16, where small ones would vanish."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossScale", "passes_float16"]


class LossScale:
    """Scale that is halved when gradients overflow and doubled after many steps in which none did.

    Nothing here waits for the device. It never falls below 1, for batches that are broken say nothing about it.

    Args:
        start: the scale at first.
        growth: its factor after `interval` steps without overflow.
        backoff: its factor after an overflow.
        interval: see `growth`.
    """

    def __init__(self, start: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000) -> None:
        self._growth, self._backoff, self._interval = growth, backoff, interval
        self.value = torch.tensor(float(start))
        self._streak = torch.tensor(0)
        self._is_needed = False

    @classmethod
    def like(cls, scaler: Any) -> LossScale:
        """Make one with the settings of a torch.amp.GradScaler, which stays as it is; the usual ones for None."""
        if scaler is None:
            return cls()
        settings = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
        return cls(scaler.get_scale(), *settings)

    def of(self, logits: Tensor, params: Iterable[Tensor]) -> Tensor | None:
        """Return the scale if gradients pass through float16 on their way to wider parameters, else None.

        That is so where float16 autocast is on, as with precision="16-mixed", or was in the forward.

        Args:
            logits: what the forward gave.
            params: the parameters that move. If all are float16 themselves there is no scale, as in "16-true".
        """
        kind = logits.device.type
        autocasts = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        is_wider = any(p.dtype != torch.float16 for p in params)
        self._is_needed = autocasts or (is_wider and passes_float16(logits))
        return self.value if self._is_needed else None

    def update(self, taken: Tensor) -> None:
        """Count a step that was taken or not, a bool scalar."""
        if not self._is_needed:
            return
        streak = (self._streak.to(taken.device) + 1) * taken
        grows = streak >= self._interval
        value = self.value.to(taken.device)
        value = value.where(~grows, value * self._growth).where(taken, value * self._backoff)
        self.value, self._streak = value.clamp(min=1), streak * ~grows

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value.clamp(min=1), "streak": self._streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value, self._streak = state["value"], state["streak"]


def passes_float16(output: Tensor) -> bool:
    """Return True if gradients of `output` pass through float16 anywhere in its graph.

    The graph of every step is looked at, at some 1.5 us for a node: an early answer could be wrong for a later batch.
    What a custom `autograd.Function` or a compiled graph does in float16 inside, between wider ends, is not seen.
    """
    if output.grad_fn is None:
        return False
    nodes, seen = [output.grad_fn], {output.grad_fn}
    for node in nodes:  # which grows
        for made in node._input_metadata:  # of what the node gave in the forward
            if made.dtype is torch.float16:
                return True
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)
    return False
