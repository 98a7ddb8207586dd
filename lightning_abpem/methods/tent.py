"""Tent: fully test-time adaptation by entropy minimisation (Wang et al., ICLR 2021, arXiv 2006.10726)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Record, Step, record_of
from lightning_abpem.functional import entropy
from lightning_abpem.methods.norms import NormMethod
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["EntropyMinimization", "Tent"]


class EntropyMinimization(NormMethod):
    """The mean entropy of the predictions moves the affine parameters of the normalisation layers (section 3).

    Batch normalisation uses the batch's own statistics. Predictions are those that the step was computed from.
    """

    name: ClassVar[str] = "Tent"

    def loss(self, step: Step) -> tuple[Tensor, Record]:
        loss = entropy(step.logits).mean()
        return loss, record_of(loss, step.logits)


@documented
class Tent(TestTimeAdaptation):
    """Minimises the entropy of the predictions by the affine parameters of the normalisation layers.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.
    """

    def __init__(
        self,
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
        super().__init__(EntropyMinimization(), **shared(locals()))
