"""ABPEM's loss: from logits and attention score statistics to one scalar and the figures worth recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_abpem.attention.statistics import Comparison, Pair, compare_samples
from lightning_abpem.engine.checks import check_choice, check_range
from lightning_abpem.functional import (
    check_k,
    classes_kept,
    entropy,
    marginal_balance,
    principal_entropy,
    read_balance,
    stream_balance,
)
from lightning_abpem.methods.stream import StreamPredictions, shuffledness

__all__ = ["Auto", "Balance", "Objective", "Parts", "weighted"]

Auto = Literal["auto"]
Balance = Literal["stream", "marginal", "read"]


_BATCH_BALANCES = {"marginal": marginal_balance, "read": read_balance}


class Parts(NamedTuple):
    """entropy_weight * principal entropy - balance_weight * balance; the bootstrapping; all figures, detached."""

    confidence: Tensor
    bootstrapping: Tensor
    record: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """entropy_weight * principal entropy - balance_weight * balance + attention_weight * bootstrapping.

    Bootstrapping pulls the Gaussian of each cross block's scores towards that of the key modality's self block, which
    is a constant here. The loss is the sum over ordered pairs of modalities of the batch-mean KL divergence.

    Args:
        k: classes the principal entropy keeps, in [1, C]; "auto" for the square root of C, 2 at least.
        attention_weight: weight of the bootstrapping, >= 0, or "auto", left to who has the gradients.
        balance_weight: weight of the balance, >= 0.
        balance: "marginal", the entropy of the batch-mean prediction, "stream", or "read", READ's form. "stream" is
            "marginal" as far as the stream looks shuffled, and for the rest the batch against the classes predicted so
            far.
        entropy_weight: weight of the principal entropy, >= 0; 1 in the paper.
    """

    k: int | Auto = "auto"
    attention_weight: float | Auto = "auto"
    balance_weight: float = 1.0
    balance: Balance = "stream"
    entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        check_k(self.k)
        for name in ("attention_weight", "balance_weight", "entropy_weight"):
            weight = getattr(self, name)
            if name == "attention_weight" and weight == "auto":
                continue
            check_range(name, weight)
        if not (self.balance_weight or self.entropy_weight):
            if self.attention_weight == "auto":
                raise ValueError('Expected a number for `attention_weight`: "auto" is relative to the other parts.')
            if not self.attention_weight:
                raise ValueError(
                    "Expected a part of the loss to have a weight, but all are 0. To observe, set steps=0."
                )
        check_choice("balance", self.balance, get_args(Balance))

    def __call__(
        self,
        logits: Tensor,
        attention: Mapping[Pair, Sequence[Comparison]],
        stream: StreamPredictions | None = None,
    ) -> Parts:
        """The loss's parts, and as detached scalars (nats; scores for the gap) all figures.

        The figures are `principal_entropy`, `entropy`, `balance`, with a stream its `shuffledness` and, for queries of
        m and keys of n, `attention_gap/m_to_n` and `divergence/m_to_n`.

        Args:
            logits: (B, C).
            attention: by (query, key) modality, for each layer, the statistics of the cross block and of the key
                modality's self block, the latter detached. Bootstrapping and the figures are averaged over layers.
                Samples of which a mask hides a block do not count there; a figure without any is NaN.
            stream: the stream's predictions, this batch's included; for balance="stream".

        Raises:
            ValueError: if k exceeds the number of classes.
        """
        principal = principal_entropy(logits, classes_kept(self.k, logits.shape[1])).mean()
        shuffled = None if stream is None else shuffledness(stream)
        balance = self._balance(logits, stream, shuffled)
        compared = _compare([comparison for layers in attention.values() for comparison in layers])
        layers = [len(own) for own in attention.values()]
        # A part that does not count cannot spoil the loss either.
        confidence = weighted(self.entropy_weight, principal) if self.entropy_weight else torch.zeros_like(principal)
        if self.balance_weight:
            confidence = confidence - weighted(self.balance_weight, balance)
        bootstrapping = _over_layers(compared.divergence, layers).sum()
        record = {"principal_entropy": principal.detach(), "balance": balance.detach()}
        with torch.no_grad():
            record["entropy"] = entropy(logits).mean()
            *figures, counts = _over_layers(torch.stack(compared), layers)  # (pairs,) each
            for name, figure in zip(("attention_gap", "divergence"), figures, strict=True):
                values = (figure / counts).unbind()
                record |= {f"{name}/{m}_to_{n}": value for (m, n), value in zip(attention, values, strict=True)}
        if shuffled is not None:
            record["shuffledness"] = shuffled
        return Parts(confidence, bootstrapping, record)

    def _balance(self, logits: Tensor, stream: StreamPredictions | None, shuffled: Tensor | None) -> Tensor:
        if self.balance != "stream":
            return _BATCH_BALANCES[self.balance](logits)
        assert stream is not None
        assert shuffled is not None
        share = shuffled * (1 - 1 / logits.shape[0])  # one sample has no balance of its own
        return share * marginal_balance(logits) + (1 - share) * stream_balance(logits, stream.counts)


def weighted(weight: float, term: Tensor) -> Tensor:
    """``weight * term``, which is the term itself for the usual weight of 1."""
    return term if weight == 1 else weight * term


class _Means(NamedTuple):
    """Means over the samples that count, by comparison, 0 if none does: (comparisons,) each.

    `counts` is 1 where any does, else 0.
    """

    gap: Tensor
    divergence: Tensor
    counts: Tensor


def _compare(comparisons: Sequence[Comparison]) -> _Means:
    """Average gap and divergence of all comparisons over their samples."""
    samples = compare_samples(comparisons)
    total = samples.counts.sum(1)
    divisor = total.clamp(min=1)
    divergence = samples.divergence.sum(1) / divisor
    return _Means(samples.gap.sum(1) / divisor, divergence, total.clamp(max=1).to(divergence))


def _over_layers(figure: Tensor, layers: Sequence[int]) -> Tensor:
    """Average over each pair's layers, whose numbers are `layers`: (..., comparisons) to (..., pairs)."""
    if max(layers) == 1:
        return figure
    if len(set(layers)) == 1:
        return figure.unflatten(-1, (-1, layers[0])).mean(-1)
    return torch.stack([own.mean(-1) for own in figure.split(layers, -1)], -1)
