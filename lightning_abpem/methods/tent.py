"""Tent: fully test-time adaptation by entropy minimisation (Wang et al., ICLR 2021, arXiv 2006.10726)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_abpem.callback import Options, TestTimeAdaptation
from lightning_abpem.engine.method import Record, Step, record_of
from lightning_abpem.functional import entropy
from lightning_abpem.methods.norms import NormMethod

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EntropyMinimization", "Tent"]


class EntropyMinimization(NormMethod):
    """The mean entropy of the predictions moves the affine parameters of the normalisation layers (section 3).

    Batch normalisation uses the batch's own statistics. Predictions are those that the step was computed from.
    """

    name: ClassVar[str] = "Tent"

    def loss(self, step: Step) -> tuple[Tensor, Record]:
        loss = entropy(step.logits).mean()
        return loss, record_of(loss, step.logits)


class Tent(TestTimeAdaptation):
    """Minimises the entropy of the predictions by the affine parameters of the normalisation layers.

    Args:
        options: those that all methods share; `TestTimeAdaptation` documents them.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__(EntropyMinimization(), **options)
