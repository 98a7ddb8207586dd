"""Figures of the fusion attention, by ordered pair of modalities: states are sums and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.attention.spans import Modalities
from lightning_abpem.metrics.functional import Average, Blocks, PairSums, Seen, average_pairs, check_average
from lightning_abpem.metrics.sums import Sums

__all__ = ["AttentionDivergence", "AttentionGap"]


class _PairMean(Sums):
    """Mean of a figure over samples and layers, by pair."""

    total: Tensor
    counts: Tensor
    figure: ClassVar[Literal["gap", "divergence"]]

    def __init__(
        self,
        modalities: Modalities | Sequence[str],
        fusion: JointFusion | SeparateFusion | None = None,
        average: Average = "macro",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_average(average)
        self.blocks, self.average = Blocks(modalities, fusion), average
        self.add_state("total", torch.zeros(len(self.blocks.pairs)), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.blocks.pairs), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, q: Seen, k: Tensor | None = None, mask: Tensor | None = None, scale: float | None = None) -> None:
        """Add a batch: queries and keys, or the captured calls of a forward; see `attention_gap`.

        Raises:
            ValueError: if they do not fit.
        """
        sums = self.blocks.sums(self.figure, q, k, mask, scale)
        self.total = self.total + sums.total.detach().to(self.total)
        self.counts = self.counts + sums.counts

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the mean over pairs, or the figure of each; NaN where no sample counts."""
        return average_pairs(PairSums(self.total, self.counts), self.blocks.pairs, self.average)


class AttentionGap(_PairMean):
    """Measure how much less a modality attends to another than that one to itself; `attention_gap` takes one batch.

    For each ordered pair (m, n) of modalities: mean score of n's queries and keys, less that of m's queries and n's
    keys. It is averaged over heads, samples and layers, in units of scores before the softmax.

    Args:
        modalities: the modalities' tokens in the joint sequence: lengths in order, or ranges (start, stop).
        fusion: as `find_fusion` gives it, for calls of attention modules by pair, or of some calls only. `modalities`
            are then those in each one's own sequence, or names alone.
        average: "macro" for the mean over pairs, a scalar; "none" for each pair's by its name, "audio_to_video".
        kwargs: torchmetrics' own options.

    Raises:
        ValueError: if `modalities` or `average` are something else.

    Example:
        ``gap = AttentionGap({"audio": 512, "video": 196}); gap.update(q, k)`` inside an attention; or around a forward
        ``with capture_attention([find_attention(model.attn, "attn")]) as calls: model(x)``, then ``gap.update(calls)``.
    """

    figure = "gap"


class AttentionDivergence(_PairMean):
    """KL divergence of cross blocks' scores from self blocks'; `attention_divergence` is that of a batch.

    For each ordered pair (m, n) of modalities: that of the Gaussian of the scores of m's queries and n's keys from the
    Gaussian of n's queries and keys. It is averaged over samples and layers, in nats. Arguments are those of
    `AttentionGap`.
    """

    figure = "divergence"
    plot_lower_bound = 0.0
