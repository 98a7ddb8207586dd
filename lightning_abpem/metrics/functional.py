"""A batch's figures of attention between modalities, from q and k or from captured calls.

An ordered pair (m, n) of modalities has a cross block, of m's queries and n's keys, and a self block, of n's queries
and keys. Scores are those before the softmax, averaged over heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_abpem.attention.calls import AttentionCall, EagerCall, FusedCall
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.attention.masks import fused_call
from lightning_abpem.attention.spans import Modalities, Tokens, own_spans, token_spans
from lightning_abpem.attention.statistics import Pair, compare_samples

__all__ = [
    "Average",
    "Blocks",
    "PairSums",
    "Seen",
    "attention_divergence",
    "attention_gap",
    "average_pairs",
    "check_average",
]

Average = Literal["macro", "none"]
"""A scalar, the mean over pairs; or the figure of each pair by its name, "audio_to_video"."""

Seen = Tensor | AttentionCall | Iterable[AttentionCall]
"""Queries; or calls of one forward, as `capture_attention` collects them."""


class PairSums(NamedTuple):
    """Sums over samples and layers that count, by pair: the figure's, and their number; (pairs,) each."""

    total: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of scores that are compared.

    Args:
        modalities: the modalities' tokens in the joint sequence: lengths in order, or ranges (start, stop). With a
            `fusion` of several modules, those in the modality's own sequence, or names alone for all tokens.
        fusion: as `find_fusion` gives it, for calls of attention modules by pair, or of some calls only; by default
            every call is over one joint sequence of all modalities.

    Raises:
        ValueError: if the modalities are fewer than two, overlap or are no spans, or are not those of `fusion`.
    """

    modalities: Modalities | Sequence[str]
    fusion: JointFusion | SeparateFusion | None = None
    tokens: dict[str, Tokens] = field(init=False)
    pairs: list[Pair] = field(init=False)

    def __post_init__(self) -> None:
        tokens = _tokens(self.modalities, isinstance(self.fusion, SeparateFusion))
        pairs = [(m, n) for m in tokens for n in tokens if m != n]
        if isinstance(self.fusion, SeparateFusion):
            pairs = [(m, n) for m, n in self.fusion.places if m != n]
            if missing := [name for name in dict.fromkeys(x for pair in pairs for x in pair) if name not in tokens]:
                raise ValueError(
                    f"Expected `modalities` to hold {missing}, which `fusion` names, but got {self.modalities!r}."
                )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "pairs", pairs)

    def sums(
        self,
        figure: Literal["gap", "divergence"],
        q: Seen,
        k: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> PairSums:
        """Add up a figure over the samples and layers of a batch; see `attention_gap`."""
        calls = _calls(q, k, mask, scale)
        fusion = self._checked(calls)
        if calls[0].shape[0] == 0:
            return PairSums(*torch.zeros(2, len(self.pairs), device=calls[0].device))
        attention = fusion.compare(calls, self.tokens)
        compared = compare_samples([own for pair in self.pairs for own in attention[pair]])
        layers = [len(attention[pair]) for pair in self.pairs]
        totals, counts = (
            torch.stack([own.sum() for own in x.split(layers)]) for x in (getattr(compared, figure), compared.counts)
        )
        return PairSums(totals, counts)

    def _checked(self, calls: list[AttentionCall]) -> JointFusion | SeparateFusion:
        """Return the fusion that these calls are of, held against them."""
        sizes = list(dict.fromkeys(call.shape[0] for call in calls))
        if len(sizes) != 1:
            raise ValueError(
                f"Expected attention calls of one forward, with as many samples each, but got {len(calls)} calls of "
                f"{sizes} samples. Capture each forward by itself."
            )
        fusion = self.fusion or JointFusion([], [(call.name, None) for call in calls])
        called = {call.name for call in calls}
        if silent := [attention.name for attention in fusion.watched if attention.name not in called]:
            raise ValueError(f"Expected calls of {', '.join(silent)}, which `fusion` names, but got {sorted(called)}.")
        fusion.check(calls, self.tokens)
        return fusion


def attention_gap(
    q: Seen,
    k: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    modalities: Modalities | Sequence[str],
    fusion: JointFusion | SeparateFusion | None = None,
    scale: float | None = None,
    average: Average = "macro",
) -> Tensor | dict[str, Tensor]:
    """Mean score of the self block less that of the cross block, over samples and layers: how much less m asks n.

    Args:
        q: (B, H, N, D/H) queries, as F.scaled_dot_product_attention gets them; or captured calls, and nothing more.
        k: (B, H or fewer, N, D/H) keys.
        mask: what it gets as `attn_mask`; scores that it hides do not count.
        modalities: see `Blocks`.
        fusion: see `Blocks`.
        scale: of the scores; 1 / sqrt(D/H) if None.
        average: "macro" for the mean over pairs, a scalar; "none" for each pair's by its name, "audio_to_video".

    Returns:
        in units of scores. NaN of a pair that no sample has two scores for, and it does not count in the mean.

    Raises:
        ValueError: if tensors, calls or modalities do not fit.
    """
    return _figure("gap", Blocks(modalities, fusion), (q, k, mask, scale), average)


def attention_divergence(
    q: Seen,
    k: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    modalities: Modalities | Sequence[str],
    fusion: JointFusion | SeparateFusion | None = None,
    scale: float | None = None,
    average: Average = "macro",
) -> Tensor | dict[str, Tensor]:
    """KL divergence of the cross block's Gaussian from the self block's, over samples and layers, in nats.

    Arguments, result and errors are those of `attention_gap`. A sample whose scores are all the same in a block does
    not count. The self block is a constant: the gradient is that of the attention bootstrapping.
    """
    return _figure("divergence", Blocks(modalities, fusion), (q, k, mask, scale), average)


def _figure(
    figure: Literal["gap", "divergence"], blocks: Blocks, seen: Any, average: Average
) -> Tensor | dict[str, Tensor]:
    check_average(average)
    return average_pairs(blocks.sums(figure, *seen), blocks.pairs, average)


def average_pairs(sums: PairSums, pairs: Sequence[Pair], average: Average) -> Tensor | dict[str, Tensor]:
    """Average a figure over samples, and over pairs with "macro"."""
    means = sums.total / sums.counts
    if average == "none":
        return {f"{m}_to_{n}": mean for (m, n), mean in zip(pairs, means.unbind(), strict=True)}
    seen = sums.counts > 0
    return means.where(seen, 0).sum() / seen.sum()


def check_average(average: object) -> None:
    """Hold `average` against what it may be.

    Raises:
        ValueError: if it is something else.
    """
    if average not in get_args(Average):
        raise ValueError(f'Expected `average` to be "macro" or "none", but got {average!r}.')


def _tokens(modalities: object, are_apart: bool) -> dict[str, Tokens]:
    """The tokens of each modality, in one sequence or, if they `are_apart`, each in its own."""
    if not isinstance(modalities, Mapping):
        if not are_apart or isinstance(modalities, str) or not isinstance(modalities, Sequence):
            raise ValueError(
                f'Expected `modalities` to say how many tokens each has, as in {{"audio": 512, "video": 196}}, but got '
                f"{modalities!r}."
            )
        return dict.fromkeys(modalities, Tokens(slice(None)))
    spans = own_spans(modalities) if are_apart else token_spans(modalities)
    for name, own in spans.items():
        if not isinstance(own, Tokens):
            raise ValueError(
                f"Expected a length or (start, stop) for modality '{name}', but got {own!r}. Hide tokens by the "
                "attention's mask."
            )
    return {name: own for name, own in spans.items() if isinstance(own, Tokens)}


def _calls(q: Seen, k: Tensor | None, mask: Tensor | None, scale: float | None) -> list[AttentionCall]:
    if isinstance(q, Tensor):
        if not (isinstance(k, Tensor) and _are_heads(q, k)):
            seen = tuple(k.shape) if isinstance(k, Tensor) else type(k).__name__
            raise ValueError(
                "Expected `q` and `k` to be floating point tensors of (samples, heads, tokens, width per head), with "
                f"the same samples and width, but got {tuple(q.shape)} and {seen}."
            )
        _check_mask(mask, (*q.shape[:3], k.shape[2]))
        return [fused_call("q and k", 0, q, k, mask, scale=scale)]
    if k is not None or mask is not None or scale is not None:
        raise ValueError("Expected captured calls alone, which hold their keys, mask and scale, but got those too.")
    calls = [q] if isinstance(q, FusedCall | EagerCall) else list(q)
    if not calls or not all(isinstance(call, FusedCall | EagerCall) for call in calls):
        kinds = [type(call).__name__ for call in calls]
        raise ValueError(f"Expected queries and keys, or the calls that `capture_attention` collects, but got {kinds}.")
    return calls


def _are_heads(q: Tensor, k: Tensor) -> bool:
    if not (q.dim() == k.dim() == 4 and q.is_floating_point() and k.is_floating_point()):
        return False
    return q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0


def _check_mask(mask: Tensor | None, shape: Sequence[int]) -> None:
    if mask is not None and not (
        mask.dim() <= 4 and all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(shape), strict=False))
    ):
        raise ValueError(f"Expected `mask` to expand to the scores, {tuple(shape)}, but got {tuple(mask.shape)}.")
