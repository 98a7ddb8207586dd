"""Statistics of the blocks of an attention call's scores: the queries of one modality against the keys of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_abpem.attention.calls import AttentionCall, EagerCall, FusedCall
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.functional import (
    ScoreStatistics,
    dense_score_statistics,
    gaussian_kl,
    map_statistics,
    moment_score_statistics,
    token_moments,
)

__all__ = ["Compared", "Comparison", "Pair", "compare_samples", "score_statistics", "visible_keys"]

Pair = tuple[str, str]
"""An ordered pair of modalities: (the one that asks, the one that answers), that is (query, key)."""

Comparison = tuple[ScoreStatistics, ScoreStatistics]
"""A cross block's statistics and those of the self block that it is drawn to."""


class Compared(NamedTuple):
    """Figures by comparison and sample, (comparisons, B) each; 0 where a sample does not count.

    Args:
        gap: mean of the self block less that of the cross block; without a gradient.
        divergence: KL of the cross block's Gaussian from the self block's.
        counts: True where a sample counts.
    """

    gap: Tensor
    divergence: Tensor
    counts: Tensor


def compare_samples(comparisons: Sequence[Comparison]) -> Compared:
    """Compute divergence and gap of all comparisons at once, each of (B,) statistics.

    A sample counts if a mask leaves it two scores at least in both blocks, and they are not all the same. Those of a
    silent sensor may be, and no Gaussian is near that.
    """
    cross, own = zip(*comparisons, strict=True)
    mean_p, std_p = torch.stack([block.mean for block in cross]), torch.stack([block.std for block in cross])
    mean_q, std_q = torch.stack([block.mean for block in own]), torch.stack([block.std for block in own])
    with torch.no_grad():
        out = _is_flat(mean_p, std_p) | _is_flat(mean_q, std_q)
        for blocks in (cross, own):
            if any(block.seen is not None for block in blocks):
                out |= torch.stack([out[i] if s.seen is None else ~s.seen for i, s in enumerate(blocks)])
        gap = (mean_q - mean_p).masked_fill(out, 0)
    divergence = gaussian_kl(mean_p, std_p.masked_fill(out, 1), mean_q, std_q.masked_fill(out, 1))
    return Compared(gap, divergence.masked_fill(out, 0), ~out)


def _is_flat(mean: Tensor, std: Tensor) -> Tensor:
    """Return True where a sample's scores differ by no more than rounding; False for NaN, which has to be noticed."""
    return std <= 64 * torch.finfo(std.dtype).eps * mean.abs()


def score_statistics(
    call: AttentionCall, rows: Mapping[str, Tokens], columns: Mapping[str, Tokens], form: str = "auto"
) -> Callable[[str, str], ScoreStatistics]:
    """The statistics of a block of a call's head-averaged scores, by its (query, key) modality.

    Scores that the call masks do not count, nor do those of tokens that `rows` and `columns` leave out.

    Args:
        call: the attention call.
        rows: which of its query tokens belong to which modality.
        columns: the same of its key tokens.
        form: of a fused call: "dense" makes the N x N map. "moments" needs O(D^2) memory, and cannot be had where the
            mask or the bias differs from query to query. "auto" takes the cheaper one, "moments" where N > 2D.
    """
    rows, columns = _counted(rows, call.shape[1], call.device), _counted(columns, call.shape[2], call.device)
    if isinstance(call, EagerCall):
        return lambda m, n: map_statistics(
            call.scores[:, rows[m].span, columns[n].span], _kept(call, rows[m], columns[n])
        )
    q_of, k_of = _parts(call.q, rows), _parts(call.k, columns)
    moments_fit = call.bias is None and (call.keep is None or call.keep.shape[1] == 1)
    if form == "dense" or not moments_fit or (form == "auto" and call.q.shape[1] <= 2 * call.q.shape[2]):
        return lambda m, n: _dense(call, q_of[m], k_of[n], rows[m], columns[n])
    kept_keys = {name: _both(tokens.keep, _key_mask(call, tokens.span)) for name, tokens in columns.items()}
    q = {name: token_moments(q_of[name], tokens.keep) for name, tokens in rows.items()}
    k = {name: token_moments(k_of[name], kept_keys[name]) for name in columns}
    return lambda m, n: moment_score_statistics(q[m], k[n], call.scale)


def _counted(tokens: Mapping[str, Tokens], length: int, device: torch.device) -> dict[str, Tokens]:
    """Give a span of one token a mask: masked counts tell that a block of one score has no deviation."""
    return {
        name: own._replace(keep=torch.ones(1, 1, dtype=torch.bool, device=device))
        if own.keep is None and len(range(*own.span.indices(length))) == 1
        else own
        for name, own in tokens.items()
    }


def visible_keys(call: AttentionCall) -> Tensor | None:
    """Return which key tokens any query attends to, (B or 1, N_k) bool; the others are padding. None for all."""
    return None if call.keep is None else call.keep.any(1)


def _parts(x: Tensor, tokens: Mapping[str, Tokens]) -> dict[str, Tensor]:
    """The tokens of each modality, of x (B, N, D).

    Disjoint spans are split off, all at once: backward, that is one copy, where every slice would fill a whole x with
    zeros.
    """
    bounds = {name: own.span.indices(x.shape[1])[:2] for name, own in tokens.items()}
    ordered = sorted(bounds, key=lambda name: bounds[name])
    pieces: list[tuple[str | None, int]] = []  # whose it is, None for nobody, and how many tokens
    end = 0
    for name in ordered:
        start, stop = bounds[name]
        pieces += [(None, start - end), (name, stop - start)]
        end = stop
    pieces.append((None, x.shape[1] - end))
    if min(size for _, size in pieces) < 0:
        return {name: x[:, own.span] for name, own in tokens.items()}
    pieces = [(name, size) for name, size in pieces if name or size]  # backward would make zeros for the empty ones
    parts = x.split([size for _, size in pieces], 1)
    return {name: part for (name, _), part in zip(pieces, parts, strict=True) if name is not None}


def _dense(call: FusedCall, q: Tensor, k: Tensor, rows: Tokens, columns: Tokens) -> ScoreStatistics:
    bias = None if call.bias is None else call.bias[:, rows.span, columns.span]
    return dense_score_statistics(q, k, call.scale, bias, _kept(call, rows, columns))


def _kept(call: AttentionCall, rows: Tokens, columns: Tokens) -> Tensor | None:
    """Return which scores of a block count: (B or 1, N_q or 1, N_k or 1) bool; None if all."""
    parts = [
        None if call.keep is None else call.keep[:, rows.span if call.keep.shape[1] > 1 else slice(None), columns.span],
        None if rows.keep is None else rows.keep.unsqueeze(2),
        None if columns.keep is None else columns.keep.unsqueeze(1),
    ]
    return reduce(_both, parts)


def _key_mask(call: FusedCall, span: slice) -> Tensor | None:
    return None if call.keep is None else call.keep[:, 0, span]


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b
