"""A course of the weights away from the source: at one learning rate, with what the method remembers on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_abpem.engine.loss_scale import LossScale
from lightning_abpem.engine.method import Gradients, Record
from lightning_abpem.engine.weights import AdaptedWeights

__all__ = ["Computed", "Course"]


class Computed(NamedTuple):
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


class Course:
    """Weights as they move, and what goes with them from step to step.

    Args:
        weights: the adapted ones.
        scale: of the loss, where gradients pass through float16.

    Attributes:
        state: the method's own memory of earlier batches.
        unsettled: a step that the host does not know yet whether it was taken.
    """

    def __init__(self, weights: AdaptedWeights, scale: LossScale) -> None:
        self.weights, self.scale = weights, scale
        self.state: dict[str, Any] = {}
        self.unsettled: Computed | None = None

    def step(self, computed: Computed) -> Tensor:
        """Take a step, or none if there are no gradients; return a bool scalar: True if it was taken."""
        loss = computed.record["loss"]
        if computed.gradients is None:
            self.state = computed.state
            self.weights.skip(loss)
            return torch.zeros_like(loss, dtype=torch.bool)
        self.unsettled = computed  # ahead of the step: none that is taken goes uncounted
        taken = self.weights.step(computed.gradients, loss)
        self.scale.update(taken)
        return taken

    def settle(self) -> tuple[Computed, bool] | None:
        """Learn whether the last step was taken, and keep its state if it was; None if that was known."""
        last, self.unsettled = self.unsettled, None
        if last is None:
            return None
        taken = bool(self.weights.settle())
        if taken:
            self.state = last.state
        return last, taken

    def reset(self) -> None:
        """Go back to the source model."""
        self.settle()
        self.weights.reset()
        self.state = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a stream needs to go on."""
        self.settle()
        return {"weights": self.weights.state_dict(), "scale": self.scale.state_dict(), "state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned, on the device of the weights.

        Raises:
            ValueError: if it does not fit the model; nothing has changed then.
        """
        self.settle()
        self.weights.load_state_dict(state["weights"])
        self.scale.load_state_dict(state["scale"])
        self.state = state["state"]
