"""One step of a method, computed but not applied: a forward over memory and batch, and the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_abpem.engine.batch import Batch
from lightning_abpem.engine.course import Computed, Course
from lightning_abpem.engine.faults import explained_gradients
from lightning_abpem.engine.forward import Forward, Pass
from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.engine.method import Edit, Method, Step, check_record
from lightning_abpem.engine.ranks import Ranks
from lightning_abpem.modules.parameters import device_of

__all__ = ["Observer"]


class Observer:
    """Runs forwards as a method sees them, and asks it for the gradients of a step.

    Args:
        method: the method.
        course: of the weights that are in the model.
        params: the adapted parameters by name.
        memory: the tokens of earlier batches, if they are remembered.
        forward: runs the target.
        leave_out: called with a batch whose forward failed; see `Forward.observe_all`.
        begin: called once the batch is known to be there, if only in another process.

    Attributes:
        measured: what the method measured on the source model; None before the first batch.
        is_first: True while the first step of a batch is computed.
    """

    def __init__(
        self,
        method: Method,
        course: Course,
        params: Mapping[str, nn.Parameter],
        memory: TokenMemory | None,
        forward: Forward,
        leave_out: Callable[[Batch, Exception], bool],
        begin: Callable[[], None],
    ) -> None:
        self._method, self._course, self._params = method, course, params
        self._memory, self._forward = memory, forward
        self._leave_out, self._begin = leave_out, begin
        self.measured: Mapping[str, Any] | None = None
        self.is_first = True
        self._draft: dict[str, Any] = {}  # the course's state as it will be if the step is taken

    def measure_source(self) -> None:
        """Have the method measure the source model."""
        self._draft = {}
        with torch.enable_grad():
            self.measured = self._method.measure_source(self._observe_source)
        self._forward.end_step()

    def start(self, course: Course, is_first: bool) -> None:
        """Begin a step of a course, whose weights are in the model."""
        self._course, self._draft, self.is_first = course, dict(course.state), is_first
        if self._forward.ranks is not None:
            self._forward.ranks.updates = course.weights.updates

    def restart(self, course: Course) -> None:
        """Go on with the step on another course, which begins anew."""
        self._course, self._draft = course, {}

    def observe(self, batch: Batch) -> Step | None:
        """Run one forward over memory and batch; return None if no process has a batch."""
        seen = self._forward.observe_all(batch, self._leave_out)
        if seen is None:
            return None
        batch.logits = seen.own
        self._begin()
        return self._step_of(seen, self._forward.ranks)

    def compute(self, step: Step, batch: Batch, moves: bool) -> Computed:
        """Return the method's step.

        Args:
            step: of the batch's forward.
            batch: the same.
            moves: False if no weight is to move: there are figures then, and no gradients.
        """
        logits = None if not batch.is_own else step.logits[-step.samples :].detach()
        if not moves:
            observed = self._method.loss(step)
            check_record(self._method, observed)
            return Computed(None, observed[1], step.samples, logits, self._draft, batch.rows)
        with explained_gradients():
            made = self._method.gradients(step, lambda edit=None: self._rerun(batch, edit))
        check_record(self._method, made)
        return Computed(*made, step.samples, logits, self._draft, batch.rows)

    def _rerun(self, batch: Batch, edit: Edit | None) -> Step:
        """Run another forward over the batch; what the method made of it is not remembered."""
        torch.clear_autocast_cache()  # the method may have moved weights
        own = replace(batch)
        if edit is not None and batch.is_own:
            own.args, own.kwargs = edit(batch.args, batch.kwargs)
        entered = None if self._memory is None else self._memory.current
        step = self.observe(own)
        assert step is not None
        if self._memory is not None:
            self._memory.current = entered
        return step

    def _observe_source(self, args: Sequence[object]) -> Step:
        """Run a forward of this process alone, for what is measured on the source."""
        device = device_of(self._params.values())
        args = tree_map_only(torch.Tensor, lambda x: x.to(device), args)
        return self._step_of(self._forward.observe(Batch(args, {})))

    def _step_of(self, seen: Pass, ranks: Ranks | None = None) -> Step:
        return Step(
            *(seen.logits, seen.samples, seen.attention, seen.outputs),
            *(self._params, self._draft, self.measured or {}, self.is_first),
            *(self._course.scale.of(seen.logits, self._params.values()), ranks, seen.is_local),
        )
