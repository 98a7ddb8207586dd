"""MM-TTA: multi-modal test-time adaptation by selected pseudo-labels (Shin et al., CVPR 2022, arXiv 2204.12667)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.checks import check_choice, is_number, shown
from lightning_abpem.engine.method import Gradients, Record, Rerun, Step, record_of
from lightning_abpem.functional import entropy, widen
from lightning_abpem.methods.norms import NormMethod
from lightning_abpem.methods.unimodal import Inputs, check_inputs, unimodal_logits
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["MMTTA", "SelectedPseudoLabels", "Selection", "consistency", "fuse_pseudo_labels"]

Selection = Literal["soft", "hard"]

_EPS = 1e-6  # two equal predictions are consistent, not infinitely so


def consistency(slow: Tensor, fast: Tensor) -> Tensor:
    """Inverse of the symmetric KL divergence between predictions (B, C), in 1 / nats: (B,) (equation 4)."""
    log_slow, log_fast = slow.clamp_min(_EPS).log(), fast.clamp_min(_EPS).log()
    return 1 / (((slow - fast) * (log_slow - log_fast)).sum(1) / 2 + _EPS)


def fuse_pseudo_labels(
    slow: Sequence[Tensor], fast: Sequence[Tensor], selection: Selection, possible: Tensor | None = None
) -> Tensor:
    """Choose the class (B,) that the more consistent modality, or all weighted by consistency, find most probable.

    Args:
        slow: by modality, the slow model's predictions (B, C), probabilities.
        fast: the fast model's.
        selection: "hard" takes the more consistent modality, "soft" the mean weighted by consistency (equations 5, 6).
        possible: which classes there are to choose from, (B, C) bool; all if None.
    """
    intra = torch.stack([(s + f) / 2 for s, f in zip(slow, fast, strict=True)])
    weights = torch.stack([consistency(s, f) for s, f in zip(slow, fast, strict=True)])
    if selection == "hard":
        weights = F.one_hot(weights.argmax(0), len(weights)).T.to(weights)
    fused = (weights.unsqueeze(-1) * intra).sum(0)
    return (fused if possible is None else fused.masked_fill(~possible, -1)).argmax(1)


@dataclass(frozen=True)
class SelectedPseudoLabels(NormMethod):
    """Cross-entropy of the fused prediction with the pseudo-label of the modality that is more consistent.

    Args:
        inputs: by modality, which of the target's arguments it is.
        selection: "soft" or "hard".
        momentum: of the slow model, in [0, 1).
    """

    inputs: Inputs
    selection: Selection = "soft"
    momentum: float = 0.99
    name: ClassVar[str] = "MM-TTA"
    reads_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_inputs(self.inputs)
        check_choice("selection", self.selection, get_args(Selection))
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ValueError(f"Expected `momentum` to be in [0, 1), but got {shown(self.momentum)}.")

    def gradients(self, step: Step, rerun: Rerun) -> tuple[Gradients | None, Record]:
        slow = self._slow(step)
        fast_p = self._unimodal(rerun)
        with _values(step.params, slow):
            slow_p = self._unimodal(rerun)
        # A class of probability 0 for all modalities together is no label that a step could move towards.
        label = fuse_pseudo_labels(slow_p, fast_p, self.selection, step.logits != -math.inf)
        loss = F.cross_entropy(widen(step.logits), label)
        step.state["slow"] = slow
        agree = (label == step.logits.argmax(1)).float().mean()
        return step.gradients(loss), record_of(loss, step.logits, agreement=agree)

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        """Return no loss, and record the fused entropy alone: where nothing adapts there are no unimodal passes."""
        return None, record_of(entropy(step.logits).mean(), step.logits)

    def _unimodal(self, rerun: Rerun) -> list[Tensor]:
        return [widen(logits.detach()).softmax(1) for logits in unimodal_logits(self.inputs, rerun)]

    def _slow(self, step: Step) -> dict[str, Tensor]:
        """Return the slow model's values of the parameters: the running mean of the fast one's."""
        before: Mapping[str, Any] = step.state.get("slow", step.params)
        return {name: before[name].detach().lerp(p.detach(), 1 - self.momentum) for name, p in step.params.items()}


@contextmanager
def _values(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters have other values for a while; what autograd has saved of them stays valid."""
    own = {name: p.data for name, p in params.items()}
    try:
        for name, p in params.items():
            p.data = values[name]
        yield
    finally:
        for name, p in params.items():
            p.data = own[name]


@documented
class MMTTA(TestTimeAdaptation):
    """Adapts the normalisation layers to pseudo-labels of the more consistent modality.

    The paper has a head per modality and labels points of a scan. Here one fused head is all there is. A modality's
    prediction is that of a forward with the others' inputs zeroed. The slow model is a running mean of the affine
    parameters (layer normalisation has no statistics to average). The cross-entropy is that of the fused prediction.
    Five forwards per step for two modalities.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        inputs: by modality, which of the target's arguments it is: a position or a keyword, such as
            {"audio": 0, "video": 1}.
        selection: "soft" weighs the modalities' predictions by their consistency between the slow and the fast model,
            "hard" takes the more consistent one.
        momentum: of the slow model.
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        selection: Selection = "soft",
        momentum: float = 0.99,
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
        super().__init__(SelectedPseudoLabels(inputs, selection, momentum), **shared(locals()))
