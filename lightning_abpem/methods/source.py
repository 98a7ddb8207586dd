"""The source model: nothing moves; what it predicts is measured as for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.callback import Options, TestTimeAdaptation
from lightning_abpem.engine.method import Method, Record, Step, record_of
from lightning_abpem.functional import entropy

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Source", "Unadapted"]


class Unadapted(Method):
    """Method that moves no parameter."""

    name: ClassVar[str] = "Source"

    def collect(self, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        return None, record_of(entropy(step.logits).mean(), step.logits)


class Source(TestTimeAdaptation):
    """The model as it is, with the same figures in the log: what every method has to beat.

    Args:
        options: those that all methods share; `TestTimeAdaptation` documents them.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__(Unadapted(), **options)
