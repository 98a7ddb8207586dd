"""The source model: nothing moves; what it predicts is measured as for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method, Record, Step, record_of
from lightning_abpem.functional import entropy
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["Source", "Unadapted"]


class Unadapted(Method):
    """Method that moves no parameter."""

    name: ClassVar[str] = "Source"

    def collect(self, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
        return {}

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        return None, record_of(entropy(step.logits).mean(), step.logits)


@documented
class Source(TestTimeAdaptation):
    """The model as it is, with the same figures in the log: what every method has to beat.

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
        super().__init__(Unadapted(), **shared(locals()))
