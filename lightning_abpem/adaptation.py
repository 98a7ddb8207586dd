"""The engine: adapts a model at its call, without labels. It needs torch alone.

While an `Adaptation` is open, a call of the target module first adapts parameters of the model, as a method says, to
the batch it is called with, and then proceeds as it would have: the caller sees the adapted logits without any change.
The way of a batch: `_before_call` -> `forward_and_adapt` -> `_compute` (forward and gradients) -> `_apply` (the step)
-> the call itself, its frozen part replayed -> `_after_call`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_abpem.compiled import around_calls, check_entry
from lightning_abpem.distributed import Ranks
from lightning_abpem.fusion import find_fusion
from lightning_abpem.logits import check_head, read_logits
from lightning_abpem.memory import find_memory
from lightning_abpem.method import Edit, Gradients, Record, Step
from lightning_abpem.modules import check_eval, named_module, only_trainable, without_inference_tensors
from lightning_abpem.observing import Observer, Seen
from lightning_abpem.replay import FrozenReplay
from lightning_abpem.settings import Settings
from lightning_abpem.spans import Tokens
from lightning_abpem.weights import AdaptedWeights, describe_run

__all__ = ["Adaptation"]

log = logging.getLogger(__name__)

_ADAPTING: set[int] = set()  # ids of the parameters of the models that some open Adaptation adapts


class _Computed(NamedTuple):
    """A step that can be taken: gradients, None for no step, its figures, its samples; what is remembered if it is."""

    gradients: Gradients | None
    record: Record
    samples: int
    tokens: dict[str, Tokens] | None
    state: dict[str, Any]


class Adaptation:
    """Adapts `model` while its ``with`` block lasts; afterwards everything is as it was, bit by bit.

    Args:
        model: the model; names in the settings are relative to it.
        settings: what to adapt and how.
        on_step: called after each step with its record (detached scalars by name) and the number of samples.
        report: told what adapts, and which spans were read off a batch.

    Attributes:
        params: the adapted parameters by name.
        calls: calls of the target so far.
        updates: steps taken.
        skipped: steps not taken because the loss or a gradient was not finite.
        record: the last step's figures, as the method names them, and `updated`: 1 if the step was taken.
        state: what the method keeps of earlier batches.

    Raises:
        ValueError: on construction, with nothing changed: the names match no attention, a part of the model is in
            training mode, or it is being adapted already. At a call, before any weight moves: spans, k or logits do not
            fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        on_step: Callable[[dict[str, Tensor], int], None] | None = None,
        report: Callable[[str], None] = log.info,
    ) -> None:
        self.model, self.settings, self.on_step, self._report = model, settings, on_step, report
        self.target = model if settings.target is None else named_module(model, settings.target, "target")
        self.method = settings.method
        self.fusion = None if settings.patterns is None else find_fusion(model, settings.patterns)
        self.params = self.method.collect(model, self.fusion)
        self.watched = self.fusion.watched if self.fusion is not None and self.method.needs_attention else []
        self.memory = None
        if settings.memory_batches > 1:
            names = [attention.name for attention in self.watched]
            self.memory = find_memory(model, self.target, names, settings.memory_at, settings.memory_batches)
        if settings.logits is None:
            check_head(model)
        check_entry(model, self.target)
        check_eval(model)
        self.calls = 0
        self.record: dict[str, Tensor] = {}
        self._state: dict[str, Any] = {}
        self._unsettled: _Computed | None = None  # a step that the host does not know yet whether it was taken
        self._source: Mapping[str, Any] | None = None
        self._draft: dict[str, Any] = {}
        self._pending: _Computed | None = None
        self._is_first, self._is_last = True, False
        self._observer = Observer(model, self.target, settings, self.fusion, self.watched, self.memory, report)
        self._stack = ExitStack()

    @property
    def updates(self) -> int:
        self._settle()
        return self.weights.updates

    @property
    def skipped(self) -> int:
        self._settle()
        return self.weights.skipped

    @property
    def state(self) -> dict[str, Any]:
        self._settle()
        return self._state

    def __enter__(self) -> Adaptation:
        try:
            with torch.inference_mode(False):
                self.configure_model()
            self._report(self.describe())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: Any) -> None:
        try:
            self.abandon() if kind else self.drain(is_last=True)
        finally:
            self.close()

    def configure_model(self) -> None:
        """Freeze all but the adapted parameters, keep their source values, attach the hooks; `close` undoes each."""
        adapted = list(self.params.values())
        if any(p.is_inference() for p in adapted):
            raise ValueError(f"Parameters made inside torch.inference_mode() cannot adapt: {', '.join(self.params)}.")
        self._observer.find_ranks()
        own = [id(p) for p in self.model.parameters()]
        if not _ADAPTING.isdisjoint(own):
            raise ValueError(
                f"Parameters of this {type(self.model).__name__} are being adapted already: close the first Adaptation "
                "first."
            )
        _ADAPTING.update(own)
        self._stack.callback(_ADAPTING.difference_update, own)
        self._stack.enter_context(without_inference_tensors(self.model))
        self._stack.enter_context(self.method.prepared(self.model))
        self._stack.enter_context(only_trainable(self.model, adapted))
        self.weights = AdaptedWeights(adapted, self.settings.optimizer)
        if self.settings.restore:
            self._stack.callback(self.weights.restore)
        in_memory = [] if self.memory is None else [self.memory.block]
        self._replay = FrozenReplay(self.target, adapted, [attention.module for attention in self.watched], in_memory)
        self._replay.enabled = self.settings.replay
        if self._replay.enabled:
            self._stack.enter_context(self._replay.attached())
        self._stack.enter_context(around_calls(self.model, self.target, self._before_call, self._after_call))

    def drain(self, is_last: bool = False) -> None:
        """Take part in the steps of other processes until none has a batch or, for `is_last`, will ever have one."""
        ranks = self._observer.ranks
        if ranks is None or ranks.over:
            return
        self._is_last, ranks.resting = is_last, False
        with torch.inference_mode(False), torch.enable_grad():
            while not (ranks.over if is_last else ranks.resting):
                self._adapt(None, None)

    def abandon(self) -> None:
        """Tell the other processes that this one fails, so that they stop too."""
        if self._observer.ranks is not None:
            self._observer.ranks.abandon()

    def close(self) -> None:
        """Put everything back: weights (unless restore=False), requires_grad, .grad, forwards, hooks. Idempotent."""
        with torch.inference_mode(False):
            self._settle()
            self._stack.close()
        if self.memory is not None:
            self.memory.clear()

    def reset(self) -> None:
        """Back to the source model: its weights, a fresh optimizer, an empty memory, nothing of earlier batches."""
        with torch.inference_mode(False):
            self._settle()
            self.weights.reset()
        self._state = {}
        if self.memory is not None:
            self.memory.clear()

    def describe(self) -> str:
        """What adapts, by name, with counts."""
        memory_at = None if self.memory is None else self.memory.name
        return describe_run(self.settings, self.model, self.params, memory_at)

    # ------------------------------------------------------------------------------------------- the way of a batch

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._observer.inside:
            return
        self.calls += 1
        self._pending = None  # what a call that was broken off left
        self._replay.start_batch()
        with torch.inference_mode(False), torch.enable_grad():
            self._adapt(args, kwargs)
        self._replay.start_pass()

    def _adapt(self, args: Any, kwargs: Any) -> None:
        if self._reset_is_due():
            self.reset()
        self.forward_and_adapt(args, kwargs)

    def forward_and_adapt(self, args: Any, kwargs: Any) -> None:
        """Adapt to one batch, the target's arguments: `steps` times forward, gradients and step.

        A step that is due before the prediction is taken; one that is due after it is kept for `_after_call`. Without a
        batch, None, the step is that of the other processes.
        """
        tokens = {} if args is None else self._observer.tokens_of(args, kwargs)
        if self._source is None:
            self._draft = {}
            self._source = self.method.measure_source(self._observe_source)
            self._replay.end_batch()
        for i in range(max(self.settings.steps, 1)):
            self._settle()
            self._is_first = i == 0
            computed = self._compute(args, kwargs, tokens)
            if computed is None:
                return
            if self.settings.predicts == "before" and args is not None:
                self._pending = computed
            else:
                self._apply(computed, last=i + 1 >= self.settings.steps)

    def _compute(self, args: Any, kwargs: Any, tokens: dict[str, Tokens]) -> _Computed | None:
        """The method's gradients for one batch; None if it is empty."""
        self._draft = dict(self._state)
        step = self._observe(args, kwargs, tokens)
        if step is None or step.samples == 0:
            return None
        kept = None if args is None else tokens
        if self.settings.steps == 0:
            return _Computed(None, self.method.loss(step)[1], step.samples, kept, self._draft)

        def again(edit: Edit | None = None) -> Step:
            torch.clear_autocast_cache()  # the method may have moved weights
            own_args, own_kwargs = (args, kwargs) if edit is None or args is None else edit(args, kwargs)
            step = self._observe(own_args, own_kwargs, tokens)
            assert step is not None
            return step

        gradients, record = self.method.gradients(step, again)
        if "loss" not in record:
            raise ValueError(f"Expected {self.method.name} to record its `loss`, but got {sorted(record)}.")
        return _Computed(gradients, record, step.samples, kept, self._draft)

    def _observe(self, args: Any, kwargs: Any, tokens: dict[str, Tokens]) -> Step | None:
        """One forward over memory and batch, as the method sees it; None if no process has a batch."""
        self._replay.start_pass()
        seen = self._observer.observe_all(args, kwargs, tokens, self._is_last)
        if seen is None:
            return None
        return self._step_of(seen, self._observer.ranks)

    def _observe_source(self, args: Any) -> Step:
        """A forward of this process alone, for what is measured on the source."""
        self._replay.start_pass()
        return self._step_of(self._observer.observe(args, {}, {}))

    def _step_of(self, seen: Seen, ranks: Ranks | None = None) -> Step:
        of_method = self.params, self._draft, self._source or {}, self._is_first
        return Step(seen.logits, seen.samples, seen.attention, seen.outputs, *of_method, ranks, seen.is_local)

    def _apply(self, computed: _Computed, last: bool = True) -> None:
        """Step, or not if the loss or a gradient is not finite; then record."""
        record = computed.record
        if computed.gradients is None:
            self._state, updated = computed.state, record["loss"].new_zeros(())
        else:
            updated = self.weights.step(computed.gradients, record["loss"])
            self._unsettled = computed if last else computed._replace(tokens=None)
        self.record = record | {"updated": updated.to(record["loss"])}
        if self.on_step is not None:
            self.on_step(self.record, computed.samples)

    def _settle(self) -> None:
        """What follows from the last step, as soon as somebody needs to know whether it was taken."""
        last, self._unsettled = self._unsettled, None
        if last is None:
            return
        taken = self.weights.settle()
        if taken:
            self._state = last.state
        if self.memory is not None:
            if not taken:  # of a step that failed nothing is remembered
                self.memory.skip()
            elif last.tokens is not None:
                self.memory.push(last.tokens)

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._observer.inside:
            return
        self._replay.end_batch()
        if self.memory is not None and self._unsettled is not None and output is not None:
            self.memory.expect(read_logits(output, self.settings.logits))
        computed, self._pending = self._pending, None
        if computed is not None and output is not None:
            with torch.inference_mode(False):
                self._apply(computed)

    # --------------------------------------------------------------------------------------------------- the details

    def _reset_is_due(self) -> bool:
        self._settle()
        limit = self.settings.updates_per_reset
        return (limit is not None and self.weights.updates_since_reset >= limit) or self.method.wants_reset(self._state)
