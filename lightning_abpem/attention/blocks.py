"""Blocks of an attention's scores as small matrices, to be looked at: the queries of one modality, the keys of another.

Shapes: B samples, N tokens, S samples shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_abpem.attention.calls import AttentionCall, EagerCall
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import visible_keys
from lightning_abpem.functional import widen

__all__ = ["ScoreBlock", "score_blocks"]

_CELLS = 24  # of a side, at most


class ScoreBlock(NamedTuple):
    """The scores of one pair of modalities in the last fusion attention, averaged over heads.

    Args:
        query: the modality that asks.
        key: the modality that answers.
        attention: the module's name.
        queries: number of the query tokens.
        keys: number of the key tokens.
        scores: (S, rows, columns) on the host, at most 24 of each: means over neighbouring tokens. NaN where a mask
            leaves no score.
    """

    query: str
    key: str
    attention: str
    queries: int
    keys: int
    scores: Tensor


def score_blocks(
    fusion: JointFusion | SeparateFusion, calls: Sequence[AttentionCall], tokens: Mapping[str, Tokens], samples: int
) -> list[ScoreBlock]:
    """Return the blocks of every pair, self blocks included, of the first `samples` samples."""
    blocks = []
    for (m, n), call in fusion.last_calls(calls, list(tokens)).items():
        is_joint = isinstance(fusion, JointFusion)  # where a key that nobody sees is no query either
        rows = tokens[m].without(visible_keys(call)) if is_joint else tokens[m]
        scores = _scores(call, rows, tokens[n], samples)
        blocks.append(ScoreBlock(m, n, call.name, scores.shape[1], scores.shape[2], _pooled(scores).cpu()))
    return blocks


def _scores(call: AttentionCall, rows: Tokens, columns: Tokens, samples: int) -> Tensor:
    """Return the scores of a block, (S, N_q, N_k), NaN where a mask hides them."""
    row, column = rows.span, columns.span
    if isinstance(call, EagerCall):
        scores = widen(call.scores[:samples, row, column])
    else:
        scores = call.scale * (widen(call.q[:samples, row]) @ widen(call.k[:samples, column]).mT)
        if call.bias is not None:
            scores = scores + widen(call.bias[:samples, row, column])
    kept = torch.ones(1, 1, 1, dtype=torch.bool, device=scores.device)
    if call.keep is not None:
        kept = kept & call.keep[:samples, row if call.keep.shape[1] > 1 else slice(None), column]
    if rows.keep is not None:
        kept = kept & rows.keep[:samples].unsqueeze(2).to(kept.device)
    if columns.keep is not None:
        kept = kept & columns.keep[:samples].unsqueeze(1).to(kept.device)
    return scores.masked_fill(~kept, torch.nan)


def _pooled(scores: Tensor) -> Tensor:
    """Average (S, N_q, N_k) over neighbours to at most 24 x 24, what is NaN left out."""
    size = min(scores.shape[1], _CELLS), min(scores.shape[2], _CELLS)
    known = scores.isfinite()
    sums = F.adaptive_avg_pool2d(scores.where(known, 0), size)
    return sums / F.adaptive_avg_pool2d(known.to(scores), size)
