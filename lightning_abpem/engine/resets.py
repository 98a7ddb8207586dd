"""Resets of a stream to the source model: when one is due."""

from __future__ import annotations

from lightning_abpem.engine.settings import Settings

__all__ = ["Resets"]


class Resets:
    """Counts towards the next reset.

    Args:
        settings: after how many steps or samples a reset is due.

    Attributes:
        count: how often the source model came back, but by the guard.
        samples: of all processes, since the last reset.
        is_next: True if a reset comes before the next batch.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.count = self.samples = 0
        self.is_next = False

    def is_due(self, updates: int) -> bool:
        """Return True if enough steps, `updates` of them, or enough samples have come since the last reset."""
        steps, samples = self._settings.updates_per_reset, self._settings.samples_per_reset
        return (steps is not None and updates >= steps) or (samples is not None and self.samples >= samples)

    def begin_anew(self) -> None:
        """Note that the source model is back."""
        self.count += 1
        self.samples, self.is_next = 0, False
