"""ABPEM's loss: from logits and attention score statistics to one scalar and the figures worth recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from lightning_abpem.functional import (
    ScoreStatistics,
    entropy,
    gaussian_kl,
    marginal_balance,
    principal_entropy,
    read_balance,
)

__all__ = ["Balance", "Objective", "Pair"]

Balance = Literal["marginal", "read"]
Pair = tuple[str, str]
"""An ordered pair of modalities: (the one that asks, the one that answers), that is (query, key)."""

_BALANCES = {"marginal": marginal_balance, "read": read_balance}


@dataclass(frozen=True)
class Objective:
    """principal entropy - balance_weight * balance + attention_weight * bootstrapping.

    Bootstrapping pulls the Gaussian of each cross block's scores towards that of the key modality's self block, which
    is a constant here: the sum over ordered pairs of modalities of the batch-mean KL divergence.

    Args:
        k: classes the principal entropy keeps, in [1, C].
        attention_weight: weight of the bootstrapping, >= 0.
        balance_weight: weight of the balance, >= 0.
        balance: "marginal", the entropy of the batch-mean prediction, or "read", READ's form of it.
    """

    k: int
    attention_weight: float = 1.0
    balance_weight: float = 1.0
    balance: Balance = "marginal"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"Expected `k` to be an integer in [1, number of classes], but got {self.k!r}.")
        for name in ("attention_weight", "balance_weight"):
            weight = getattr(self, name)
            if not isinstance(weight, Real) or not 0 <= weight < float("inf"):
                raise ValueError(f"Expected `{name}` to be a finite number >= 0, but got {weight!r}.")
        if self.balance not in _BALANCES:
            raise ValueError(f"Expected `balance` to be one of {sorted(_BALANCES)}, but got {self.balance!r}.")

    @staticmethod
    def record_names(modalities: Sequence[str]) -> list[str]:
        """The names of the figures that a call returns, for these modalities."""
        pairs = [f"{m}_to_{n}" for m in modalities for n in modalities if m != n]
        return [
            *("loss", "principal_entropy", "entropy", "balance"),
            *(f"attention_gap/{pair}" for pair in pairs),
            *(f"divergence/{pair}" for pair in pairs),
        ]

    def __call__(
        self, logits: Tensor, attention: Sequence[Mapping[Pair, ScoreStatistics]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and, under `record_names`, its parts as detached scalars (nats; scores for the gap).

        Args:
            logits: (B, C).
            attention: per fusion attention, the statistics of its blocks by (query, key) modality, self blocks
                detached. Bootstrapping and the figures are averaged over the list.

        Raises:
            ValueError: if k exceeds the number of classes.
        """
        if self.k > logits.shape[1]:
            raise ValueError(
                f"Expected `k` to be an integer in [1, number of classes], but got {self.k} and logits of "
                f"{logits.shape[1]} classes."
            )
        principal = principal_entropy(logits, self.k).mean()
        balance = _BALANCES[self.balance](logits)
        gaps, divergences = self._compare(attention)
        loss = principal
        if self.balance_weight:  # a part that does not count cannot spoil the loss either
            loss = loss - self.balance_weight * balance
        if self.attention_weight:
            loss = loss + self.attention_weight * torch.stack(list(divergences.values())).sum()
        with torch.no_grad():
            record = {
                "loss": loss,
                "principal_entropy": principal,
                "entropy": entropy(logits).mean(),
                "balance": balance,
                **{f"attention_gap/{pair}": gap for pair, gap in gaps.items()},
                **{f"divergence/{pair}": divergence for pair, divergence in divergences.items()},
            }
        return loss, {name: value.detach() for name, value in record.items()}

    @staticmethod
    def _compare(
        attention: Sequence[Mapping[Pair, ScoreStatistics]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per cross block, batch means over all layers: mean(n,n) - mean(m,n), and KL( (m,n) || (n,n) )."""
        gaps, divergences = {}, {}
        for m, n in attention[0]:
            if m == n:
                continue
            cross, target = [layer[m, n] for layer in attention], [layer[n, n] for layer in attention]
            pairs = list(zip(cross, target, strict=True))
            gaps[f"{m}_to_{n}"] = torch.stack([(t.mean - c.mean).mean() for c, t in pairs]).mean()
            divergences[f"{m}_to_{n}"] = torch.stack([gaussian_kl(*c, *t).mean() for c, t in pairs]).mean()
        return gaps, divergences
