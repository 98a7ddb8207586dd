"""Figures of (B, C) logits, B samples and C classes, that need no labels: states are sums and counts.

Logits may be of any precision; they are widened to float32 at least. A class with a logit of -inf has probability 0. A
sample whose logits are NaN, or all -inf, makes the entropies NaN: it does not pass unnoticed. Values carry no gradient;
the functions do.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_abpem.functional import (
    check_k,
    classes_kept,
    entropy,
    entropy_of,
    flips,
    information_of,
    principal_entropy,
    widen,
)
from lightning_abpem.metrics.sums import Sums

__all__ = ["ClassShare", "Entropy", "FlipRate", "Information", "PrincipalEntropy"]


class _Mean(Sums):
    """Mean of a figure over samples.

    Args:
        kwargs: torchmetrics' own options, such as `sync_on_compute`.
    """

    plot_lower_bound = 0.0
    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the mean so far; NaN without a sample."""
        return self.total / self.samples

    def _add(self, values: Tensor) -> None:
        self.total = self.total + values.detach().sum().to(self.total)
        self.samples = self.samples + len(values)


class Entropy(_Mean):
    """Mean Shannon entropy of the predictions, in nats; `functional.entropy` is that of each sample.

    Args:
        kwargs: torchmetrics' own options.

    Example:
        ``entropy = Entropy(); entropy.update(logits); entropy.compute()``
    """

    def update(self, logits: Tensor) -> None:
        """Add a batch of (B, C) logits.

        Raises:
            ValueError: if they are something else.
        """
        _check_logits("logits", logits)
        self._add(entropy(logits))


class PrincipalEntropy(_Mean):
    """Mean entropy over the k most probable classes, in nats; `functional.principal_entropy` is that of each sample.

    Args:
        k: classes kept, in [1, C]; "auto" is the square root of C, 2 at least.
        kwargs: torchmetrics' own options.

    Raises:
        ValueError: if `k` is neither.
    """

    def __init__(self, k: int | Literal["auto"] = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_k(k)
        self.k = k

    def update(self, logits: Tensor) -> None:
        """Add a batch of (B, C) logits.

        Raises:
            ValueError: if they are something else, or have fewer than k classes.
        """
        _check_logits("logits", logits)
        self._add(principal_entropy(logits, classes_kept(self.k, logits.shape[1])))


class FlipRate(_Mean):
    """Share of samples for which two models predict different classes, in [0, 1]; `functional.flip_rate` of a batch.

    Args:
        kwargs: torchmetrics' own options.
    """

    plot_upper_bound = 1.0

    def update(self, logits: Tensor, source: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, C) of the adapted model.
            source: (B, C) of the source model, for the same samples.

        Raises:
            ValueError: if they are something else.
        """
        _check_logits("logits", logits)
        _check_logits("source", source)
        if logits.shape != source.shape:
            raise ValueError(
                f"Expected `logits` and `source` to be of the same samples and classes, but got {tuple(logits.shape)} "
                f"and {tuple(source.shape)}."
            )
        self._add(flips(logits, source))


class ClassShare(Sums):
    """Entropy of the mean prediction, in nats: log C if the classes are used evenly, 0 if one alone is predicted.

    `functional.class_share` is that of a batch.

    Args:
        num_classes: C.
        kwargs: torchmetrics' own options.

    Raises:
        ValueError: if `num_classes` is no integer >= 1.
    """

    plot_lower_bound = 0.0
    share: Tensor
    samples: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"Expected `num_classes` to be an integer >= 1, but got {num_classes!r}.")
        self.num_classes = num_classes
        self.add_state("share", torch.zeros(num_classes), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add a batch of (B, C) logits.

        Raises:
            ValueError: if they are something else.
        """
        _check_logits("logits", logits, self.num_classes)
        self.share = self.share + widen(logits).detach().softmax(-1).sum(0).to(self.share)
        self.samples = self.samples + len(logits)

    def compute(self) -> Tensor:
        """Return the entropy of the mean prediction so far; NaN without a sample."""
        return entropy_of(self.share / self.samples)


class Information(ClassShare):
    """Mutual information of sample and class under the predictions, in nats; `functional.information` of a batch.

    Entropy of the mean prediction less the predictions' mean entropy: 0 where all samples are predicted alike.

    Args:
        num_classes: C.
        kwargs: torchmetrics' own options.
    """

    entropy: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.add_state("entropy", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add a batch of (B, C) logits.

        Raises:
            ValueError: if they are something else.
        """
        super().update(logits)
        self.entropy = self.entropy + entropy(logits.detach()).sum().to(self.entropy)

    def compute(self) -> Tensor:
        """Return the information so far; NaN without a sample."""
        return information_of(self.share / self.samples, self.entropy / self.samples)


def _check_logits(name: str, logits: Any, classes: int | None = None) -> None:
    """Raise unless `logits` are (B, C) floating point numbers, of `classes` if that is given."""
    is_fit = isinstance(logits, Tensor) and logits.dim() == 2 and logits.is_floating_point() and logits.shape[1] > 0
    if not is_fit or classes not in (None, logits.shape[1]):
        wanted = "(samples, classes)" if classes is None else f"(samples, {classes})"
        seen = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"Expected `{name}` to be a floating point tensor of {wanted}, but got {seen}.")
