"""SAR: sharpness-aware and reliable entropy minimisation (Niu et al., ICLR 2023, arXiv 2302.12400)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.checks import check_names, check_range
from lightning_abpem.engine.method import Gradients, Record, Rerun, Step, record_of
from lightning_abpem.functional import entropy, widen
from lightning_abpem.methods.norms import NormMethod, running_mean
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["SAR", "SharpnessAwareEntropy"]


@dataclass(frozen=True)
class SharpnessAwareEntropy(NormMethod):
    """The gradient of reliable samples' entropy at the worst nearby weights (equations 2 to 5), and a way back.

    Args:
        entropy_margin: a sample is reliable below this entropy, as a share of ln C.
        radius: how far the weights go in the direction of the gradient before the second forward.
        reset_entropy: the source returns when the running mean of the second entropy falls below that.
        exclude: how the names of normalisation layers start that stay as they are.
    """

    entropy_margin: float = 0.4
    radius: float = 0.05
    reset_entropy: float = 0.2
    exclude: Sequence[str] = ()
    name: ClassVar[str] = "SAR"
    reads_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("entropy_margin", self.entropy_margin, above=0)
        check_range("radius", self.radius, above=0)
        check_range("reset_entropy", self.reset_entropy)

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        entropies = entropy(step.logits)
        kept = self._is_reliable(entropies, step)
        loss = entropies[kept].mean() if bool(kept.any()) else None
        shown = entropies.mean() if loss is None else loss
        return loss, record_of(shown, step.logits, kept=kept.float().mean())

    def gradients(self, step: Step, rerun: Rerun) -> tuple[Gradients | None, Record]:
        first, record = self.loss(step)
        if first is None:
            return None, record
        reliable = self._is_reliable(entropy(step.logits), step)
        uphill = step.gradients(first)
        if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in uphill):
            return uphill, record  # which the engine skips, and counts
        start = [p.detach().clone() for p in step.params.values()]
        self._climb(step, uphill)
        try:
            second = rerun()
            entropies = entropy(second.logits)
            kept = reliable & self._is_reliable(entropies, second)
            gradients = second.gradients(entropies[kept].mean()) if bool(kept.any()) else None
        finally:
            with torch.no_grad():
                for p, value in zip(step.params.values(), start, strict=True):
                    p.copy_(value)
        record["kept"] = kept.float().mean()  # of those that were reliable at the first weights
        if gradients is not None:
            step.state["entropy"] = running_mean(step.state.get("entropy"), entropies[kept].mean().item())
        return gradients, record

    def wants_reset(self, state: Mapping[str, Any]) -> bool:
        return state.get("entropy", math.inf) < self.reset_entropy

    def _is_reliable(self, entropies: Tensor, step: Step) -> Tensor:
        return entropies < self.entropy_margin * math.log(step.logits.shape[1])

    @torch.no_grad()
    def _climb(self, step: Step, gradients: Gradients) -> None:
        norms = [widen(gradient).norm() for gradient in gradients if gradient is not None]
        scale = self.radius / (torch.stack(norms).norm() + 1e-12)
        for p, gradient in zip(step.params.values(), gradients, strict=True):
            if gradient is not None:
                p.add_((widen(gradient) * scale).to(p))


@documented
class SAR(TestTimeAdaptation):
    """Minimises the entropy of reliable samples towards flat minima, by the normalisation layers' affine parameters.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        entropy_margin: a sample is reliable if its entropy is below this share of ln C.
        radius: of the neighbourhood in which the worst weights are looked for.
        reset_entropy: the source returns when the running mean of the entropy falls below that.
        exclude: how the names of normalisation layers start that stay as they are; the paper leaves out the top
            layers (of ViT-B the last three blocks and the final norm).
    """

    def __init__(
        self,
        *,
        entropy_margin: float = 0.4,
        radius: float = 0.05,
        reset_entropy: float = 0.2,
        exclude: str | Sequence[str] = (),
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
        excluded = tuple(check_names("exclude", exclude, "a start of names, or several"))
        super().__init__(SharpnessAwareEntropy(entropy_margin, radius, reset_entropy, excluded), **shared(locals()))
