"""Statistics of the blocks of an attention call's scores: the queries of one modality against the keys of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from lightning_abpem.attention.calls import AttentionCall, EagerCall, FusedCall
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.functional import (
    ScoreStatistics,
    dense_score_statistics,
    map_statistics,
    moment_score_statistics,
    token_moments,
)

__all__ = ["Comparison", "Pair", "score_statistics", "visible_keys"]

Pair = tuple[str, str]
"""An ordered pair of modalities: (the one that asks, the one that answers), that is (query, key)."""

Comparison = tuple[ScoreStatistics, ScoreStatistics]
"""A cross block's statistics and those of the self block that it is drawn to."""


def score_statistics(
    call: AttentionCall, rows: Mapping[str, Tokens], columns: Mapping[str, Tokens], form: str = "auto"
) -> Callable[[str, str], ScoreStatistics]:
    """The statistics of a block of a call's head-averaged scores, by its (query, key) modality.

    Scores that the call masks do not count, nor do those of tokens that `rows` and `columns` leave out.

    Args:
        call: the attention call.
        rows: which of its query tokens belong to which modality.
        columns: the same of its key tokens.
        form: of a fused call: "dense" makes the N x N map; "moments" needs O(D^2) memory, and cannot be had where the
            mask or the bias differs from query to query; "auto" takes the cheaper one, "moments" where N > 2D.
    """
    device = call.scores.device if isinstance(call, EagerCall) else call.q.device
    rows, columns = _counted(rows, call.shape[1], device), _counted(columns, call.shape[2], device)
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
