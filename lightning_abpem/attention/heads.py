"""Heads folded into the batch dimension: which row holds which head of which sample.

Shapes say nothing of the order, so it is read off the values. A projection's output has the samples in a known order,
and q, k or v holds it unchanged. Shapes: B samples, N tokens, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

__all__ = ["Fold", "choose_fold", "fitting_folds"]


@dataclass(frozen=True, order=True)
class Fold:
    """An order of B * H rows: the heads of each sample side by side or, `heads_first`, the samples of each head."""

    samples: int
    heads: int
    heads_first: bool = False

    def unfold(self, x: Tensor) -> Tensor:
        """Return (B * H, N, M) as (B, H, N, M)."""
        if self.heads_first:
            return x.unflatten(0, (self.heads, self.samples)).transpose(0, 1)
        return x.unflatten(0, (self.samples, self.heads))


def choose_fold(name: str, folds: Iterable[Fold], *rows: Tensor) -> Fold:
    """Choose among the folds that fit: one is as good as another if it unfolds `rows` to the same values.

    Raises:
        ValueError: naming the attention, if it is not.
    """
    first, *others = sorted(folds)
    for other in others:
        if not all(torch.equal(first.unfold(x), other.unfold(x)) for x in rows):
            raise ValueError(
                f"Expected the heads of '{name}' to be told from its samples by their values, but q, k and v hold the "
                f"same values under {first} and {other}, as where a projection's weight is 0. Give the heads a "
                "dimension of their own, (batch, heads, tokens, width)."
            )
    return first


def fitting_folds(folded: Iterable[Tensor], projected: Sequence[Tensor]) -> set[Fold]:
    """Find the folds under which tensors hold a projection's output, value by value.

    Args:
        folded: such as v, k and q, each (B * H, N, d), whose rows lie alike. Those that hold no projection's output
            unchanged do not count.
        projected: the projections' outputs, of any shape with the samples ahead of the tokens or behind them.

    Returns:
        the folds that fit all that count; empty if none does.
    """
    fitting: set[Fold] = set()
    for rows in folded:
        if own := _folds(rows, projected):
            fitting = fitting & own if fitting else own
            if len(fitting) < 2:
                break
    return fitting


def _folds(rows: Tensor, projected: Sequence[Tensor]) -> set[Fold]:
    """Find the folds of one tensor. The first tokens tell which are worth a look at all."""
    guesses = [guess for output in projected for guess in _guesses(rows, output)]
    for tokens in (1, rows.shape[1]):
        if guesses:
            same = torch.stack([_holds(part[:, :tokens], own[:, :tokens]) for _, part, own in guesses]).tolist()
            guesses = [guess for guess, holds in zip(guesses, same, strict=True) if holds]
    return {fold for fold, _, _ in guesses}


def _guesses(rows: Tensor, output: Tensor) -> Iterator[tuple[Fold, Tensor, Tensor]]:
    """Yield folds that the sizes allow: an output (B, N, parts, H, d), and the rows unfolded to (B, N, 1, H, d)."""
    for tokens in _by_sample(output, rows.shape[1]):
        samples, width = tokens.shape[0], rows.shape[2]
        heads = rows.shape[0] // samples
        if heads * samples != rows.shape[0] or not heads * width or tokens.shape[2] % (heads * width):
            continue
        orders = (False, True) if samples > 1 and heads > 1 else (False,)
        for parts in _by_head(tokens, heads, width):
            for fold in (Fold(samples, heads, heads_first) for heads_first in orders):
                yield fold, parts, fold.unfold(rows).transpose(1, 2).unsqueeze(2)


def _by_sample(output: Tensor, tokens: int) -> Iterator[Tensor]:
    """Yield (B, N, D): samples ahead of tokens, tokens ahead of samples, and a convolution's (B, D, N)."""
    if not output.numel() or not tokens or output.dim() < 2:
        return
    rows = output.flatten(0, -2)
    if rows.shape[0] % tokens == 0:
        yield rows.unflatten(0, (-1, tokens))
        yield rows.unflatten(0, (tokens, -1)).transpose(0, 1)
    if output.dim() > 2 and output[0, 0].numel() == tokens:
        yield output.flatten(2).mT


def _by_head(tokens: Tensor, heads: int, width: int) -> Iterator[Tensor]:
    """Yield (B, N, D) as (B, N, parts, H, d), for each order of its columns: one linear may make q, k and v."""
    sizes = (tokens.shape[2] // (heads * width), heads, width)
    for order in permutations(range(3)):
        if sizes[0] > 1 or order[0] == 0:
            yield tokens.unflatten(2, [sizes[i] for i in order]).permute(0, 1, *(2 + order.index(i) for i in range(3)))


def _holds(parts: Tensor, own: Tensor) -> Tensor:
    """Return True, as a tensor, if one of the parts has the same values; NaN is like NaN."""
    parts = parts.to(own)
    same = (parts == own) | (parts.isnan() & own.isnan())
    return same.movedim(2, 0).flatten(1).all(1).any()
