"""One batch, as the engine hands it from pass to pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_abpem.attention.spans import Tokens

__all__ = ["Batch"]


@dataclass
class Batch:
    """The target's arguments for one batch, and whose tokens are whose in it.

    Args:
        args: the target's arguments; None for a step without a batch of one's own, as other processes take it.
        kwargs: its keyword arguments.
        tokens: of each modality; empty for methods that do not ask.
        has_failed: True if the batch could not be adapted: the step is that of other processes alone.
        rows: the samples that the step sees, if others are left out of it and replaced in the arguments; None for all.
        logits: (B, C) of the samples that the step sees, detached, by the last pass; None before.
    """

    args: Any
    kwargs: Any
    tokens: dict[str, Tokens] = field(default_factory=dict)
    has_failed: bool = False
    rows: Tensor | None = None
    logits: Tensor | None = None

    @property
    def is_own(self) -> bool:
        """True if this process has a batch that takes part in the step."""
        return self.args is not None and not self.has_failed

    def seen_of(self, x: Tensor) -> Tensor:
        """Return those rows of a tensor with one for each sample that the step sees."""
        return x if self.rows is None else x[self.rows]
