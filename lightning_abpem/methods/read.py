"""READ: "Test-Time Adaption against Multi-modal Reliability Bias" (Yang et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_abpem.attention.fusion import FusionPatterns
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method, Record, Step, record_of
from lightning_abpem.functional import confidence_loss, read_balance
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

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


@documented
class READ(TestTimeAdaptation):
    """Adapts the fusion attention's q, k and v projections to be confident, and even over the classes.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        fusion: name pattern(s) of the fusion attention module(s), as `ABPEM` documents them.
    """

    def __init__(
        self,
        fusion: FusionPatterns,
        *,
        steps: int = 1,
        optimizer: options.OptimizerFactory | None = None,
        target: str | None = None,
        logits: options.Logits | None = None,
        reset: options.Reset = "never",
        restore: bool = True,
        replay: bool = True,
        predicts: options.Predicts | None = None,
        sync: options.Sync = "global",
        projections: options.Projections | None = None,
        learning_rate: options.LearningRate | None = None,
        clip_gradients: float | None = None,
        anchor: float = 0.0,
        max_step: float | None = None,
        max_drift: float | None = None,
        monitor: options.Monitor = 8,
        guard: options.GuardAction = "warn",
        on_error: options.OnError = "predict",
        stages: Sequence[options.Stage] = ("test", "predict"),
        verbose: options.Verbose = 1,
        figures: options.Chosen = "headline",
        report: options.Page | None = None,
    ) -> None:
        super().__init__(ReliableFusion(), fusion, **shared(locals()))
