"""The steps of an adaptation: from a batch to weights that moved, or to a step that is not taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_abpem.engine.batch import Batch
from lightning_abpem.engine.checkpoint import (
    FORMAT,
    check_copies,
    check_form,
    check_named,
    random_state,
    set_random_state,
    to_cpu,
    to_device,
)
from lightning_abpem.engine.faults import Fault, Faults, explained_gradients
from lightning_abpem.engine.forward import Forward, Pass
from lightning_abpem.engine.healthy import HealthySamples
from lightning_abpem.engine.logits import read_logits
from lightning_abpem.engine.loss_scale import LossScale
from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.engine.method import Edit, Gradients, Record, Step, check_record
from lightning_abpem.engine.monitor import Monitor
from lightning_abpem.engine.ranks import Ranks, process
from lightning_abpem.engine.replay import FrozenReplay
from lightning_abpem.engine.resets import Resets
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.weights import AdaptedWeights
from lightning_abpem.modules.parameters import device_of

__all__ = ["Stepper"]

log = logging.getLogger(__name__)


class _Computed(NamedTuple):
    """A computed step that has not been applied yet.

    Args:
        gradients: of the parameters; None for no step.
        record: its figures.
        samples: their number.
        logits: those of this process's batch; None without one.
        state: the method's, if the step is taken.
        rows: the samples of this process's batch that the step saw; None for all.
        is_last: True if no other step for the same batch follows.
    """

    gradients: Gradients | None
    record: Record
    samples: int
    logits: Tensor | None
    state: dict[str, Any]
    rows: Tensor | None = None
    is_last: bool = True


class Stepper:
    """Takes a method's steps, one or several for each batch.

    Args:
        settings: what to adapt and how.
        params: the adapted parameters by name.
        weights: the same, as they move.
        memory: the tokens of earlier batches, if they are remembered.
        forward: runs the target.
        replay: told where a batch ends.
        scale: of the loss, where gradients pass through float16.
        on_step: called after each step with its record and the number of samples.

    Attributes:
        record: the last step's figures, and `updated`: 1 if the step was taken.
        monitor: compares the adapted model with the source, and guards it.
        faults: tells which batches cannot be adapted.
        healthy: leaves broken samples out of a step.
        fault: of the last batch, if it was left out of the other processes' step.
        logits: (B, C) of the last batch, of all processes that share it, as the model was before the first step.
        resets: when the source model comes back.
    """

    def __init__(
        self,
        settings: Settings,
        params: Mapping[str, nn.Parameter],
        weights: AdaptedWeights,
        memory: TokenMemory | None,
        forward: Forward,
        replay: FrozenReplay,
        scale: LossScale,
        on_step: Callable[[Record, int], None],
    ) -> None:
        self._settings, self._method, self._params = settings, settings.method, params
        self.weights, self._memory, self._forward, self._replay = weights, memory, forward, replay
        self._scale, self._on_step = scale, on_step
        self._device = device_of(params.values())
        self.record: Record = {}
        self._state: dict[str, Any] = {}
        self._source: Mapping[str, Any] | None = None  # what the method measured on the source model
        self._draft: dict[str, Any] = {}  # the state as it will be if the step is taken
        self._is_first, self._is_watched_for_effect = True, False
        self.monitor, self.resets = Monitor(settings, weights, forward), Resets(settings)
        self.faults = Faults(settings.on_error, memory, weights.skips)
        self.healthy = HealthySamples(weights.skips, forward.ranks, not forward.needs_whole_batches)
        self.fault: Fault | None = None
        self.logits: Tensor | None = None
        self._pending: _Computed | None = None  # a step that is due after the prediction
        self._unsettled: _Computed | None = None  # a step that the host does not know yet whether it was taken

    @property
    def state(self) -> dict[str, Any]:
        """The method's own memory of earlier batches."""
        self.settle()
        return self._state

    def adapt(self, args: tuple[object, ...] | None, kwargs: dict[str, object] | None) -> None:
        """Adapt to one batch, the target's arguments: `steps` times forward, gradients and step.

        A step that is due before the prediction is taken; one that is due after it is kept for `end_call`. Without a
        batch, None, the step is that of the other processes.
        """
        self._pending = self.fault = None  # what a call that was broken off left
        self.resets.is_next = self.resets.is_next or self._reset_is_due()
        if self.resets.is_next and args is not None:
            self.reset()
        batch = self._begun(args, kwargs)
        if self._source is None:
            self._draft = {}
            with torch.enable_grad():
                self._source = self._method.measure_source(self._observe_source)
            self._forward.end_step()
            self._replay.end_batch()
        for i in range(max(self._settings.steps, 1)):
            self.settle()
            self._is_first = i == 0
            if i == 0:
                self.monitor.act()
            computed = self._compute(batch)
            if computed is None:
                return
            self.faults.prove()
            if self._settings.predicts == "before" and args is not None:
                self._pending = computed
            else:
                self._apply(computed._replace(is_last=i + 1 >= self._settings.steps))

    def end_call(self, output: object) -> None:
        """End the target's call: take the step that is due after it.

        Args:
            output: the call's; None if its batch was not adapted to.
        """
        is_read = self._memory is not None or not self._is_watched_for_effect
        if output is not None and self._unsettled is not None and is_read:
            logits, rows = read_logits(output, self._settings.logits).detach(), self._unsettled.rows
            logits = logits if rows is None else logits[rows]
            self._check_effect(logits)
            if self._memory is not None:
                self._memory.expect(logits)
        computed, self._pending = self._pending, None
        if computed is not None:
            self._apply(computed)

    def _check_effect(self, prediction: Tensor) -> None:
        """Warn once if the first step moved weights but not a bit of the prediction."""
        before = None if self._unsettled is None else self._unsettled.logits
        self.settle()
        if self._is_watched_for_effect or before is None or not self.weights.updates:
            return
        self._is_watched_for_effect = True
        if before.shape == prediction.shape and torch.equal(before, prediction):
            log.warning(
                "The first step moved %s, but every logit (%s) is the same bit for bit as before it. That is so where "
                "the forward uses projections that were fused or cached in an earlier call (compare their values with "
                "the weights'). It is so, too, where the step is too small for this precision (try a larger learning "
                "rate).",
                *(next(iter(self._params)), prediction.dtype),
            )

    def settle(self) -> None:
        """Learn whether the last step was taken, and keep its state and its tokens if it was."""
        last, self._unsettled = self._unsettled, None
        if last is None:
            return
        taken = self.weights.settle()
        if taken:
            self._state = last.state
        if self._memory is not None:
            if not taken:  # of a step that failed nothing is remembered
                self._memory.skip()
            elif last.is_last and last.logits is not None:
                self._memory.push()
            elif last.is_last:
                self._memory.push_nothing()

    def reset_next(self) -> None:
        """Go back to the source model before the next batch of any process, if there is one."""
        self.resets.is_next = True

    def reset(self) -> None:
        """Go back to the source model."""
        self.settle()
        self.resets.begin_anew()
        self.weights.reset()
        self._state, self._draft = {}, {}
        self.monitor.reset()
        if self._memory is not None:
            self._memory.clear()

    def state_dict(self, memory: bool) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        self.settle()
        parts = {
            "weights": self.weights.state_dict(),
            "scale": self._scale.state_dict(),
            "state": self._state,
            "measured": self._source,
            "resets_next": self.resets.is_next,
            "samples": self.resets.samples,
            "left_out": self.healthy.left_out,
            **self.monitor.state_dict(),
            "memory": self._memory.state_dict() if memory and self._memory is not None else [],
            "random": random_state(self._device),
        }
        return {"format": FORMAT, "method": self._method.name, "process": list(process()), **to_cpu(parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        self.settle()
        check_form(state, self._method.name)
        check_named([state["state"], state["measured"]], self._params)
        check_copies(state["guard"]["good"], state["weights"]["params"])
        is_own = list(state["process"]) == list(process())
        parts = [state["state"], state["measured"], state["scale"], state["memory"] if is_own else []]
        kept, source, scale, memory = to_device(parts, self._device)
        seen = to_device({name: state[name] for name in ("watch", "guard")}, self._device)
        self.weights.load_state_dict(state["weights"])  # the last that may be refused
        self._state, self._source = kept, source
        self.resets.is_next, self.resets.samples = state["resets_next"], state["samples"]
        self.healthy.left_out = state["left_out"]
        self._scale.load_state_dict(scale)
        self.monitor.load_state_dict(seen)
        set_random_state(state["random"], self._device)
        if self._memory is not None:
            self._memory.load_state_dict(memory)
            if state["memory"] and not is_own:
                log.warning("The memory of the loaded state is another process's: this one begins with an empty one.")

    # ------------------------------------------------------------------------------------------------------ one step

    def _begun(self, args: tuple[object, ...] | None, kwargs: dict[str, object] | None) -> Batch:
        """Return a batch with its tokens.

        Raises:
            Exception: if it is too large, or has no such tokens.
        """
        batch = Batch(args, kwargs)
        if args is None or kwargs is None:
            return batch
        try:
            self.faults.refuse_size(args, kwargs)
            batch.tokens = self._forward.tokens_of(args, kwargs)
        except Exception as error:
            self._is_first = True
            if not self._leave_out(batch, error):
                raise
        return batch

    def _leave_out(self, batch: Batch, error: Exception) -> bool:
        """Leave a batch out of the other processes' step; return False if that is too late, or the error no fault."""
        if self._is_first and self._forward.can_leave_out:
            self.fault = self.faults.of(error, batch.args, batch.kwargs)
            batch.has_failed = self.fault is not None
        return batch.has_failed

    def _compute(self, batch: Batch) -> _Computed | None:
        """The method's gradients for one batch; None if it is empty."""
        self._draft = dict(self._state)
        ranks = self._forward.ranks
        if ranks is not None:
            ranks.updates = self.weights.updates
        try:
            step = self.healthy.observe(batch, self._observe) if self._is_first else self._observe(batch)
            if step is None:
                return None
            if self._is_first:
                self.resets.samples += self.healthy.left_out_now
                self.logits = step.logits[-step.samples :].detach() if step.samples else None
            computed = self._of_step(step, batch) if step.samples else None
        finally:
            self._forward.end_step()
        if computed is not None and self._is_first:
            figures = self.monitor.see(batch, computed.record["loss"])
            computed = computed._replace(record={**computed.record, **figures})
        if ranks is not None:
            ranks.end_step()
        return computed

    def _of_step(self, step: Step, batch: Batch) -> _Computed:
        logits = None if not batch.is_own else step.logits[-step.samples :].detach()
        if self._settings.steps == 0 or self.monitor.guard.is_frozen:
            observed = self._method.loss(step)
            check_record(self._method, observed)
            return _Computed(None, observed[1], step.samples, logits, self._draft, batch.rows)

        def rerun(edit: Edit | None = None) -> Step:
            torch.clear_autocast_cache()  # the method may have moved weights
            own = replace(batch)
            if edit is not None and batch.is_own:
                own.args, own.kwargs = edit(batch.args, batch.kwargs)
            entered = None if self._memory is None else self._memory.current
            step = self._observe(own)
            assert step is not None
            if self._memory is not None:
                self._memory.current = entered  # not what the method made of it
            return step

        with explained_gradients():
            made = self._method.gradients(step, rerun)
        check_record(self._method, made)
        return _Computed(*made, step.samples, logits, self._draft, batch.rows)

    def _observe(self, batch: Batch) -> Step | None:
        """Run one forward over memory and batch, as the method sees it; return None if no process has a batch."""
        seen = self._forward.observe_all(batch, self._leave_out)
        if seen is None:
            return None
        batch.logits = seen.own
        if self.resets.is_next:  # due before the batch of other processes
            self.reset()
        return self._step_of(seen, self._forward.ranks)

    def _observe_source(self, args: Sequence[object]) -> Step:
        """Run a forward of this process alone, for what is measured on the source."""
        args = tree_map_only(torch.Tensor, lambda x: x.to(self._device), args)
        return self._step_of(self._forward.observe(Batch(args, {})))

    def _step_of(self, seen: Pass, ranks: Ranks | None = None) -> Step:
        return Step(
            *(seen.logits, seen.samples, seen.attention, seen.outputs),
            *(self._params, self._draft, self._source or {}, self._is_first),
            *(self._scale.of(seen.logits, self._params.values()), ranks, seen.is_local),
        )

    def _apply(self, computed: _Computed) -> None:
        """Step, or not if the loss or a gradient is not finite; then record."""
        record = computed.record
        self.resets.samples += computed.samples * computed.is_last
        if computed.gradients is None:
            updated = record["loss"].new_zeros(())
            if self._settings.steps and not self.monitor.guard.is_frozen:  # who only observes sees each batch by itself
                self._state = computed.state
                self.weights.skip(record["loss"])
        else:
            self._unsettled = computed  # ahead of the step: none that is taken goes uncounted
            updated = self.weights.step(computed.gradients, record["loss"])
            self._scale.update(updated)
        self.record = record | {"updated": updated.to(record["loss"])}
        self._on_step(self.record, computed.samples)

    def _reset_is_due(self) -> bool:
        self.settle()
        return self.resets.is_due(self.weights.updates_since_reset) or self._method.wants_reset(self._state)
