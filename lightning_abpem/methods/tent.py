"""Tent: fully test-time adaptation by entropy minimisation (Wang et al., ICLR 2021, arXiv 2006.10726)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from lightning_abpem.callback import Options, TestTimeAdaptation
from lightning_abpem.functional import entropy
from lightning_abpem.fusion import JointFusion, SeparateFusion
from lightning_abpem.method import Method, Predicts, Record, Step, record_of
from lightning_abpem.methods.norms import batch_statistics, norm_params

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EntropyMinimization", "Tent"]


class EntropyMinimization(Method):
    """The mean entropy of the predictions moves the affine parameters of the normalisation layers (section 3).

    Batch normalisation uses the batch's own statistics. Predictions are those that the step was computed from.
    """

    name: ClassVar[str] = "Tent"
    predicts: ClassVar[Predicts] = "before"

    def collect(self, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
        return norm_params(model)

    def prepared(self, model: nn.Module) -> AbstractContextManager[None]:
        return batch_statistics(model)

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
