"""The engine's options, what to adapt and how: validated once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_abpem.attention.fusion import FusionPatterns, fusion_patterns
from lightning_abpem.attention.projections import Projections
from lightning_abpem.attention.spans import Modalities, TokenMask, Tokens, own_spans, token_spans
from lightning_abpem.attention.statistics import Pair
from lightning_abpem.engine.faults import ON_ERROR, OnError
from lightning_abpem.engine.limits import Limits
from lightning_abpem.engine.method import Method, Predicts

__all__ = ["GuardAction", "Monitor", "OptimizerFactory", "Reset", "Settings", "Sync", "default_optimizer"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Reset = Literal["never", "batch", "dataloader"] | int | str
Sync = Literal["global", "local"]
GuardAction = Literal["rollback", "reset", "freeze", "warn", "off"]
Monitor = Literal["source", "off"] | int
default_optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=1e-4, fused=True)


@dataclass(frozen=True)
class Settings:
    """The options of an `Adaptation`; `TestTimeAdaptation` and `ABPEM` document them.

    Raises:
        ValueError: naming the option, the value seen and what was expected.
    """

    method: Method
    fusion: FusionPatterns | None = None
    modalities: Modalities | Sequence[str] = "auto"
    memory_batches: int = 1
    memory_at: str | None = None
    steps: int = 1
    optimizer: OptimizerFactory = default_optimizer
    target: str | None = None
    logits: Callable[..., Any] | None = None
    reset: Reset = "never"
    restore: bool = True
    replay: bool = True
    predicts: Predicts | None = None
    sync: Sync = "global"
    projections: Projections | None = None
    learning_rate: float | None = None
    clip_gradients: float | None = None
    anchor: float = 0.0
    max_drift: float | None = None
    monitor: Monitor = "off"
    guard: GuardAction = "off"
    on_error: OnError = "predict"
    limits: Limits = field(init=False)
    patterns: list[str] | dict[Pair, list[str]] | None = field(init=False)
    spans: dict[str, Tokens | TokenMask] | None = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or not isinstance(getattr(self.method, "name", None), str):
            raise ValueError(f"Expected `method` to be an instance of a Method with a `name`, but got {self.method!r}.")
        for name, least in (("memory_batches", 1), ("steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Expected `{name}` to be an integer >= {least}, but got {value!r}.")
        if self.reset not in ("never", "batch", "dataloader") and not (
            self.updates_per_reset or self.samples_per_reset
        ):
            raise ValueError(
                f'Expected `reset` to be "never", "batch", "dataloader", a number of updates >= 1 or a number of '
                f'samples, such as "640 samples", but got {self.reset!r}.'
            )
        if self.memory_batches > 1 and self.reset == "batch":
            raise ValueError(
                'Expected `memory_batches` to be 1 with reset="batch", which empties the memory before every batch, '
                f"but got {self.memory_batches}."
            )
        if self.predicts not in (None, "after", "before"):
            raise ValueError(f'Expected `predicts` to be "after" or "before" the update, but got {self.predicts!r}.')
        if self.sync not in ("global", "local"):
            raise ValueError(f'Expected `sync` to be "global" or "local", but got {self.sync!r}.')
        if self.on_error not in ON_ERROR:
            raise ValueError(f'Expected `on_error` to be "predict" or "raise", but got {self.on_error!r}.')
        if self.predicts is None:
            object.__setattr__(self, "predicts", self.method.predicts)
        for name in ("steps", "memory_batches"):
            if self.predicts == "before" and getattr(self, name) > 1:
                raise ValueError(f'Expected `{name}` to be 1 with predicts="before", but got {getattr(self, name)}.')
        if self.fusion is None and (self.method.needs_attention or self.memory_batches > 1):
            raise ValueError(f"Expected `fusion` to name the attention that {self.method.name} watches, but got None.")
        if self.memory_batches > 1 and not self.method.needs_attention:
            raise ValueError(f"Expected `memory_batches` to be 1: {self.method.name} has no memory.")
        if not callable(self.optimizer):
            raise ValueError(
                "Expected `optimizer` to be a function from parameters to a torch optimizer, such as "
                f"functools.partial(torch.optim.Adam, lr=1e-4), but got {self.optimizer!r}."
            )
        if not (self.projections is None or callable(self.projections) or _are_names(self.projections)):
            raise ValueError(
                "Expected `projections` to be names inside the fusion attention, or a function from it to parameters "
                f"by name, but got {self.projections!r}."
            )
        object.__setattr__(self, "limits", Limits(self.clip_gradients, self.anchor, self.max_drift))
        self._check_watch()
        self._read_modalities()

    @property
    def monitored_batches(self) -> int:
        """Every how many batches the source model is compared with; 0 for never."""
        return self.monitor if isinstance(self.monitor, int) else int(self.monitor == "source")

    @property
    def updates_per_reset(self) -> int | None:
        """After how many updates the source model returns before the next call; None if updates do not decide."""
        if self.reset == "batch":
            return 1
        if isinstance(self.reset, int) and not isinstance(self.reset, bool) and self.reset >= 1:
            return self.reset
        return None

    @property
    def samples_per_reset(self) -> int | None:
        """After how many samples the source model returns before the next call; None if samples do not decide."""
        found = re.fullmatch(r"([1-9][0-9]*) samples", self.reset) if isinstance(self.reset, str) else None
        return int(found[1]) if found else None

    def _check_watch(self) -> None:
        if self.learning_rate is not None and not (_is_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"Expected `learning_rate` to be None or a number > 0, but got {self.learning_rate!r}.")
        monitor = self.monitor
        if monitor not in ("source", "off") and (
            isinstance(monitor, bool) or not isinstance(monitor, int) or monitor < 1
        ):
            raise ValueError(
                f'Expected `monitor` to be "source", "off" or a number of batches >= 1, but got {monitor!r}.'
            )
        if self.guard not in get_args(GuardAction):
            known = ", ".join(map(repr, get_args(GuardAction)))
            raise ValueError(f"Expected `guard` to be one of {known}, but got {self.guard!r}.")
        if self.guard != "off" and monitor == "off":
            raise ValueError(
                f'Expected `monitor` to be "source" or a number of batches with guard={self.guard!r}, which judges by '
                'it, but got "off".'
            )

    def _read_modalities(self) -> None:
        """Set `patterns`, and `spans`: None where the first batch has to show them."""
        given = self.modalities
        if self.fusion is None:
            object.__setattr__(self, "patterns", None)
            object.__setattr__(self, "spans", None)
            return
        if not isinstance(given, Mapping) and (isinstance(given, str) and given != "auto"):
            raise ValueError(f'Expected `modalities` to map names to tokens, or "auto", but got {given!r}.')
        names = [] if given == "auto" else list(given)
        patterns = fusion_patterns(self.fusion, names)
        spans: dict[str, Tokens | TokenMask] | None = None
        if isinstance(patterns, dict):
            names = list(dict.fromkeys(name for pair in patterns for name in pair))
            own = own_spans(given) if isinstance(given, Mapping) else dict.fromkeys(names, Tokens(slice(None)))
            if missing := [name for name in names if name not in own]:
                raise ValueError(f"Expected `modalities` to hold {missing}, which `fusion` names, but got {given!r}.")
            spans = {name: own[name] for name in names}
        elif isinstance(given, Mapping):
            spans = token_spans(given)
        elif given != "auto":
            raise ValueError(
                f"Expected `modalities` to say how many tokens of the joint sequence each has, but got {given!r}. "
                'With "auto" the first batch shows it, where the encoders\' outputs are concatenated.'
            )
        object.__setattr__(self, "patterns", patterns)
        object.__setattr__(self, "spans", spans)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, Sequence) and bool(names) and all(isinstance(name, str) and name for name in names)
