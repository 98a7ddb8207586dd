"""The equations of ABPEM, one pure function each: tensors in, tensors out.

Source: Zhao et al., "Attention Bootstrapping for Multi-Modal Test-Time Adaptation", AAAI 2025 (arXiv 2503.02221);
`docs/method.md` maps every equation to its function and its test. Shapes: B samples, C classes, N tokens, D width
(all heads side by side). Everything is computed in float32 at least, whatever the inputs' precision.

A class with a logit of -inf has probability 0. It adds 0 to every loss (x log x is 0 at 0) and gets a gradient of 0. A
sample all of whose logits are -inf has no prediction: its loss is NaN.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ScoreStatistics",
    "TokenMoments",
    "check_k",
    "class_share",
    "classes_kept",
    "confidence_loss",
    "dense_score_statistics",
    "entropy",
    "entropy_of",
    "finite_log",
    "flip_rate",
    "flips",
    "gaussian_kl",
    "information",
    "information_of",
    "map_statistics",
    "marginal_balance",
    "moment_score_statistics",
    "principal_entropy",
    "read_balance",
    "stream_balance",
    "token_moments",
    "widen",
]

_EPS = 1e-6  # inside the logarithm of the principal entropy, as in the authors' program
_LEAST_LOG = -1e4  # stands for log 0: exp is 0 there, in float64 too, and 0 times it is 0 where 0 times -inf is NaN


class ScoreStatistics(NamedTuple):
    """Mean and unbiased standard deviation, each (B,), of one block of head-averaged attention scores.

    `seen`, (B,) bool, is True where a mask leaves a sample the two scores that a standard deviation needs; None if no
    mask hides any. The mean and the deviation of a sample that is not seen mean nothing.
    """

    mean: Tensor
    std: Tensor
    seen: Tensor | None = None


class TokenMoments(NamedTuple):
    """Mean (B, D), covariance (B, D, D, divided by the number of tokens) and number of tokens of one modality.

    The number is (B,) where padding makes it differ from sample to sample.
    """

    mean: Tensor
    cov: Tensor
    tokens: int | Tensor


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is narrower, else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def finite_log(log_p: Tensor) -> Tensor:
    """Return log-probabilities with -10,000 in place of -inf: every probability stays what it is, bit for bit."""
    return log_p.clamp(min=_LEAST_LOG)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax of (B, C) logits, in nats: (B,)."""
    log_p = finite_log(widen(logits).log_softmax(-1))
    return -(log_p.exp() * log_p).sum(-1)


def entropy_of(p: Tensor) -> Tensor:
    """Shannon entropy of probabilities (..., C), in nats: (...)."""
    p = widen(p)
    return -(p * finite_log(p.log())).sum(-1)


def principal_entropy(logits: Tensor, k: int) -> Tensor:
    """Entropy over the ``k`` most probable classes only, which are not renormalised (AAAI 2025, section 3.3).

    Args:
        logits: (B, C).
        k: classes kept per sample, in [1, C]; those of probability 0 add 0.

    Returns:
        (B,), in nats.
    """
    p = widen(logits).softmax(-1).topk(k, dim=-1).values
    return -(p * (p + _EPS).log()).sum(-1)


def check_k(k: int | Literal["auto"]) -> None:
    """Hold `k` of the principal entropy against what it may be.

    Raises:
        ValueError: if it is neither "auto" nor an integer >= 1.
    """
    if k != "auto" and (isinstance(k, bool) or not isinstance(k, Integral) or k < 1):
        raise ValueError(f'Expected `k` to be an integer in [1, number of classes] or "auto", but got {k!r}.')


def classes_kept(k: int | Literal["auto"], classes: int) -> int:
    """Return k for that many classes: "auto" is their square root, 2 at least.

    Raises:
        ValueError: if it exceeds them.
    """
    if k == "auto":
        return min(max(round(math.sqrt(classes)), 2), classes)
    if k > classes:
        raise ValueError(
            f"Expected `k` to be an integer in [1, number of classes], but got {k} and logits of {classes} classes."
        )
    return k


def flips(logits: Tensor, source: Tensor) -> Tensor:
    """Return where two models' (B, C) logits predict different classes: (B,) bool."""
    return logits.argmax(-1) != source.argmax(-1)


def flip_rate(logits: Tensor, source: Tensor) -> Tensor:
    """Share of samples for which two models' (B, C) logits predict different classes: a scalar in [0, 1]."""
    return flips(logits, source).float().mean()


def class_share(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of (B, C) logits, in nats: log C if the classes are used evenly, 0 if one is.

    It is a figure to look at; `marginal_balance` is the same with a gradient that stays finite.
    """
    return entropy_of(widen(logits).softmax(-1).mean(0))


def information(logits: Tensor) -> Tensor:
    """Mutual information of sample and class under the predictions of (B, C) logits, in nats: a scalar >= 0.

    Entropy of the mean prediction less the predictions' mean entropy. It is 0 where all samples are predicted alike.
    """
    return information_of(widen(logits).softmax(-1).mean(0), entropy(logits).mean())


def information_of(share: Tensor, mean_entropy: Tensor) -> Tensor:
    """Return the same from the mean prediction, (C,), and the mean entropy, a scalar."""
    return entropy_of(share) - mean_entropy


def marginal_balance(logits: Tensor) -> Tensor:
    """Entropy of the batch-mean prediction of (B, C) logits: a scalar, large when the classes are used evenly."""
    log_p = finite_log(widen(logits).log_softmax(-1)).logsumexp(0) - math.log(logits.shape[0])
    return -(log_p.exp() * log_p).sum()  # in logs: a class that underflows everywhere keeps a finite gradient


def stream_balance(logits: Tensor, counts: Tensor, prior: float = 10.0) -> Tensor:
    """Cross-entropy of the batch-mean prediction of (B, C) logits with the stream's: large for classes rare so far.

    -sum_c p_c log m_c, p the batch mean and m = (prior + counts) / (C prior + sum of counts), a constant. Its gradient
    is that of the batch-mean prediction's entropy where the stream is this batch and `prior` is 0. A batch of few
    classes in an even stream is not pushed towards others; the prior says that none is rare at first.

    Args:
        logits: (B, C).
        counts: (C,), the sum of the stream's predictions so far, those of this batch included.
        prior: samples of every class that are taken as seen before the stream began.
    """
    mean = (prior + counts.detach()) / (prior * len(counts) + counts.detach().sum())
    return -(widen(logits).softmax(-1).mean(0) * finite_log(mean.log())).sum()


def confidence_loss(logits: Tensor) -> Tensor:
    """READ's confidence-aware loss (ICLR 2024) of (B, C) logits: p (1 - log p + log gamma), p the largest probability.

    With gamma = 1/e that is -p log p: its gradient falls to zero at p = gamma and grows with the confidence: (B,).
    """
    log_p = widen(logits).log_softmax(-1).max(-1).values
    return -log_p.exp() * log_p


def read_balance(logits: Tensor) -> Tensor:
    """READ's form of the balance (ICLR 2024): entropy of the softmax of the predictions' sum over the batch, a scalar.

    The second softmax gives a class that no sample can have e^0, as it does one that no sample is near.
    """
    return entropy(widen(logits).softmax(-1).sum(0, keepdim=True)).squeeze(0)


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL( N(mean_p, std_p) || N(mean_q, std_q) ), elementwise: log(t/s) + (s^2 + (a-b)^2) / (2 t^2) - 1/2."""
    ratio = std_p / std_q
    return (ratio.square() + ((mean_p - mean_q) / std_q).square() - 1) / 2 - ratio.log()


def _root(variance: Tensor) -> Tensor:
    """The square root, with a gradient of zero at zero."""
    positive = variance > 0
    return variance.where(positive, 1).sqrt().where(positive, 0)


def map_statistics(scores: Tensor, keep: Tensor | None = None) -> ScoreStatistics:
    """Statistics of a block (B, N_q, N_k) of head-averaged scores.

    Args:
        scores: the block; entries that do not count may hold anything, -inf too.
        keep: which entries count, bool, of a shape that expands to that of the block; all if None.
    """
    scores = widen(scores)
    if keep is None:
        std, mean = torch.std_mean(scores.flatten(1), dim=1)
        return ScoreStatistics(mean, std)
    keep = keep.expand(scores.shape)
    count = keep.sum((1, 2))
    seen = count > 1
    mean = scores.where(keep, 0).sum((1, 2)) / count.clamp(min=1)
    centred = (scores - mean[:, None, None]).where(keep, 0)
    variance = centred.square().sum((1, 2)) / (count - 1).clamp(min=1)
    return ScoreStatistics(mean, _root(variance), seen)


def dense_score_statistics(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, keep: Tensor | None = None
) -> ScoreStatistics:
    """Statistics of S = scale * q k^T + bias from the (B, N_q, N_k) map itself: one product of the heads side by side.

    Args:
        q: (B, N_q, D) queries of one modality.
        k: (B, N_k, D) keys of one modality.
        scale: the attention's scale divided by the number of heads, which makes S the mean over heads.
        bias: what the attention adds to the scores, averaged over heads; it expands to the map.
        keep: which entries count, bool; it expands to the map. All if None.
    """
    scores = scale * (widen(q) @ widen(k).mT)
    return map_statistics(scores if bias is None else scores + widen(bias), keep)


def token_moments(x: Tensor, keep: Tensor | None = None) -> TokenMoments:
    """Mean and covariance over the tokens of x, (B, N, D), or over those that `keep`, (B, N) bool, names."""
    x = widen(x)
    if keep is None:
        mean = x.mean(1)
        centred = x - mean.unsqueeze(1)
        return TokenMoments(mean, centred.mT @ centred / x.shape[1], x.shape[1])
    keep = keep.expand(x.shape[:2])
    tokens = keep.sum(1)
    divisor = tokens.clamp(min=1).to(x)
    mean = x.where(keep.unsqueeze(-1), 0).sum(1) / divisor.unsqueeze(-1)
    centred = (x - mean.unsqueeze(1)).where(keep.unsqueeze(-1), 0)
    return TokenMoments(mean, centred.mT @ centred / divisor[:, None, None], tokens)


def moment_score_statistics(q: TokenMoments, k: TokenMoments, scale: float) -> ScoreStatistics:
    """Statistics of S = scale * q k^T without the map, in memory O(B D^2): exact, and free of cancellation.

    mean = s q.k ; population variance = s^2 [ k^T Cov_q k + q^T Cov_k q + <Cov_q, Cov_k> ], q and k the token means.
    Every term is non-negative.
    """

    def form(v: Tensor, cov: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->b", v, cov, v)

    entries = q.tokens * k.tokens
    mean = scale * (q.mean * k.mean).sum(-1)
    variance = form(k.mean, q.cov) + form(q.mean, k.cov) + (q.cov * k.cov).sum((-2, -1))
    if not isinstance(entries, Tensor):
        return ScoreStatistics(mean, abs(scale) * _root(variance * (entries / (entries - 1))))
    unbiased = variance * entries / (entries - 1).clamp(min=1)
    return ScoreStatistics(mean, abs(scale) * _root(unbiased), entries > 1)
