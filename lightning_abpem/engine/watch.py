"""The adapted model against the source on the same batches: figures that need no labels, and their running means."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_abpem.functional import entropy, entropy_of, flips, information_of, widen

__all__ = ["SAMPLES_PER_CLASS", "Means", "Watch"]

SAMPLES_PER_CLASS = 5


class Means(NamedTuple):
    """Running means over the last samples of a stream: scalars in nats, but for the two shares.

    Args:
        entropy: of the adapted model's predictions.
        source_entropy: of the source's.
        share: (C,), the adapted model's mean prediction.
        source_share: (C,), the source's.
        samples: how many samples count; at most 5 for each class.
    """

    entropy: Tensor
    source_entropy: Tensor
    share: Tensor
    source_share: Tensor
    samples: Tensor


class Watch:
    """Compares the adapted model's predictions with the source's, over the last samples of a stream.

    A sample counts by exp(-n / (5 C)), with n samples after it and C classes: all together as much as 5 for each class.
    A batch with a prediction that is not finite does not count. One over another number of classes begins anew.

    Attributes:
        sums: over the last samples, which the state of a stream holds: their number, entropies, the source's entropies,
            and both models' predictions, (3 + 2 C,). None before the first batch.
        means: the same as running means; None before the first batch.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def see(
        self, logits: Tensor | None, source: Tensor | None, total: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Take in a batch; return its figures.

        Args:
            logits: (B, C) of the adapted model; None if this process has no batch.
            source: (B, C) of the source model.
            total: sums over processes; None for one.

        Returns:
            scalars, in nats but for the first: `flip_rate`, the share of samples for which the two predict different
            classes; `source_entropy`, the source's mean. Of the means over the stream: `class_share`, the entropy of
            the adapted model's mean prediction; `information`, that less the mean entropy. It is what a prediction
            tells of a sample.
        """
        batch = torch.zeros(0) if logits is None or source is None else _sums(widen(logits), widen(source))
        if total is not None:
            batch = total(batch)
        flipped, sums = batch[0], batch[1:]
        samples = sums[0]
        classes = (len(sums) - 3) // 2
        kept = (-samples / (SAMPLES_PER_CLASS * classes)).exp()
        is_known = self.sums is not None and self.sums.shape == sums.shape
        before = self.sums.to(sums) if self.sums is not None and is_known else torch.zeros_like(sums)
        self.sums = torch.where(sums.isfinite().all(), kept * before + sums, before)
        means = self.means
        assert means is not None
        return {
            "flip_rate": flipped / samples,
            "source_entropy": sums[2] / samples,
            "class_share": entropy_of(means.share),
            "information": information_of(means.share, means.entropy),
        }

    @property
    def means(self) -> Means | None:
        if self.sums is None:
            return None
        samples, own, source, *_ = self.sums.unbind()
        share, source_share = (self.sums[3:] / samples).chunk(2)
        return Means(own / samples, source / samples, share, source_share, samples)

    def state(self) -> Tensor | None:
        """Return the sums for a stream to go on with; None if no sample counts yet. It waits for the device."""
        return self.sums if self.sums is not None and self.sums[0] > 0 else None

    def forget(self) -> None:
        """Begin anew, as after a change of weights that the means do not know."""
        self.sums = None


def _sums(logits: Tensor, source: Tensor) -> Tensor:
    flipped = flips(logits, source).sum()
    scalars = flipped, flipped.new_tensor(len(logits)), entropy(logits).sum(), entropy(source).sum()
    shares = logits.softmax(-1).sum(0), source.softmax(-1).sum(0)
    return torch.cat([torch.stack([x.to(logits) for x in scalars]), *shares])
