"""What a loss is multiplied by before its gradients are taken in float16, where small ones would vanish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LossScale"]


class LossScale:
    """A scale that is halved when gradients overflow and doubled after many steps in which none did.

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
        """One with the settings of a torch.amp.GradScaler, which stays as it is; the usual ones for None."""
        if scaler is None:
            return cls()
        settings = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
        return cls(scaler.get_scale(), *settings)

    def of(self, device: torch.device) -> Tensor | None:
        """The scale, if float16 autocast is on, as it is with precision="16-mixed"; else None."""
        kind = device.type
        self._is_needed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return self.value if self._is_needed else None

    def update(self, taken: Tensor) -> None:
        """After a step: whether it was taken, a bool scalar."""
        if not self._is_needed:
            return
        streak = (self._streak.to(taken.device) + 1) * taken
        grows = streak >= self._interval
        value = self.value.to(taken.device)
        value = value.where(~grows, value * self._growth).where(taken, value * self._backoff)
        self.value, self._streak = value.clamp(min=1), streak * ~grows

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "streak": self._streak}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value, self._streak = state["value"], state["streak"]
