"""The engine's options that all methods share: their names, types, defaults and words, in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_abpem.attention.projections import Projections
from lightning_abpem.engine.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_name,
    is_integer,
    is_number,
    listed_names,
    shown,
)
from lightning_abpem.engine.faults import OnError
from lightning_abpem.engine.limits import Limits
from lightning_abpem.engine.method import Predicts

__all__ = [
    "EngineOptions",
    "GuardAction",
    "LearningRate",
    "Logits",
    "Monitor",
    "OptimizerFactory",
    "Reset",
    "Sync",
]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Logits = Callable[..., Any]
Reset = Literal["never", "batch", "dataloader"] | int | str
Sync = Literal["global", "local"]
GuardAction = Literal["rollback", "reset", "freeze", "warn", "off"]
LearningRate = float | Literal["auto"] | Sequence[float]
Monitor = Literal["source", "off"] | int

_ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-4, fused=True)

_MOST_STEPS = 10_000  # for each batch
_AUTO = (1e-4, 1e-3, 3e-3)  # rates of "auto"
_MOST_RATES = 8  # side by side


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of adapting that all methods share.

    Args:
        steps: updates per call, at most 10,000; 0 observes only: figures are recorded and no weight moves.
        optimizer: from parameters to a torch optimizer. Default: Adam, lr 1e-4, fused.
        target: the module whose call adapts. Default: the LightningModule itself; set it if the step calls a submodule
            directly.
        logits: from the target's output to (B, C) logits, where it is not a tensor, `.logits`, `["logits"]` or a
            tuple's only (B, C) tensor.
        reset: when the source model returns: "never" within a run, before each "batch" (episodic), at each new
            "dataloader", after that many updates, or after that many samples, as "640 samples".
        restore: put the source weights back after the run; False keeps the adapted ones.
        replay: compute the frozen part of the model once per batch; False computes it in every pass.
        predicts: whether the step sees predictions from "after" the update to its batch or from "before" it. Default:
            as the method's paper has it.
        sync: with several processes, "global" takes one step for the batches of all of them together, the same in each.
            "local" lets each adapt on its own stream, such as that of a sensor of its own.
        projections: parameters of the fusion attention that adapt: patterns of names inside it, as `fusion` has them,
            or a function from the module to its parameters by name. For projections with unusual names, or other
            parameters. Default: the linears whose names tell q, k and v.
        learning_rate: of the optimizer. Default: its own, 1e-4. Several, or "auto" for 1e-4, 1e-3 and 3e-3, adapt side
            by side from the source on, and the best one predicts, as far as predictions can tell. Each costs a forward
            and a backward of what is not frozen.
        clip_gradients: greatest length of the gradient over all adapted weights; longer ones are scaled down.
        anchor: share of the way back to the source that every step ends with, in [0, 1).
        max_step: greatest length of a step, relative to the source's own length; a longer one is scaled down.
        max_drift: greatest length of the weights' way from the source, relative to the source's own length.
        monitor: compare the adapted model with the source on every batch ("source"), on every n-th (a number), or never
            ("off"). It costs a forward of what is not frozen.
        guard: what to do when the comparison says that adapting does harm. "rollback" puts the last good weights back
            and goes on with less of the learning rate. "reset" puts the source's back. "freeze" does so and takes no
            more steps. "warn" says so if there is a comparison, and does nothing. "off" does not judge.
        on_error: what to do with a batch that cannot be adapted, for instance because it lacks a modality. "predict" by
            the weights as they are, count it in `skipped_for` and go on; or "raise". Before a batch has adapted every
            error is raised, but for too little memory: it may be the configuration's.

    Raises:
        ValueError: naming the option, the value seen and what was expected.
    """

    steps: int = 1
    optimizer: OptimizerFactory | None = None
    target: str | None = None
    logits: Logits | None = None
    reset: Reset = "never"
    restore: bool = True
    replay: bool = True
    predicts: Predicts | None = None
    sync: Sync = "global"
    projections: Projections | None = None
    learning_rate: LearningRate | None = None
    clip_gradients: float | None = None
    anchor: float = 0.0
    max_step: float | None = None
    max_drift: float | None = None
    monitor: Monitor = 8
    guard: GuardAction = "warn"
    on_error: OnError = "predict"

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0, _MOST_STEPS)
        check_flag("restore", self.restore)
        check_flag("replay", self.replay)
        check_name("target", self.target, "the name of a module")
        check_choice("sync", self.sync, get_args(Sync))
        check_choice("guard", self.guard, get_args(GuardAction))
        check_choice("on_error", self.on_error, get_args(OnError))
        if self.predicts is not None:
            check_choice("predicts", self.predicts, get_args(Predicts))
        self._check_learning_rate()
        Limits(self.clip_gradients, self.anchor, self.max_step, self.max_drift)  # which checks them
        self._check_functions()
        self._check_reset()
        self._check_monitor()

    @property
    def optimizer_factory(self) -> OptimizerFactory:
        """The function that makes the optimizer: `optimizer`, or else Adam."""
        return _ADAM if self.optimizer is None else self.optimizer

    @property
    def learning_rates(self) -> Sequence[float | None]:
        """The learning rates that adapt side by side, ascending; one alone may be None, for the optimizer's own."""
        given: Any = _AUTO if self.learning_rate == "auto" else self.learning_rate
        return sorted(given) if isinstance(given, list | tuple) else (given,)

    @property
    def monitored_batches(self) -> int:
        """Every how many batches the source model is compared with; 0 for never."""
        return self.monitor if isinstance(self.monitor, int) else int(self.monitor == "source")

    @property
    def updates_per_reset(self) -> int | None:
        """After how many updates the source model returns before the next call; None if updates do not decide."""
        if self.reset == "batch":
            return 1
        return self.reset if is_integer(self.reset, 1) else None

    @property
    def samples_per_reset(self) -> int | None:
        """After how many samples the source model returns before the next call; None if samples do not decide."""
        found = re.fullmatch(r"([1-9][0-9]{0,17}) samples", self.reset) if isinstance(self.reset, str) else None
        return int(found[1]) if found else None

    def _check_learning_rate(self) -> None:
        given: Any = self.learning_rate
        if given is None or (is_number(given) and given > 0):
            return
        rates = _AUTO if given == "auto" else given
        is_list = isinstance(rates, list | tuple) and all(is_number(rate) and rate > 0 for rate in rates)
        if not is_list or not 2 <= len(set(rates)) == len(rates) <= _MOST_RATES:
            raise ValueError(
                f'Expected `learning_rate` to be None, "auto", a number > 0, or 2 to {_MOST_RATES} different ones, but '
                f"got {shown(given)}."
            )
        for name, refused, why in (
            ("steps", self.steps == 0, "without steps all rates are the same"),
            ("reset", self.reset == "batch", "rates differ in what they learned from earlier batches"),
            ("guard", self.guard not in ("warn", "off"), "harm leads to another rate, and to no earlier weights"),
        ):
            if refused:
                raise ValueError(
                    f"Expected another `{name}` with several learning rates, for {why}, but got "
                    f"{name}={getattr(self, name)!r}."
                )

    def _check_functions(self) -> None:
        if self.optimizer is not None and not callable(self.optimizer):
            raise ValueError(
                "Expected `optimizer` to be None or a function from parameters to a torch optimizer, such as "
                f"functools.partial(torch.optim.Adam, lr=1e-4), but got {shown(self.optimizer)}."
            )
        if self.logits is not None and not callable(self.logits):
            raise ValueError(
                "Expected `logits` to be None or a function from the target's output to (B, C) logits, but got "
                f"{shown(self.logits)}."
            )
        if not (self.projections is None or callable(self.projections) or listed_names(self.projections)):
            raise ValueError(
                "Expected `projections` to be names inside the fusion attention, or a function from it to parameters "
                f"by name, but got {shown(self.projections)}."
            )

    def _check_reset(self) -> None:
        words = isinstance(self.reset, str) and self.reset in ("never", "batch", "dataloader")
        if not (words or self.updates_per_reset or self.samples_per_reset):
            raise ValueError(
                'Expected `reset` to be "never", "batch", "dataloader", a number of updates >= 1 or a number of '
                f'samples, such as "640 samples", but got {shown(self.reset)}.'
            )

    def _check_monitor(self) -> None:
        monitor = self.monitor
        if not (isinstance(monitor, str) and monitor in ("source", "off")) and not is_integer(monitor, 1):
            raise ValueError(
                f'Expected `monitor` to be "source", "off" or a number of batches >= 1, but got {shown(monitor)}.'
            )
        if self.guard not in ("off", "warn") and monitor == "off":
            raise ValueError(
                f'Expected `monitor` to be "source" or a number of batches with guard={self.guard!r}, which judges by '
                'it, but got "off".'
            )
