"""What a test-time adaptation method is to the engine: which parameters move, and the gradient that moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_abpem.functional import entropy
from lightning_abpem.fusion import JointFusion, SeparateFusion
from lightning_abpem.objective import Comparison, Pair
from lightning_abpem.projections import collect_params

__all__ = ["Gradients", "Method", "Predicts", "Record", "Step", "check_range", "record_of"]

Gradients = Sequence[Tensor | None]
Record = dict[str, Tensor]
Predicts = Literal["after", "before"]


@dataclass(frozen=True)
class Step:
    """What a method sees of one forward.

    Args:
        logits: (B, C), with gradients.
        attention: by (query, key) modality, the statistics of the cross and self blocks of every fusion layer; empty
            for methods that do not ask for them.
        params: the parameters that move, by name.
        state: the method's own memory of earlier batches; empty at first and after a reset.
        source: what it measured on the source model.
    """

    logits: Tensor
    attention: Mapping[Pair, Sequence[Comparison]]
    params: Mapping[str, nn.Parameter]
    state: dict[str, Any]
    source: Mapping[str, Any]

    def gradients(self, loss: Tensor) -> Gradients:
        """The gradients of a loss for `params`.

        Raises:
            ValueError: if none reaches them.
        """
        if not loss.requires_grad:
            raise ValueError(
                f"Expected gradients through the target's forward, but no gradient reaches {', '.join(self.params)}. "
                "Is the forward, or a part of it after the fusion attention, under torch.no_grad() or inference_mode()?"
            )
        return torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)


class Method:
    """A test-time adaptation method. A subclass says what its paper says; the engine does the rest.

    Most need `collect`, which parameters move, and `loss`. One that needs several forwards per step, as sharpness-aware
    minimisation does, has its own `gradients`. It keeps no state of its own: `Step.state` is there for that.

    Attributes:
        name: as its paper writes it; figures are logged under its lower case.
        needs_attention: whether `Step.attention` is wanted, and so modalities.
        predicts: "after" the update, or "before" it.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    predicts: ClassVar[Predicts] = "after"

    def collect(self, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
        """The parameters that move, by name: here those of the fusion attention's q, k and v projections.

        Raises:
            ValueError: if there are none.
        """
        if fusion is None:
            raise ValueError(f"Expected `fusion` to name the attention that {self.name} adapts, but got None.")
        return collect_params(fusion.adapting)

    def prepared(self, model: nn.Module) -> AbstractContextManager[None]:
        """What else of the model differs while it adapts, put back afterwards: nothing."""
        return nullcontext()

    def measure_source(self, observe: Callable[[Sequence[Any]], Step]) -> Mapping[str, Any]:
        """What is measured on the source before the first batch: nothing. `observe` takes a target's arguments."""
        return {}

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        """The loss, None if no sample is fit for a step, and detached scalars to record, `loss` among them, in nats."""
        raise NotImplementedError

    def gradients(self, step: Step, again: Callable[[], Step]) -> tuple[Gradients | None, Record]:
        """The gradients of one step, None for no step, and what to record; `again` runs another forward."""
        loss, record = self.loss(step)
        if loss is None:
            return None, record
        return step.gradients(loss), record

    def wants_reset(self, state: Mapping[str, Any]) -> bool:
        """Whether the source model should return before the next batch, for the method sees a collapse."""
        return False


def check_range(name: str, value: float, *, above: float) -> None:
    """Hold an option against its range.

    Raises:
        ValueError: if it is not a finite number above `above`.
    """
    if not isinstance(value, Real) or not above < value < float("inf"):
        raise ValueError(f"Expected `{name}` to be a finite number above {max(above, 0):g}, but got {value!r}.")


def record_of(loss: Tensor, logits: Tensor, **figures: Tensor) -> Record:
    """What every method records: its loss and the mean entropy of the predictions, and figures of its own."""
    with torch.no_grad():
        return {"loss": loss.detach(), "entropy": entropy(logits).mean(), **{k: v.detach() for k, v in figures.items()}}
