"""READ: "Test-Time Adaption against Multi-modal Reliability Bias" (Yang et al., ICLR 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_abpem.attention.fusion import FusionPatterns
from lightning_abpem.callback import Options, TestTimeAdaptation
from lightning_abpem.engine.method import Method, Record, Step, record_of
from lightning_abpem.functional import confidence_loss, read_balance

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["READ", "ReliableFusion"]


class ReliableFusion(Method):
    """The confidence-aware loss less the balance moves the fusion attention's q, k and v projections (section 3)."""

    name: ClassVar[str] = "READ"

    @property
    def balances_batch(self) -> bool:
        return True

    def loss(self, step: Step) -> tuple[Tensor, Record]:
        confidence, balance = confidence_loss(step.logits).mean(), read_balance(step.logits)
        loss = confidence - balance
        return loss, record_of(loss, step.logits, confidence_loss=confidence, balance=balance)


class READ(TestTimeAdaptation):
    """Adapts the fusion attention's q, k and v projections to be confident, and even over the classes.

    Args:
        fusion: name pattern(s) of the fusion attention module(s), as `ABPEM` documents them.
        options: those that all methods share; `TestTimeAdaptation` documents them.
    """

    def __init__(self, fusion: FusionPatterns, **options: Unpack[Options]) -> None:
        super().__init__(ReliableFusion(), fusion, **options)
