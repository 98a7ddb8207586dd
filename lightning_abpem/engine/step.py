"""The steps of an adaptation: from a batch to weights that moved, or to a step that is not taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
from lightning_abpem.engine.course import Computed, Course
from lightning_abpem.engine.faults import Fault, Faults, Skips
from lightning_abpem.engine.forward import Forward
from lightning_abpem.engine.healthy import HealthySamples
from lightning_abpem.engine.logits import read_from_outside
from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.engine.method import Record
from lightning_abpem.engine.monitor import Monitor
from lightning_abpem.engine.observer import Observer
from lightning_abpem.engine.ranks import process
from lightning_abpem.engine.rates import Rates
from lightning_abpem.engine.replay import FrozenReplay
from lightning_abpem.engine.resets import Resets
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.weights import AdaptedWeights
from lightning_abpem.modules.parameters import device_of

__all__ = ["Stepper"]

log = logging.getLogger(__name__)

_ONE_RATE: Mapping[str, Any] = {"leader": 0, "sums": None, "others": []}


class Stepper:
    """Takes a method's steps, one or several for each batch.

    Args:
        settings: what to adapt and how.
        params: the adapted parameters by name.
        courses: of their values; one for each learning rate.
        memory: the tokens of earlier batches, if they are remembered.
        forward: runs the target.
        replay: told where a batch ends.
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
        courses: Sequence[Course],
        memory: TokenMemory | None,
        forward: Forward,
        replay: FrozenReplay,
        on_step: Callable[[Record, int], None],
    ) -> None:
        self._settings, self._params = settings, params
        self._course, self._memory, self._forward, self._replay = courses[0], memory, forward, replay
        self._rates = Rates(settings.learning_rates, courses) if len(courses) > 1 else None
        self._skips = courses[0].weights.skips
        self._on_step = on_step
        self._device = device_of(params.values())
        self.record: Record = {}
        self._is_watched_for_effect = False
        self._observer = Observer(
            settings.method, courses[0], params, memory, forward, self._leave_out, self._reset_if_next
        )
        self.monitor, self.resets = Monitor(settings, courses[0].weights, forward), Resets(settings)
        self.faults = Faults(settings.on_error, memory, self._skips)
        self.healthy = HealthySamples(self._skips, forward.ranks, not forward.needs_whole_batches)
        self.fault: Fault | None = None
        self.logits: Tensor | None = None
        self._first_logits: Tensor | None = None  # of this process's part of the batch
        self._pending: Computed | None = None  # a step that is due after the prediction

    @property
    def state(self) -> dict[str, Any]:
        """The method's own memory of earlier batches."""
        self.settle()
        return self._leader.state

    @property
    def weights(self) -> AdaptedWeights:
        """The weights that predict."""
        return self._leader.weights

    @property
    def _leader(self) -> Course:
        """The course that predicts."""
        return self._course if self._rates is None else self._rates.courses[self._rates.leader]

    def adapt(self, args: tuple[object, ...] | None, kwargs: dict[str, object] | None) -> None:
        """Adapt to one batch, the target's arguments: `steps` times forward, gradients and step.

        A step that is due before the prediction is taken; one that is due after it is kept for `end_call`. Without a
        batch, None, the step is that of the other processes.
        """
        self._pending = self.fault = None  # what a call that was broken off left
        self._enter(self._leader)
        self.resets.is_next = self.resets.is_next or self._reset_is_due()
        if self.resets.is_next and args is not None:
            self.reset()
        batch = self._begun(args, kwargs)
        if self._observer.measured is None:
            self._observer.measure_source()
            self._replay.end_batch()
        if self._rates is not None:
            self._choose(self._rates)
        for i in range(max(self._settings.steps, 1)):
            self.settle()
            if i == 0:
                self.monitor.act()
            computed = self._compute(batch, is_first=i == 0)
            if computed is None:
                return
            self.faults.prove()
            if self._settings.predicts == "before" and args is not None:
                self._pending = computed
            else:
                self._apply(computed._replace(is_last=i + 1 >= self._settings.steps))
        if self._rates is not None:
            self._follow(batch, self._rates)

    def end_call(self, output: object) -> None:
        """End the target's call: take the step that is due after it.

        Args:
            output: the call's; None if its batch was not adapted to.
        """
        is_read = self._memory is not None or not self._is_watched_for_effect
        if output is not None and self._leader.unsettled is not None and is_read:
            logits, rows = read_from_outside(output, self._settings.logits), self._leader.unsettled.rows
            logits = logits if rows is None else logits[rows]
            self._check_effect(logits)
            if self._memory is not None:
                self._memory.expect(logits)
        computed, self._pending = self._pending, None
        if computed is not None:
            self._apply(computed)

    def _check_effect(self, prediction: Tensor) -> None:
        """Warn once if the first step moved weights but not a bit of the prediction."""
        before = None if self._leader.unsettled is None else self._leader.unsettled.logits
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
        settled = self._leader.settle()
        if settled is not None and self._memory is not None:
            last, taken = settled
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
        if self._rates is not None:
            self._rates.reset()
            self._lead(self._leader)
        elif self._settings.steps or not self.weights.are_source:  # who only observes leaves what others write
            self._course.reset()
        self._observer.restart(self._course)
        self.monitor.reset()
        if self._memory is not None:
            self._memory.clear()

    def state_dict(self, memory: bool) -> dict[str, Any]:
        """See `Adaptation.state_dict`."""
        self.settle()
        parts = {
            **self._leader.state_dict(),
            "measured": self._observer.measured,
            "resets_next": self.resets.is_next,
            "samples": self.resets.samples,
            "left_out": self.healthy.left_out,
            "proven": self.faults.proven,
            **self.monitor.state_dict(),
            "rates": _ONE_RATE if self._rates is None else self._rates.state_dict(),
            "memory": self._memory.state_dict() if memory and self._memory is not None else [],
            "random": random_state(self._device),
        }
        return {"format": FORMAT, "method": self._settings.method.name, "process": list(process()), **to_cpu(parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Adaptation.load_state_dict`."""
        self.settle()
        check_form(state, self._settings.method.name)
        check_named([own["state"] for own in (state, *state["rates"]["others"])] + [state["measured"]], self._params)
        check_copies(state["guard"]["good"], state["weights"]["params"])
        is_own = list(state["process"]) == list(process())
        source, memory = to_device([state["measured"], state["memory"] if is_own else []], self._device)
        seen = to_device({name: state[name] for name in ("watch", "guard", "monitored")}, self._device)
        self._load_courses(state)  # the last that may be refused
        self._observer.measured = source
        self.resets.is_next, self.resets.samples = state["resets_next"], state["samples"]
        self.healthy.left_out = state["left_out"]
        self.faults.proven = state["proven"]
        self.monitor.load_state_dict(seen)
        set_random_state(state["random"], self._device)
        if self._memory is not None:
            self._memory.load_state_dict(memory)
            if state["memory"] and not is_own:
                log.warning("The memory of the loaded state is another process's: this one begins with an empty one.")

    def _load_courses(self, state: Mapping[str, Any]) -> None:
        """Go on with the weights of every learning rate.

        Raises:
            ValueError: if they do not fit; nothing has changed then.
        """
        own: Mapping[str, Any] = state["rates"]
        courses = [self._course] if self._rates is None else self._rates.courses
        states = list(own["others"])
        states.insert(own["leader"], state)
        if len(states) != len(courses):
            raise ValueError(f"Expected a state of {len(courses)} learning rates side by side, but got {len(states)}.")
        for course, theirs in zip(courses, states, strict=True):
            course.weights.check(theirs["weights"])
        for course, theirs in sorted(zip(courses, states, strict=True), key=lambda pair: pair[1] is state):
            self._enter(course)
            course.weights.skips = self._skips
            parts = to_device({name: theirs[name] for name in ("scale", "state")}, self._device)
            course.load_state_dict({"weights": theirs["weights"], **parts})
        self.monitor.weights = self._course.weights
        if self._rates is not None:
            self._rates.load_state_dict(to_device(own, self._device))

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
            self._observer.is_first = True
            if not self._leave_out(batch, error):
                raise
        return batch

    def _leave_out(self, batch: Batch, error: Exception) -> bool:
        """Leave a batch out of the other processes' step; return False if that is too late, or the error no fault."""
        if self._observer.is_first and self._forward.can_leave_out:
            self.fault = self.faults.of(error, batch.args, batch.kwargs)
            batch.has_failed = self.fault is not None
        return batch.has_failed

    def _compute(self, batch: Batch, is_first: bool) -> Computed | None:
        """The method's gradients for one batch; None if it is empty."""
        observer, ranks = self._observer, self._forward.ranks
        observer.start(self._course, is_first)
        try:
            step = self.healthy.observe(batch, observer.observe) if is_first else observer.observe(batch)
            if step is None:
                return None
            if is_first:
                self.resets.samples += self.healthy.left_out_now
                self.logits = step.logits[-step.samples :].detach() if step.samples else None
                self._first_logits = batch.logits
            computed = observer.compute(step, batch, self._moves) if step.samples else None
        finally:
            self._forward.end_step()
        if computed is not None and is_first:
            figures = self.monitor.see(batch, computed.record["loss"])
            computed = computed._replace(record={**computed.record, **figures})
        if ranks is not None:
            ranks.end_step()
        return computed

    def _apply(self, computed: Computed) -> None:
        """Step, or not if the loss or a gradient is not finite; then record."""
        record = computed.record
        self.resets.samples += computed.samples * computed.is_last
        updated = self._course.step(computed) if self._moves else record["loss"].new_zeros(())
        self.record = record | {"updated": updated.to(record["loss"])}
        if self._rates is not None:
            self.record["learning_rate"] = record["loss"].new_tensor(self._rates.rates[self._rates.leader])
        self._on_step(self.record, computed.samples)

    def _choose(self, rates: Rates) -> None:
        """Let the course predict that looks best by now."""
        self.settle()
        before, best = self._leader, rates.choose()
        if best is not before:
            best.settle()  # before it leads: its batch is remembered already
            self._lead(best)
            if self._memory is not None:
                self._memory.skip()  # the prediction was another course's

    def _lead(self, course: Course) -> None:
        """Let a course predict: what it skips is said and counted, and it is compared with the source."""
        self._enter(course)
        self.monitor.weights, course.weights.skips = course.weights, self._skips

    def _enter(self, course: Course) -> None:
        """Have the weights of a course in the model, whatever an interrupt has left there."""
        if course is not self._course:
            self._course.weights.leave()
            self._course.weights.skips = Skips(speaks=False)
            self._course = course
        course.weights.enter()

    def _follow(self, batch: Batch, rates: Rates) -> None:
        """Let the courses that do not predict take their steps for a batch, and compare all of them."""
        leader, seen = self._course, dict[int, Tensor | None]()
        seen[id(leader)], source = self._first_logits, None
        try:
            for course in rates.followers:
                self._enter(course)
                seen[id(course)] = self._follow_on(course, batch)
        finally:
            self._lead(leader)
        if batch.is_own:
            with leader.weights.at_source():
                source = batch.seen_of(self._forward.predict(batch.args, batch.kwargs))
        ranks = self._forward.ranks
        rates.see([seen[id(course)] for course in rates.courses], source, None if ranks is None else ranks.total)

    def _follow_on(self, course: Course, batch: Batch) -> Tensor | None:
        """Take the steps of one course; return the batch's logits before them."""
        observer, ranks, first = self._observer, self._forward.ranks, None
        for i in range(self._settings.steps):
            course.settle()
            if self._settings.method.wants_reset(course.state):
                course.reset()
            observer.start(course, is_first=i == 0)
            try:
                step = observer.observe(batch)
                first = batch.logits if i == 0 else first
                computed = observer.compute(step, batch, moves=True) if step is not None and step.samples else None
            finally:
                self._forward.end_step()
            if ranks is not None:
                ranks.end_step()
            if computed is not None:
                course.step(computed)
        return first

    def _reset_if_next(self) -> None:
        """Go back to the source model if that is due before the batch of other processes."""
        if self.resets.is_next:
            self.reset()

    @property
    def _moves(self) -> bool:
        """False if each batch is observed by itself, and no weight moves."""
        return self._settings.steps > 0 and not self.monitor.guard.is_frozen

    def _reset_is_due(self) -> bool:
        self.settle()
        return self.resets.is_due(self.weights.updates_since_reset) or self._settings.method.wants_reset(
            self._course.state
        )
