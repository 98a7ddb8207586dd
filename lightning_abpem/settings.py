"""What to adapt and how: the engine's options, validated once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn

from lightning_abpem.objective import Objective
from lightning_abpem.spans import Span, token_spans

__all__ = ["OptimizerFactory", "Reset", "Settings", "default_optimizer"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Reset = Literal["never", "batch", "dataloader"] | int
default_optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=1e-4)


@dataclass(frozen=True)
class Settings:
    """The options of an `Adaptation`; `ABPEM` documents them.

    Raises:
        ValueError: naming the option, the value seen and what was expected.
    """

    fusion: str | Sequence[str]
    modalities: Mapping[str, int | Span]
    objective: Objective
    memory_batches: int = 1
    memory_at: str | None = None
    steps: int = 1
    optimizer: OptimizerFactory = default_optimizer
    target: str | None = None
    logits: Callable[..., Any] | None = None
    reset: Reset = "never"
    restore: bool = True
    replay: bool = True
    spans: dict[str, slice] = field(init=False)

    def __post_init__(self) -> None:
        for name, least in (("memory_batches", 1), ("steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Expected `{name}` to be an integer >= {least}, but got {value!r}.")
        if self.reset not in ("never", "batch", "dataloader") and not self._counted_reset():
            raise ValueError(
                f'Expected `reset` to be "never", "batch", "dataloader" or a number of updates >= 1, '
                f"but got {self.reset!r}."
            )
        if self.memory_batches > 1 and self.reset == "batch":
            raise ValueError(
                'Expected `memory_batches` to be 1 with reset="batch", which empties the memory before every batch, '
                f"but got {self.memory_batches}."
            )
        if not callable(self.optimizer):
            raise ValueError(
                "Expected `optimizer` to be a function from parameters to a torch optimizer, such as "
                f"functools.partial(torch.optim.Adam, lr=1e-4), but got {self.optimizer!r}."
            )
        object.__setattr__(self, "spans", token_spans(self.modalities))

    @property
    def spans_cover(self) -> bool:
        """Whether the spans were given as lengths, which have to cover the whole sequence."""
        return all(isinstance(value, Integral) for value in self.modalities.values())

    @property
    def updates_per_reset(self) -> int | None:
        """After how many updates the source model returns before the next call; None if updates do not decide."""
        if self.reset == "batch":
            return 1
        return self.reset if isinstance(self.reset, int) else None

    def _counted_reset(self) -> bool:
        return isinstance(self.reset, int) and not isinstance(self.reset, bool) and self.reset >= 1
