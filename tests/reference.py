"""ABPEM's equations once more, as naively as they can be written: float64, loops, a score map per head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def entropy_of(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def entropies(logits: Tensor) -> list[float]:
    return [entropy_of(softmax(row)) for row in logits.double().tolist()]


def principal_entropies(logits: Tensor, k: int) -> list[float]:
    kept = [sorted(softmax(row), reverse=True)[:k] for row in logits.double().tolist()]
    return [-sum(p * math.log(p + 1e-6) for p in row) for row in kept]


def marginal_balance(logits: Tensor) -> float:
    rows = [softmax(row) for row in logits.double().tolist()]
    return entropy_of([sum(column) / len(rows) for column in zip(*rows, strict=True)])


def read_balance(logits: Tensor) -> float:
    rows = [softmax(row) for row in logits.double().tolist()]
    return entropy_of(softmax([sum(column) for column in zip(*rows, strict=True)]))


def stream_balance(logits: Tensor, counts: list[float], prior: float) -> float:
    rows = [softmax(row) for row in logits.double().tolist()]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    stream = [(prior + count) / (prior * len(counts) + sum(counts)) for count in counts]
    return -sum(p * math.log(m) for p, m in zip(mean, stream, strict=True) if p > 0)


def confidence_losses(logits: Tensor) -> list[float]:
    most = [max(softmax(row)) for row in logits.double().tolist()]
    return [p * (1 - math.log(p) + math.log(math.exp(-1))) for p in most]


def gaussian_kl(a: float, s: float, b: float, t: float) -> float:
    return math.log(t / s) + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5


def mean_scores(q: Tensor, k: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Scaled scores before the softmax, averaged over heads one by one: (B, N, N) from q, k (B, N, D)."""
    q, k = q.double(), k.double()
    width = q.shape[-1] // heads
    scale = width**-0.5 if scale is None else scale
    maps = [scale * q[..., h * width : (h + 1) * width] @ k[..., h * width : (h + 1) * width].mT for h in range(heads)]
    return sum(maps, torch.zeros(())) / heads


def block_statistics(scores: Tensor, rows: slice, columns: slice) -> list[tuple[float, float]]:
    """Per sample: mean and unbiased standard deviation of one block of the scores."""
    statistics = []
    for score_map in scores[:, rows, columns].tolist():
        values = [value for row in score_map for value in row]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        statistics.append((mean, math.sqrt(variance)))
    return statistics


def cross_and_self(scores: Tensor, spans: dict[str, slice]) -> dict[tuple[str, str], list[tuple]]:
    """Per sample: statistics of each cross block and of the key modality's self block, by (query, key) modality."""
    result = {}
    for m, rows in spans.items():
        for n, columns in spans.items():
            if m != n:
                cross, target = block_statistics(scores, rows, columns), block_statistics(scores, columns, columns)
                result[m, n] = list(zip(cross, target, strict=True))
    return result


def divergences(scores: Tensor, spans: dict[str, slice]) -> dict[tuple[str, str], float]:
    """Batch mean of KL(cross block || self block of the key modality), by (query, key) modality."""
    blocks = cross_and_self(scores, spans)
    return {pair: sum(gaussian_kl(*c, *t) for c, t in samples) / len(samples) for pair, samples in blocks.items()}


def gaps(scores: Tensor, spans: dict[str, slice]) -> dict[tuple[str, str], float]:
    """Batch mean of mean(n, n) - mean(m, n), by (query, key) modality."""
    blocks = cross_and_self(scores, spans)
    return {pair: sum(t[0] - c[0] for c, t in samples) / len(samples) for pair, samples in blocks.items()}


def loss(
    logits: Tensor,
    layers: list[Tensor],
    spans: dict[str, slice],
    k: int,
    attention_weight: float = 1.0,
    balance_weight: float = 1.0,
    balance: str = "marginal",
    entropy_weight: float = 1.0,
) -> float:
    """Principal entropy - balance_weight * balance + attention_weight * bootstrapping, averaged over layers' scores."""
    principal = principal_entropies(logits, k)
    balance_term = {"marginal": marginal_balance, "read": read_balance}[balance](logits)
    bootstrapping = [sum(divergences(scores, spans).values()) for scores in layers]
    return (
        entropy_weight * sum(principal) / len(principal)
        - balance_weight * balance_term
        + attention_weight * sum(bootstrapping) / len(bootstrapping)
    )


def same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Bit-equal state dicts."""
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
