"""The engine: adapts a model at its call, without labels. It needs torch alone.

While an `Adaptation` is open, a call of the target module first adapts parameters of the model to its batch, as a
method says. Then it proceeds as it would have: the caller sees the adapted logits without any change. The way of a
batch: `_call` -> `Stepper.adapt` (forward, gradients, step) -> the call itself, its frozen part replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from lightning_abpem.attention.blocks import ScoreBlock
from lightning_abpem.attention.fusion import find_fusion
from lightning_abpem.engine.clock import Clock
from lightning_abpem.engine.course import Course
from lightning_abpem.engine.describe import describe_run
from lightning_abpem.engine.faults import Fault
from lightning_abpem.engine.forward import Forward
from lightning_abpem.engine.guard import Event
from lightning_abpem.engine.logits import check_head
from lightning_abpem.engine.loss_scale import LossScale
from lightning_abpem.engine.memory import find_memory
from lightning_abpem.engine.method import Record, collected
from lightning_abpem.engine.recording import Recorder
from lightning_abpem.engine.replay import FrozenReplay
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.shards import check_shards, gathers_weights, has_shards, modules_of_shards, reshard
from lightning_abpem.engine.step import Stepper
from lightning_abpem.engine.traceless import comes_from_forward
from lightning_abpem.engine.under_way import CallsUnderWay, CallUnderWay
from lightning_abpem.engine.weights import AdaptedWeights
from lightning_abpem.modules.compiled import check_entry, is_compiled, plain_forward
from lightning_abpem.modules.inference import explain_inference, without_inference_tensors
from lightning_abpem.modules.names import named_module
from lightning_abpem.modules.parameters import GradientFlags, device_of
from lightning_abpem.modules.patches import Changes, adapt_once, check_shapes
from lightning_abpem.modules.stand_ins import StandIn, Uncopied

__all__ = ["Adaptation"]

log = logging.getLogger(__name__)


class Adaptation(Uncopied):
    """Adapts `model` while its ``with`` block lasts; afterwards everything is as it was, bit by bit.

    Args:
        model: the model; names in the settings are relative to it.
        settings: what to adapt and how.
        on_step: called after each step with its record (detached scalars by name) and the number of samples.
        report: told what adapts, and which spans were read off a batch.
        scale: of the loss, where gradients pass through float16; default: as torch.amp.GradScaler begins.
        recorder: told of every step, for a report.

    Attributes:
        params: the adapted parameters by name.
        calls: calls of the target so far.
        seconds: spent adapting so far, by the device's own clock; reading it waits for a GPU.
        updates: steps taken.
        skipped: steps not taken: the loss or a gradient was not finite, no sample was fit for one, or the batch could
            not be adapted.
        skipped_for: the same by reason, as counts.
        left_out: samples left out of steps, for their logits were not finite.
        record: the last step's figures, as the method names them, and `updated`: 1 if the step was taken.
        state: what the method keeps of earlier batches.
        events: what the guard did.

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
        scale: LossScale | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.recorder = recorder
        self.model, self.settings, self.on_step, self._report = model, settings, on_step, report
        reshard(model)
        self.target = model if settings.target is None else named_module(model, settings.target, "target")
        self.method = settings.method
        self.fusion = None if settings.patterns is None else find_fusion(model, settings.patterns, settings.projections)
        self.params = collected(self.method, model, self.fusion)
        self.watched = self.fusion.watched if self.fusion is not None and self.method.needs_attention else []
        self.memory = None
        if settings.memory_batches > 1:
            names = [attention.name for attention in self.watched]
            self.memory = find_memory(model, self.target, names, settings.memory_at, settings.memory_batches)
        if settings.logits is None:
            check_head(model)
        check_entry(model, self.target)
        check_shapes(model)
        self.calls = 0
        self._clock = Clock(device_of(self.params.values())) if recorder is None else recorder.clock
        self._under_way = CallsUnderWay(type(self.target).__name__)
        self._plain_call = plain_forward(self.target)
        self._scale = LossScale() if scale is None else scale
        in_memory = [] if self.memory is None else [self.memory.block]
        hooked = [attention.module for attention in self.watched] + modules_of_shards(model)
        self._replay = FrozenReplay(self.target, list(self.params.values()), hooked, in_memory)
        self._replay.enabled = settings.replay
        self._forward = Forward(
            *(model, self.target, settings, self.fusion, self.watched, self.memory, self._replay, report)
        )
        self._changes = Changes()
        self._has_observer_failed = False
        self._before = (0, 0)  # updates and skipped steps of the state that this goes on from

    @property
    def seconds(self) -> float:
        return self._clock.read()

    @property
    def record(self) -> Record:
        return self._stepper.record

    @property
    def updates(self) -> int:
        self._stepper.settle()
        return self._stepper.weights.updates

    @property
    def skipped(self) -> int:
        self._stepper.settle()
        return self._stepper.weights.skips.total

    @property
    def skipped_for(self) -> dict[str, int]:
        self._stepper.settle()
        return dict(self._stepper.weights.skips.counts)

    @property
    def left_out(self) -> int:
        return self._stepper.healthy.left_out

    @property
    def events(self) -> list[Event]:
        return self._stepper.monitor.guard.events

    @property
    def state(self) -> dict[str, Any]:
        return self._stepper.state

    def __enter__(self) -> Adaptation:
        try:
            with torch.inference_mode(False):
                self.configure_model()
            self._report(self.describe())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        try:
            self.abandon() if kind else self.end_stream()
        finally:
            self.close()

    def configure_model(self) -> None:
        """Freeze all but the adapted parameters, and stand in for the target's call; `close` undoes each."""
        adapted, changes = list(self.params.values()), self._changes
        if any(p.is_inference() for p in adapted):
            raise ValueError(f"Parameters made inside torch.inference_mode() cannot adapt: {', '.join(self.params)}.")
        self._forward.find_ranks()
        adapt_once(changes, self.model)
        without_inference_tensors(changes, self.model)
        changes.enter(self.method.prepared(self.model))
        self._flags = GradientFlags(self.model, adapted)
        changes.note(self._flags.thaw)
        is_sharded = check_shards(self.params, self.method.name, self.method.reads_params)
        self._keeps_flags = has_shards(self.model)  # FSDP2 reads them once
        if self._keeps_flags:
            self._flags.freeze()
        courses = self._courses(is_sharded)
        if self._replay.enabled:
            self._replay.attach(changes, self._flags)
        self._stepper = Stepper(
            self.settings, self.params, courses, self.memory, self._forward, self._replay, self._report_step
        )
        changes.note(self._stepper.settle)
        call = torch.compiler.disable(self._call) if is_compiled(self.model) else self._call
        self._stand_in = StandIn(self.target, _entry(self.target), call)
        changes.note(self._stand_back)
        self._stand_in.place()
        changes.note(self._forward.end_step)  # which is undone first: a snapshot knows of the changes above

    def _courses(self, is_sharded: bool) -> list[Course]:
        """Return a course of the weights for each learning rate; the first one is in the model."""
        own, changes = self.settings, self._changes
        if is_sharded and len(own.learning_rates) > 1:
            raise ValueError(
                "Expected one `learning_rate` for a model whose weights are cut into shards, but got "
                f"{len(own.learning_rates)} side by side."
            )
        letting_go = partial(reshard, self.model) if is_sharded else None
        courses: list[Course] = []
        for rate in own.learning_rates:
            weights = AdaptedWeights(self.params, own.optimizer_factory, letting_go, rate, own.limits)
            courses.append(Course(weights, copy(self._scale) if courses else self._scale))

        def restore() -> None:
            if own.steps or not all(course.weights.are_source for course in courses):  # else nothing of ours is there
                courses[0].weights.restore()

        if own.restore:
            changes.note(restore)
        for course in courses:
            changes.note(course.weights.show_gradients)
        for course in courses[1:]:
            course.weights.leave()
            course.weights.written = courses[0].weights.written  # of the same parameters
        return courses

    def drain(self, is_last: bool = False, is_empty: bool = False) -> None:
        """Take part in the steps of other processes until none has a batch or, for `is_last`, will ever have one.

        Args:
            is_last: this process will have no batch any more.
            is_empty: this process had no batch of a dataloader that the others may have batches of.

        Raises:
            RuntimeError: in all processes, if one `is_empty` and another has a batch.
        """
        ranks = self._forward.ranks
        if ranks is None:
            return
        ranks.leave(is_last, is_empty)
        while not (ranks.done or (ranks.is_idle and not is_last)):
            self._adapt(None, None)

    def end_stream(self) -> None:
        """Take part in the other processes' last steps; warn if there were batches and none of them was adapted."""
        self.drain(is_last=True)
        updates, skipped = self._before
        if self.calls and self.updates == updates and self.skipped - skipped >= self.calls:
            log.warning(
                "None of the %d batches was adapted, so that every prediction is that of the weights as they were: %s.",
                *(self.calls, ", ".join(f"{reason} ({count})" for reason, count in self.skipped_for.items())),
            )

    def abandon(self) -> None:
        """Tell the other processes that this one fails, so that they stop too."""
        if self._forward.ranks is not None:
            self._forward.ranks.abandon()

    def close(self) -> None:
        """Put everything back: weights (unless restore=False), requires_grad, .grad, forwards, hooks. Idempotent."""
        with torch.inference_mode(False):
            self._changes.close()
        if self.memory is not None:
            self.memory.clear()

    def reset(self) -> None:
        """Back to the source model: its weights, a fresh optimizer, an empty memory, nothing of earlier batches."""
        with torch.inference_mode(False):
            self._stepper.reset()

    def reset_next(self) -> None:
        """The same before the next batch, if there is one: with several processes, a batch of any."""
        self._stepper.reset_next()

    def state_dict(self, memory: bool = True) -> dict[str, Any]:
        """Return what the stream needs to go on elsewhere: adapted values, optimizer, memory, random numbers.

        All is on the host, and the model itself is not in it. With several processes each has its own.

        Args:
            memory: whether the remembered tokens are wanted; without them a stream goes on with an empty memory.
        """
        return self._stepper.state_dict(memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a stream where `state_dict` was called, to the last bit.

        Raises:
            ValueError: if the state is damaged, or of another model, source, fusion pattern, method or optimizer;
                nothing has changed then.
        """
        with torch.inference_mode(False):
            self._stepper.load_state_dict(state)
        self._before = (self.updates, self.skipped)
        if self.recorder is not None:
            self.recorder.known_events = len(self.events)
        self._report(f"{self.method.name} goes on from a state after {self.updates} updates.")

    def score_blocks(
        self, args: tuple[object, ...], kwargs: dict[str, object], samples: int
    ) -> tuple[list[ScoreBlock], list[ScoreBlock]]:
        """Return the fusion's scores of a batch's first samples, at the source's weights and at the present ones.

        Each takes one pass, which leaves no trace. The arguments are those of a call of the target.
        """
        call = CallUnderWay()  # so that the passes are the engine's own
        try:
            self._under_way.begin(call)
            self._replay.end_batch()
            with torch.inference_mode(False), torch.no_grad():
                after = self._forward.score_blocks(args, kwargs, samples)
                self._replay.end_batch()
                with self._stepper.weights.at_source():
                    return self._forward.score_blocks(args, kwargs, samples), after
        finally:
            self._replay.end_batch()
            self._stay_in_front()
            del call

    def describe(self) -> str:
        """Return a few lines that say what adapts, and how."""
        memory_at = None if self.memory is None else self.memory.name
        return describe_run(self.settings, self.model, self.params, memory_at)

    # ------------------------------------------------------------------------------------------- the way of a batch

    def _call(self, target_call: Callable[..., object], /, *args: object, **kwargs: object) -> Any:
        """Stand in for the target's call: adapt to the batch, then make the call."""
        if not self._changes:  # after the end, by somebody who kept the stand-in
            return target_call(*args, **kwargs)
        if self._under_way.has_own():
            # The engine's own pass, or a call that the target's forward makes of itself.
            return (self._plain_call if self._forward.is_plain else target_call)(*args, **kwargs)
        call = CallUnderWay()
        try:
            self._under_way.begin(call)
            return self._adapted_call(target_call, args, kwargs)
        finally:
            del call  # also if somebody keeps the error, and this frame with it

    def _adapted_call(
        self, target_call: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        """Adapt to the batch, then make the call."""
        try:
            self._forward.drop()  # what a call that was interrupted has left
            self._replay.end_batch()
            self.calls += 1
            if self.recorder is not None and self.watched and not self._keeps_flags:
                self.recorder.keep(args, kwargs)
            if self._forward.ranks is not None and self._forward.ranks.done:
                return target_call(*args, **kwargs)  # after the streams, in which the others have no part
            fault = self._fault_in(partial(self._adapt, args, kwargs), args, kwargs)
            fault = fault or self._dropped(self._stepper.fault)
            if fault is None:
                self._replay.start_pass()
            output = target_call(*args, **kwargs)
            if fault is not None and fault.error is not None:
                raise fault.error  # which the pass met alone
            late = self._fault_in(partial(self._end_call, output if fault is None else None), args, kwargs)
            fault = fault or late
            if fault is not None:
                self._stepper.faults.count(fault)
            return output
        except Exception as error:
            explain_inference(error)
            raise
        finally:
            fault = late = None  # its frames would hold it, and it them
            self._replay.end_batch()
            self._stay_in_front()

    def _stand_back(self) -> None:
        """Leave the place of the target's call."""
        self._stand_in.put_back()

    def _stay_in_front(self) -> None:
        """Stand in for what the call itself has put into the place of its own forward."""
        before = self._stand_in
        if self._changes and not before.is_in_place:
            self._stand_in = before.renewed()
            self._stand_in.place()
            before.put_back()

    def _adapt(self, args: tuple[object, ...] | None, kwargs: dict[str, object] | None) -> None:
        """Take the steps for a batch; without one, None, take part in those of the other processes.

        Who only observes has no use for gradients: that pass has the caller's grad mode.
        """
        has_gradients = self.settings.steps > 0 or torch.is_grad_enabled()
        weights = self._stepper.weights
        if self.settings.steps:
            weights.refuse_others()
        with self._clock.running():
            try:
                if not self._keeps_flags:
                    self._flags.freeze()
                with torch.inference_mode(False), torch.set_grad_enabled(has_gradients):
                    self._stepper.adapt(args, kwargs)
            finally:
                self._forward.end_step()  # of a pass that was broken off
                if not self._keeps_flags:
                    self._flags.thaw()
                weights.written.note()

    def _end_call(self, output: object) -> None:
        with torch.inference_mode(False), self._clock.running():
            self._stepper.end_call(output)

    def _fault_in(self, part: Callable[[], None], args: tuple[object, ...], kwargs: dict[str, object]) -> Fault | None:
        """Run a part of the adapting to a batch; return its fault if the batch is to be predicted all the same.

        So it is where the forward raises: the call itself raises then, with the state that it leaves without us. The
        tensors of the pass are let go of before the prediction is made.
        """
        self._has_observer_failed = False
        try:
            part()
            return None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            fault = self._fault_of(error, args, kwargs)
            if fault is None:
                raise
        return self._dropped(fault)

    def _fault_of(self, error: BaseException, args: tuple[object, ...], kwargs: dict[str, object]) -> Fault | None:
        if self._has_observer_failed or self._forward.ranks is not None:
            return None
        fault = self._stepper.faults.of(error, args, kwargs) if isinstance(error, Exception) else None
        if fault is None and comes_from_forward(error):
            clear_frames(error.__traceback__)
            fault = Fault(type(error).__name__, str(error), error)
        return fault

    def _dropped(self, fault: Fault | None) -> Fault | None:
        """Let go of a pass that failed, if one did; return its fault."""
        if fault is not None:
            self._replay.end_batch()
            self._stepper.faults.drop(fault)
        return fault

    def _report_step(self, record: Record, samples: int) -> None:
        stepper = self._stepper
        try:
            if self.on_step is not None:
                self.on_step(record, samples)
            if self.recorder is not None:
                self.recorder.add(record, samples, stepper.logits, self.events, stepper.resets.count)
        except Exception:
            self._has_observer_failed = True  # no fault of the batch: its step was taken
            raise


def _entry(target: nn.Module) -> str:
    """Return the attribute of the target that stands for its call.

    That is `forward`: the target's own hooks run once, around the adaptation, and change what it gets and gives.
    Compiled calls have their hooks inside, and FSDP2 gathers a module's weights in its hooks.
    """
    if getattr(target, "_compiled_call_impl", None) is not None:
        return "_compiled_call_impl"
    return "_call_impl" if gathers_weights(target) else "forward"
