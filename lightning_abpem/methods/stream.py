"""Sums over the predictions along a stream: how often each class came, and how often the same came twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_abpem.functional import widen

__all__ = ["StreamPredictions", "extend_stream", "shuffledness"]


class StreamPredictions(NamedTuple):
    """Sums over the predictions p (C,) of a stream so far, all constants.

    Args:
        counts: (C,), the sum of p.
        squares: the sum of |p|^2.
        agreement: the sum of p_i . p_(i+1) over consecutive samples.
        last: (C,), the last p.
        samples: their number.
    """

    counts: Tensor
    squares: Tensor
    agreement: Tensor
    last: Tensor
    samples: int


def extend_stream(stream: StreamPredictions | None, logits: Tensor) -> StreamPredictions:
    """Return the stream, None for one that begins, with the predictions of (B, C) logits at its end.

    It begins anew with predictions over another number of classes.
    """
    if stream is not None and stream.last.shape != logits.shape[1:]:
        stream = None
    p = widen(logits.detach()).softmax(1)
    before = p[:1] if stream is None else torch.cat((stream.last[None], p[:1]))
    pairs = torch.cat((before[:-1], p))
    counts, squares, agreement = p.sum(0), p.square().sum(), (pairs[:-1] * pairs[1:]).sum()
    if stream is not None:
        counts, squares, agreement = counts + stream.counts, squares + stream.squares, agreement + stream.agreement
    return StreamPredictions(counts, squares, agreement, p[-1], len(p) + (stream.samples if stream else 0))


def shuffledness(stream: StreamPredictions) -> Tensor:
    """Return how little more consecutive predictions agree than any two of the stream: a scalar, 1 if shuffled.

    ((1 + n B) / (1 + n A))^2, at most 1, for n samples: A is the mean p_i . p_(i+1), B the mean p_i . p_j over all
    i != j. Where labels come in clumps A is larger than B. A model that collapses into a few classes predicts them in
    any order: A and B are large then, and alike. One pair that agrees is added to both, for a stream that begins.
    """
    n = stream.samples
    consecutive = stream.agreement / max(n - 1, 1)
    any_two = (stream.counts.square().sum() - stream.squares) / max(n * (n - 1), 1)
    return ((1 + n * any_two) / (1 + n * consecutive)).clamp(max=1).square()
