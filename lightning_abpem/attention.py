"""Capturing the scores of a fusion attention, without touching the model.

Scores are wanted before the softmax, with gradients, also where the attention is fused and never materialises them. So
`capture_attention` watches the calls made inside the attention module: `F.scaled_dot_product_attention` and
`F.multi_head_attention_forward` give q and k, and in eager code, where there are neither, the softmax gives the scores
themselves, with whatever scale, bias or rotation they have. Shapes: B samples, N tokens, D width (all heads side by
side), H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_abpem.masks import causal_mask, read_mask
from lightning_abpem.projections import FusionAttention

__all__ = ["SOFTMAX", "AttentionCall", "EagerCall", "FusedCall", "capture_attention", "softmax_dim"]


class _Softmax(NamedTuple):
    """A softmax of eager code: what it got, and over which dimension it went."""

    scores: Tensor
    dim: int


def softmax_dim(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The dimension that one of `SOFTMAX` was called with."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return -1 if dim is None else int(dim)


SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)


@dataclass(frozen=True)
class FusedCall:
    """One call of a fused attention: q (B, N_q, D) and k (B, N_k, D), heads side by side, with gradients.

    The mean over heads of the scores that the softmax sees is ``scale * q @ k.mT + bias``.

    Args:
        name: the attention module's name.
        q: queries.
        k: keys.
        scale: the attention's scale divided by the number of heads.
        bias: what the attention adds to the scores, (B or 1, N_q, N_k), averaged over heads; None if nothing.
        keep: which scores are not masked, bool (B or 1, N_q or 1, N_k); None if all.
        turn: how many calls of this module came before, in this forward.
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None
    keep: Tensor | None = None
    turn: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N_q, N_k)."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]


@dataclass(frozen=True)
class EagerCall:
    """One call of an eager attention: what its softmax gets, averaged over heads, (B, N_q, N_k), with gradients.

    `name`, `keep` and `turn` are those of a `FusedCall`; scores that are not kept may be -inf.
    """

    name: str
    scores: Tensor
    keep: Tensor
    turn: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N_q, N_k)."""
        return tuple(self.scores.shape)


AttentionCall = FusedCall | EagerCall


@dataclass
class _Watch(TorchFunctionMode):
    """Watches one attention module, between its forward pre-hook and its forward hook."""

    attention: FusionAttention
    calls: list[AttentionCall]
    turn: int = 0
    fused: list[FusedCall] = field(default_factory=list)
    softmaxed: list[_Softmax] = field(default_factory=list)
    stacked: set[int] = field(default_factory=set)
    entered: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = object.__hash__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.fused.append(_fused_call(self.attention, self.turn, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            lean = _lean_multi_head(self.attention, self.turn, *args, **kwargs)
            if lean is not None:
                self.fused.append(lean[1])
                return lean[0], None
            self.fused.append(_multi_head_call(self.attention, self.turn, *args, **kwargs))
        elif func in SOFTMAX:
            self.softmaxed.append(_Softmax(args[0] if args else kwargs["input"], softmax_dim(args, kwargs)))
        output = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self.stacked |= {output.shape[0]} if dim == 0 and output.dim() == 3 else set()
        return output

    def enter(self, *_: Any) -> None:
        self.entered = True
        self.fused.clear()
        self.softmaxed.clear()
        self.stacked.clear()
        self.__enter__()

    def leave(self, module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
        if not self.entered:
            return
        self.entered = False
        self.__exit__(None, None, None)
        if output is not None:
            self._check()
            self.calls.extend(self.fused or [_eager_call(self.attention, self.turn, self.softmaxed)])
            self.turn += 1

    def _check(self) -> None:
        heads = self.attention.heads
        if heads > 1 and any(rows % heads == 0 for rows in self.stacked):
            raise ValueError(
                f"Expected the heads of '{self.attention.name}' to be a dimension of their own, or folded into the "
                "batch next to each other for each sample, but they are put behind one another with torch.cat. Use "
                "F.scaled_dot_product_attention with (batch, heads, tokens, width)."
            )
        if not self.fused and not self.softmaxed:
            raise ValueError(
                f"'{self.attention.name}' was called, but neither F.scaled_dot_product_attention, "
                "F.multi_head_attention_forward nor a softmax was seen inside: its kernel hides q and k. Use the "
                "attention that torch has (in Hugging Face transformers attn_implementation='sdpa' or 'eager'; "
                "elsewhere the option that turns flash, flex or memory-efficient attention off)."
            )


@contextmanager
def capture_attention(fusion: Iterable[FusionAttention]) -> Iterator[list[AttentionCall]]:
    """Collect the calls of these attention modules while the block lasts, in the order in which they are made.

    Raises:
        ValueError: at an attention whose kernel hides q and k, or whose heads cannot be told from its samples.
    """
    calls: list[AttentionCall] = []
    with ExitStack() as stack:
        for attention in fusion:
            watch = _Watch(attention, calls)
            stack.callback(watch.leave)
            stack.callback(attention.module.register_forward_pre_hook(watch.enter).remove)
            stack.callback(attention.module.register_forward_hook(watch.leave, always_call=True).remove)
        yield calls


def _fused_call(
    attention: FusionAttention,
    turn: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedCall:
    """From the arguments of F.scaled_dot_product_attention: (B, H, N, D/H), or three-dimensional.

    Three dimensions are (B * H, N, D/H) where that fits the number of heads and the query projection's width, else
    (B, N, D) with a single head.
    """
    if query.dim() == 3:
        heads = attention.heads if attention.is_head_width(query.shape[-1]) else 1
        query, key = _unfold_heads(query, heads), _unfold_heads(key, heads)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = _unfold_heads(attn_mask, heads)
    if query.dim() != 4:
        raise ValueError(
            f"Expected queries (batch, heads, tokens, width) in '{attention.name}', but got {tuple(query.shape)}."
        )
    heads = query.shape[1]
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    masks = [] if attn_mask is None else [read_mask(attn_mask, key.shape[2])]
    if is_causal:
        masks.append((causal_mask(query.shape[2], key.shape[2], query.device), None))
    return _masked_call(attention.name, turn, _side_by_side(query), _side_by_side(key), scale / heads, masks)


def _side_by_side(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _unfold_heads(x: Tensor, heads: int) -> Tensor:
    """(B * H, N, M) as (B, H, N, M)."""
    return x.unflatten(0, (-1, heads)) if x.shape[0] % heads == 0 else x.unsqueeze(1)


def _multi_head_call(
    attention: FusionAttention,
    turn: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    *_: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    **__: Any,
) -> FusedCall:
    """From the arguments of F.multi_head_attention_forward: tokens (N, B, D), projected here once more.

    The key tokens that `bias_k` and `add_zero_attn` append belong to no modality, so nothing needs to be known of them.
    """
    if query.dim() != 3:
        raise ValueError(f"Expected batched tokens in '{attention.name}', but got queries {tuple(query.shape)}.")
    if in_proj_weight is not None:
        q_proj_weight, k_proj_weight, _v = in_proj_weight.chunk(3)
    assert q_proj_weight is not None
    assert k_proj_weight is not None
    b_q, b_k = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
    q, k = F.linear(query, q_proj_weight, b_q).transpose(0, 1), F.linear(key, k_proj_weight, b_k).transpose(0, 1)
    masks = []
    if key_padding_mask is not None:
        masks.append(read_mask(_allowed(key_padding_mask)[:, None, None], k.shape[1]))
    if attn_mask is not None:
        attn_mask = _allowed(attn_mask)
        masks.append(read_mask(_unfold_heads(attn_mask, heads) if attn_mask.dim() == 3 else attn_mask, k.shape[1]))
    return _masked_call(attention.name, turn, q, k, (embed_dim // heads) ** -0.5 / heads, masks)


def _lean_multi_head(
    attention: FusionAttention,
    turn: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    **_: Any,
) -> tuple[Tensor, FusedCall] | None:
    """F.multi_head_attention_forward in its plainest form, (N, B, D), with its q and k; None in any other.

    That function keeps its q and k to itself: to have them too, they would be projected twice, forward and backward.
    """
    plain = query is key and key is value and query.dim() == 3 and in_proj_weight is not None
    masked = key_padding_mask is not None or attn_mask is not None
    appended = bias_k is not None or bias_v is not None or add_zero_attn
    if not plain or masked or appended or need_weights or use_separate_proj_weight or (training and dropout_p > 0):
        return None
    assert in_proj_weight is not None
    q, k, v = F.linear(query.transpose(0, 1), in_proj_weight, in_proj_bias).chunk(3, -1)
    by_head = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    output = _side_by_side(F.scaled_dot_product_attention(*by_head))
    output = F.linear(output, out_proj_weight, out_proj_bias).transpose(0, 1)
    return output, FusedCall(attention.name, q, k, (embed_dim // heads) ** -0.5 / heads, turn=turn)


def _allowed(mask: Tensor) -> Tensor:
    """nn.MultiheadAttention's masks say which scores to hide, those of F.scaled_dot_product_attention which to keep."""
    return ~mask if mask.dtype == torch.bool else mask


def _masked_call(
    name: str, turn: int, q: Tensor, k: Tensor, scale: float, masks: list[tuple[Tensor | None, Tensor | None]]
) -> FusedCall:
    """A call under several masks. What is added to a key's scores alike for all queries becomes a feature of it."""
    keep = bias = None
    for kept, added in masks:
        if kept is not None:
            keep = kept if keep is None else keep & kept
        if added is not None and added.shape[1] == 1:
            q = torch.cat([q, q.new_ones(*q.shape[:2], 1)], -1)
            k = torch.cat([k, (added.mT / scale).to(k).expand(*k.shape[:2], 1)], -1)
        elif added is not None:
            bias = added if bias is None else bias + added
    return FusedCall(name, q, k, scale, bias, keep, turn)


def _eager_call(attention: FusionAttention, turn: int, softmaxed: list[_Softmax]) -> EagerCall:
    """From what a softmax gets: scores with scale and bias, (B, H, N_q, N_k) or (B * H, N_q, N_k)."""
    scores = [x.scores for x in softmaxed if x.scores.dim() == 4]
    if not scores and attention.heads > 1:
        folded = [x.scores for x in softmaxed if x.scores.dim() == 3 and x.scores.shape[0] % attention.heads == 0]
        scores = [_unfold_heads(x, attention.heads) for x in folded]
    if len(scores) != 1 or any(x.dim not in (-1, x.scores.dim() - 1) for x in softmaxed if x.scores.dim() > 2):
        listed = ", ".join(f"{tuple(x.scores.shape)} over dimension {x.dim}" for x in softmaxed)
        raise ValueError(
            f"Expected the eager attention '{attention.name}' to have one softmax, over the last dimension of (batch, "
            f"heads, query tokens, key tokens), but got {listed}. Use its fused attention."
        )
    keep, _ = read_mask(scores[0], scores[0].shape[-1], relative=True)
    assert keep is not None
    return EagerCall(attention.name, scores[0].mean(1), keep, turn)
