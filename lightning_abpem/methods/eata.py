"""EATA: efficient test-time adaptation without forgetting (Niu et al., ICML 2022, arXiv 2204.02610)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_abpem.callback import Options, TestTimeAdaptation
from lightning_abpem.engine.method import Record, Step, check_range, record_of
from lightning_abpem.functional import entropy, widen
from lightning_abpem.methods.norms import NormMethod, running_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EATA", "SampleEfficientEntropy"]


@dataclass(frozen=True)
class SampleEfficientEntropy(NormMethod):
    """Entropy over samples that are reliable and not redundant, and a pull towards the source where that matters.

    Args:
        entropy_margin: a sample is reliable below this entropy, as a share of ln C (equation 3).
        redundancy: it is redundant if the cosine of its prediction with the running mean of those adapted to is at
            least that (equation 5).
        fisher_weight: weight of the Fisher regulariser (equation 8).
        fisher_batches: the target's arguments for batches of unlabelled samples like the source's, from which the
            Fisher information of every parameter is measured (equation 9); none, no regulariser.
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
        check_range("fisher_weight", self.fisher_weight, above=-1e-9)

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
        step.state["mean"] = running_mean(step.state.get("mean"), mean)
        weights = (margin - entropies.detach()).exp()
        loss = (weights * entropies)[kept].mean()
        for name, fisher in step.source["fisher"].items():
            moved = (step.params[name] - step.source["start"][name]).square()
            loss = loss + step.in_all(self.fisher_weight * (fisher * moved).sum())
        return loss, record_of(loss, step.logits, kept=share)

    def _is_new(self, p: Tensor, state: Mapping[str, Any]) -> Tensor:
        if "mean" not in state:
            return torch.ones(len(p), dtype=torch.bool, device=p.device)
        return F.cosine_similarity(p, state["mean"][None], dim=1).abs() < self.redundancy


class EATA(TestTimeAdaptation):
    """Minimises the entropy of reliable, non-redundant samples by the normalisation layers' affine parameters.

    Args:
        entropy_margin: a sample is reliable if its entropy is below this share of ln C.
        redundancy: it is redundant if its prediction's cosine with the running mean of predictions is at least that.
        fisher_weight: weight of the pull towards the source parameters.
        fisher_batches: the target's arguments for batches of unlabelled source-like samples, from which it is measured
            how much each parameter matters; without them there is no pull.
        options: those that all methods share; `TestTimeAdaptation` documents them.
    """

    def __init__(
        self,
        *,
        entropy_margin: float = 0.4,
        redundancy: float = 0.05,
        fisher_weight: float = 2000.0,
        fisher_batches: Iterable[Sequence[Any]] = (),
        **options: Unpack[Options],
    ) -> None:
        method = SampleEfficientEntropy(entropy_margin, redundancy, fisher_weight, list(fisher_batches))
        super().__init__(method, **options)
