"""EATA: efficient test-time adaptation without forgetting (Niu et al., ICML 2022, arXiv 2204.02610)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.checks import check_range, shown
from lightning_abpem.engine.method import Record, Step, record_of
from lightning_abpem.functional import entropy, widen
from lightning_abpem.methods.norms import NormMethod, running_mean
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["EATA", "SampleEfficientEntropy"]


@dataclass(frozen=True)
class SampleEfficientEntropy(NormMethod):
    """Entropy over samples that are reliable and not redundant, and a pull towards the source where that matters.

    Args:
        entropy_margin: a sample is reliable below this entropy, as a share of ln C (equation 3).
        redundancy: it is redundant if the cosine of its prediction with the running mean of those adapted to is at
            least that (equation 5).
        fisher_weight: weight of the Fisher regulariser (equation 8).
        fisher_batches: the target's arguments for batches of unlabelled samples like the source's. The Fisher
            information of every parameter is measured on them (equation 9); without them there is no regulariser.
    """

    entropy_margin: float = 0.4
    redundancy: float = 0.05
    fisher_weight: float = 2000.0
    fisher_batches: Sequence[Sequence[Any]] = ()
    name: ClassVar[str] = "EATA"
    reads_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("entropy_margin", self.entropy_margin, above=0)
        check_range("redundancy", self.redundancy, above=0)
        check_range("fisher_weight", self.fisher_weight)

    def measure_source(self, observe: Callable[[Sequence[Any]], Step]) -> Mapping[str, Any]:
        fisher: dict[str, Tensor] = {}
        start: dict[str, Tensor] = {}
        for args in self.fisher_batches:
            step = observe(args)
            loss = F.cross_entropy(widen(step.logits), step.logits.argmax(1))  # its own predictions as labels
            for (name, p), gradient in zip(step.params.items(), step.gradients(loss), strict=True):
                if gradient is not None:
                    share = gradient.detach().square() / len(self.fisher_batches)
                    fisher[name] = fisher.get(name, torch.zeros_like(share)) + share
                    start.setdefault(name, p.detach().clone())
        if not all(bool(value.isfinite().all()) for value in fisher.values()):
            raise ValueError(
                "Expected `fisher_batches` to give finite gradients, but some are not: is a sample broken?"
            )
        return {"fisher": fisher, "start": start}

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        entropies = entropy(step.logits)
        margin = self.entropy_margin * math.log(step.logits.shape[1])
        p = widen(step.logits.detach()).softmax(1)
        kept = (entropies < margin) & self._is_new(p, step.state)
        share = kept.float().mean()
        if not bool(kept.any()):
            return None, record_of(entropies.mean(), step.logits, kept=share)
        mean = p[kept].mean(0)
        step.state["mean"] = running_mean(_mean_over(mean.shape, step.state), mean)
        weights = (margin - entropies.detach()).exp()
        loss = (weights * entropies)[kept].mean()
        for name, fisher in step.source["fisher"].items():
            moved = (step.params[name] - step.source["start"][name]).square()
            loss = loss + step.in_all(self.fisher_weight * (fisher * moved).sum())
        return loss, record_of(loss, step.logits, kept=share)

    def _is_new(self, p: Tensor, state: Mapping[str, Any]) -> Tensor:
        mean = _mean_over(p.shape[1:], state)
        if mean is None:
            return torch.ones(len(p), dtype=torch.bool, device=p.device)
        return F.cosine_similarity(p, mean[None], dim=1).abs() < self.redundancy


def _mean_over(classes: torch.Size, state: Mapping[str, Any]) -> Tensor | None:
    """Return the mean of earlier predictions; None without any, or over another number of classes."""
    mean: Tensor | None = state.get("mean")
    return None if mean is None or mean.shape != classes else mean


def _listed(batches: Iterable[Sequence[object]]) -> list[Sequence[Any]]:
    """Return the batches in a list.

    Raises:
        ValueError: they are none, or one of them is no list or tuple of arguments.
    """
    wanted = "Expected `fisher_batches` to hold, for each batch, a list or tuple of the target's arguments, but got "
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise ValueError(f"{wanted}{shown(batches)}.")
    listed = list(batches)
    for position, args in enumerate(listed):
        if not isinstance(args, list | tuple):
            raise ValueError(f"{wanted}{type(args).__name__} at position {position}.")
    return listed


@documented
class EATA(TestTimeAdaptation):
    """Minimises the entropy of reliable, non-redundant samples by the normalisation layers' affine parameters.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        entropy_margin: a sample is reliable if its entropy is below this share of ln C.
        redundancy: it is redundant if its prediction's cosine with the running mean of predictions is at least that.
        fisher_weight: weight of the pull towards the source parameters.
        fisher_batches: the target's arguments for batches of unlabelled source-like samples. They measure how much each
            parameter matters; without them there is no pull.
    """

    def __init__(
        self,
        *,
        entropy_margin: float = 0.4,
        redundancy: float = 0.05,
        fisher_weight: float = 2000.0,
        fisher_batches: Iterable[Sequence[Any]] = (),
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
        batches = _listed(fisher_batches)
        super().__init__(SampleEfficientEntropy(entropy_margin, redundancy, fisher_weight, batches), **shared(locals()))
