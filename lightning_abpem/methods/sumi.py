"""SuMi: "Smoothing the Shift: Towards Stable Test-Time Adaptation under Complex Multimodal Noises" (ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.checks import check_integer, check_range, listed_names, shown
from lightning_abpem.engine.method import Gradients, Predicts, Record, Rerun, Step, record_of
from lightning_abpem.functional import entropy, finite_log, read_balance, widen
from lightning_abpem.methods.norms import NormMethod
from lightning_abpem.methods.unimodal import Inputs, check_inputs, unimodal_logits
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["SmoothedSharing", "SuMi", "interquartile_share", "mutual_information_sharing"]


def interquartile_share(features: Tensor, progress: float) -> Tensor:
    """Return the share of each sample's features that lie within the smoothed interquartile range: (B,).

    The quartiles of a feature are a quarter and three quarters of the way from its least to its largest value in the
    batch. The range is widened by 3/2 of its length times `progress`, so that in the end nothing but outliers is out.

    Args:
        features: (B, F), all modalities side by side.
        progress: how far the stream has come, 0 to 1.
    """
    features = widen(features)
    least, largest = features.amin(0), features.amax(0)
    spread = (largest - least) / 2
    middle = (largest + least) / 2
    reach = spread / 2 + 1.5 * progress * spread
    return ((features - middle).abs() <= reach).float().mean(1)


def mutual_information_sharing(fused: Tensor, unimodal: Sequence[Tensor]) -> Tensor:
    """Compute what each modality's prediction lacks of what the fused one and the others know, in nats: (B,).

    The sum over modalities of KL(mean of the fused and the other modalities' predictions || the modality's own). A
    class with a logit of -inf is impossible for a modality: it adds nothing to that modality's term.

    Args:
        fused: (B, C) logits.
        unimodal: (B, C) logits by modality.
    """
    fused_p = widen(fused).softmax(1)
    total = torch.zeros_like(fused_p[:, 0])
    for own, logits in enumerate(unimodal):
        others = [widen(other).softmax(1) for position, other in enumerate(unimodal) if position != own]
        target = torch.stack([fused_p, *others]).mean(0).masked_fill(logits == -math.inf, 0)
        log_p = finite_log(widen(logits).log_softmax(1))
        # xlogy(0, 0) is 0, but its gradient is not
        total = total + (torch.xlogy(target, target.masked_fill(target == 0, 1)) - target * log_p).sum(1)
    return total


@dataclass(frozen=True)
class SmoothedSharing(NormMethod):
    """Entropy of samples that are sure together and unsure apart, and sharing of information between modalities.

    Args:
        inputs: by modality, which of the target's arguments it is.
        watches: by modality in the same order, the encoder whose output tokens (B, N, D) are its features.
        total_batches: length of the stream, over which the interquartile range widens.
        fused_margin: a sample counts if its fused entropy is at most this share of ln C,
        unimodal_margin: and its mean unimodal entropy at least that, in nats.
        sharing_weight: weight of the mutual information sharing in the first half of the stream.
    """

    inputs: Inputs
    watches: Sequence[str] = field(default_factory=tuple)
    total_batches: int = 300
    fused_margin: float = 0.4
    unimodal_margin: float = math.e / 10
    sharing_weight: float = 5.0
    name: ClassVar[str] = "SuMi"
    predicts: ClassVar[Predicts] = "after"

    def __post_init__(self) -> None:
        check_inputs(self.inputs)
        check_integer("total_batches", self.total_batches, 1)
        check_range("fused_margin", self.fused_margin, above=0)
        check_range("unimodal_margin", self.unimodal_margin)
        check_range("sharing_weight", self.sharing_weight)

    @property
    def balances_batch(self) -> bool:
        return True

    def gradients(self, step: Step, rerun: Rerun) -> tuple[Gradients | None, Record]:
        loss, record = self._loss(step, unimodal_logits(self.inputs, rerun))
        return None if loss is None else step.gradients(loss), record

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        """Return no loss, and record the fused entropy alone: where nothing adapts there are no unimodal passes."""
        return None, record_of(entropy(step.logits).mean(), step.logits)

    def _loss(self, step: Step, unimodal: Sequence[Tensor]) -> tuple[Tensor | None, Record]:
        batch = step.state.get("batches", 0) - (not step.is_first)
        step.state["batches"] = batch + 1
        progress = min(max(batch, 0) / self.total_batches, 1.0)
        entropies = entropy(step.logits)
        kept = self._is_kept(step.outputs, entropies, unimodal, progress)
        share = kept.float().mean()
        if not bool(kept.any()):
            return None, record_of(entropies.mean(), step.logits, kept=share)
        sharing = mutual_information_sharing(step.logits, unimodal)[kept]
        each = entropies[kept]
        if progress < 0.5:
            each = each + self.sharing_weight * sharing
        margin = self.fused_margin * math.log(step.logits.shape[1])
        weights = (margin - entropies.detach()[kept]).exp()
        loss = (weights * each).mean() - read_balance(step.logits[kept])
        return loss, record_of(loss, step.logits, kept=share, sharing=sharing.mean())

    def _is_kept(
        self, outputs: Mapping[str, object], entropies: Tensor, unimodal: Sequence[Tensor], progress: float
    ) -> Tensor:
        features = torch.cat([widen(_tokens(name, outputs.get(name))).mean(1) for name in self.watches], dim=1).detach()
        smooth = interquartile_share(features, progress) >= 0.6 + 0.4 * progress
        apart = torch.stack([entropy(logits.detach()) for logits in unimodal]).mean(0)
        together = entropies <= self.fused_margin * math.log(unimodal[0].shape[1])
        return smooth & together & (apart >= self.unimodal_margin)


def _tokens(name: str, output: object) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 3:
        shape = tuple(output.shape) if isinstance(output, Tensor) else "none: the target does not call it"
        shape = type(output).__name__ if not isinstance(output, (Tensor, type(None))) else shape
        raise ValueError(f"Expected {name!r} of `encoders` to put out tokens (B, N, D), but got {shape}.")
    return output


def _watched(inputs: Inputs, encoders: Mapping[str, str]) -> tuple[str, ...]:
    """Return the encoders' names in the order of the modalities.

    Raises:
        ValueError: they are not those of the modalities of `inputs`.
    """
    check_inputs(inputs)
    if not isinstance(encoders, Mapping) or set(encoders) != set(inputs):
        got = sorted(encoders) if isinstance(encoders, Mapping) and listed_names(list(encoders)) else shown(encoders)
        raise ValueError(f"Expected `encoders` for {sorted(inputs)}, as in `inputs`, but got {got}.")
    if not listed_names(encoders.values()):
        raise ValueError(f"Expected `encoders` to name modules, but got {shown(encoders)}.")
    return tuple(encoders[modality] for modality in inputs)


@documented
class SuMi(TestTimeAdaptation):
    """Adapts the normalisation layers to samples that only both modalities together can tell, smoothly at first.

    The unimodal passes are forwards of the target with the other modalities' inputs zeroed. With two modalities a step
    takes three forwards, and the prediction one.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        inputs: by modality, which of the target's arguments it is: a position or a keyword, such as
            {"audio": 0, "video": 1}.
        encoders: by modality, the module whose output tokens (B, N, D) are its features.
        total_batches: length of the stream in batches, over which the interquartile range widens.
        fused_margin: a sample counts if its fused entropy is at most this share of ln C,
        unimodal_margin: and the mean of its unimodal entropies at least that, in nats.
        sharing_weight: weight of the mutual information sharing in the first half of the stream.
    """

    def __init__(
        self,
        inputs: Inputs,
        encoders: Mapping[str, str],
        *,
        total_batches: int = 300,
        fused_margin: float = 0.4,
        unimodal_margin: float = math.e / 10,
        sharing_weight: float = 5.0,
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
        watches = _watched(inputs, encoders)
        method = SmoothedSharing(inputs, watches, total_batches, fused_margin, unimodal_margin, sharing_weight)
        super().__init__(method, **shared(locals()))
