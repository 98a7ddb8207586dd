"""The equations of ABPEM, one pure function each: tensors in, tensors out.

Source: Zhao et al., "Attention Bootstrapping for Multi-Modal Test-Time Adaptation", AAAI 2025 (arXiv 2503.02221);
`docs/method.md` maps every equation to its function and its test. Shapes: B samples, C classes, N tokens, D width
(all heads side by side). Everything is computed in float32 at least, whatever the inputs' precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ScoreStatistics",
    "TokenMoments",
    "dense_score_statistics",
    "entropy",
    "gaussian_kl",
    "map_statistics",
    "marginal_balance",
    "moment_score_statistics",
    "principal_entropy",
    "read_balance",
    "token_moments",
]

_EPS = 1e-6  # inside the logarithm of the principal entropy, as in the authors' program


class ScoreStatistics(NamedTuple):
    """Mean and unbiased standard deviation, each (B,), of one block of head-averaged attention scores."""

    mean: Tensor
    std: Tensor


class TokenMoments(NamedTuple):
    """Mean (B, D), covariance (B, D, D, divided by the number of tokens) and number of tokens of one modality."""

    mean: Tensor
    cov: Tensor
    tokens: int


def _widen(x: Tensor) -> Tensor:
    """``x`` in float32 if it is narrower, else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax of (B, C) logits, in nats: (B,)."""
    log_p = _widen(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def principal_entropy(logits: Tensor, k: int) -> Tensor:
    """Entropy over the ``k`` most probable classes only, which are not renormalised (AAAI 2025, section 3.3).

    Args:
        logits: (B, C).
        k: classes kept per sample, in [1, C].

    Returns:
        (B,), in nats.
    """
    p = _widen(logits).softmax(-1).topk(k, dim=-1).values
    return -(p * (p + _EPS).log()).sum(-1)


def marginal_balance(logits: Tensor) -> Tensor:
    """Entropy of the batch-mean prediction of (B, C) logits: a scalar, large when the classes are used evenly."""
    log_p = _widen(logits).log_softmax(-1).logsumexp(0) - math.log(logits.shape[0])
    return -(log_p.exp() * log_p).sum()  # in logs: a class that underflows everywhere keeps a finite gradient


def read_balance(logits: Tensor) -> Tensor:
    """READ's form of the balance (ICLR 2024): entropy of the softmax of the predictions' sum over the batch."""
    return entropy(_widen(logits).softmax(-1).sum(0, keepdim=True)).squeeze(0)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL( N(mean_p, std_p) || N(mean_q, std_q) ), elementwise: log(t/s) + (s^2 + (a-b)^2) / (2 t^2) - 1/2."""
    ratio = std_p / std_q
    return -ratio.log() + (ratio.square() + ((mean_p - mean_q) / std_q).square() - 1) / 2


def map_statistics(scores: Tensor) -> ScoreStatistics:
    """Statistics of a block (B, N_q, N_k) of head-averaged scores."""
    std, mean = torch.std_mean(_widen(scores).flatten(1), dim=1)
    return ScoreStatistics(mean, std)


def dense_score_statistics(q: Tensor, k: Tensor, scale: float) -> ScoreStatistics:
    """Statistics of S = scale * q k^T from the (B, N_q, N_k) map itself: one product of the heads side by side.

    Args:
        q: (B, N_q, D) queries of one modality.
        k: (B, N_k, D) keys of one modality.
        scale: the attention's scale divided by the number of heads, which makes S the mean over heads.
    """
    return map_statistics(scale * (_widen(q) @ _widen(k).mT))


def token_moments(x: Tensor) -> TokenMoments:
    """Mean and covariance over the tokens of x, (B, N, D)."""
    x = _widen(x)
    mean = x.mean(1)
    centred = x - mean.unsqueeze(1)
    return TokenMoments(mean, centred.mT @ centred / x.shape[1], x.shape[1])


def moment_score_statistics(q: TokenMoments, k: TokenMoments, scale: float) -> ScoreStatistics:
    """Statistics of S = scale * q k^T without the map, in memory O(B D^2): exact, and free of cancellation.

    mean = s q.k ; population variance = s^2 [ k^T Cov_q k + q^T Cov_k q + <Cov_q, Cov_k> ], q and k the token means;
    every term is non-negative.
    """

    def form(v: Tensor, cov: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->b", v, cov, v)

    entries = q.tokens * k.tokens
    mean = scale * (q.mean * k.mean).sum(-1)
    variance = form(k.mean, q.cov) + form(q.mean, k.cov) + (q.cov * k.cov).sum((-2, -1))
    return ScoreStatistics(mean, abs(scale) * (variance * (entries / (entries - 1))).sqrt())
