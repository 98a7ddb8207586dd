"""Capturing the scores of a fusion attention, without touching the model.

Scores are wanted before the softmax, with gradients, also where the attention is fused and never materialises them. So
`capture_attention` watches the calls made inside the attention module: `F.scaled_dot_product_attention` and
`F.multi_head_attention_forward` give q and k, and in eager code, where there are neither, the softmax gives the scores
themselves, with whatever scale, bias or rotation they have. Shapes: B samples, N tokens, D width (all heads side by
side), H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lightning_abpem.attention.calls import (
    AttentionCall,
    EagerCall,
    FusedCall,
    masked_call,
    refuse_nested,
    side_by_side,
    unfold_heads,
)
from lightning_abpem.attention.masks import causal_mask, read_mask
from lightning_abpem.attention.multihead import call_multi_head
from lightning_abpem.attention.projections import FusionAttention
from lightning_abpem.modules.patches import Changes

__all__ = ["SOFTMAX", "capture_attention", "softmax_dim", "watch_attention"]


class _Softmax(NamedTuple):
    """A softmax of eager code: what it got, and over which dimension it went."""

    scores: Tensor
    dim: int


def softmax_dim(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The dimension that one of `SOFTMAX` was called with."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return -1 if dim is None else int(dim)


SOFTMAX = frozenset((F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax))
_STACKING = frozenset((torch.cat, torch.concat, torch.concatenate))


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Watches one attention module, between its forward pre-hook and its forward hook."""

    attention: FusionAttention
    calls: list[AttentionCall]
    turn: int = 0
    fused: list[FusedCall] = field(default_factory=list)
    softmaxed: list[_Softmax] = field(default_factory=list)
    stacked: set[tuple[int, int]] = field(default_factory=set)  # sizes of what may be heads behind one another
    folded: list[tuple[int, ...]] = field(default_factory=list)  # (B * H, N_q, N_k) of fused calls

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward or func in SOFTMAX:
            refuse_nested(self.attention.name, *args, *kwargs.values())
        if func is F.scaled_dot_product_attention:
            self._note_folded(*args, **kwargs)
            self.fused.append(_fused_call(self.attention, self.turn, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            output, call = call_multi_head(self.attention.name, self.turn, args, kwargs)
            self.fused.append(call)
            return output
        elif func in SOFTMAX:
            self.softmaxed.append(_Softmax(args[0] if args else kwargs["input"], softmax_dim(args, kwargs)))
        output = func(*args, **kwargs)
        if func in _STACKING:
            pieces = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if len(pieces) == self.attention.heads and output.dim() == 3 and dim in (0, -3):
                self.stacked.add((output.shape[0], output.shape[1]))
        return output

    def _note_folded(self, query: Tensor, key: Tensor, *_: Any, **__: Any) -> None:
        if query.dim() == 3 and self.attention.is_head_width(query.shape[-1]):
            self.folded.append((query.shape[0], query.shape[1], key.shape[1]))

    def enter(self, *_: Any) -> None:
        self.fused.clear()
        self.softmaxed.clear()
        self.stacked.clear()
        self.folded.clear()
        self.__enter__()

    def leave(self, module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
        """End the watch, if it is on: an interrupt may have come before it was, or while it ended."""
        was_on = self in _get_current_function_mode_stack()
        while self in _get_current_function_mode_stack():
            self.__exit__(None, None, None)
        if was_on and output is not None:
            self._check()
            self.calls.extend(self.fused or [_eager_call(self.attention, self.turn, self.softmaxed)])
            self.turn += 1

    def _check(self) -> None:
        folded = list(self.folded)
        if not self.fused and not any(x.scores.dim() == 4 for x in self.softmaxed):
            folded += [tuple(x.scores.shape) for x in self.softmaxed if x.scores.dim() == 3]
        if self.attention.heads > 1 and any((rows, n) in self.stacked for rows, *tokens in folded for n in tokens):
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


def watch_attention(changes: Changes, fusion: Iterable[FusionAttention]) -> list[AttentionCall]:
    """Return a list that will hold the calls of these attention modules, in the order in which they are made.

    Raises:
        ValueError: at an attention whose kernel hides q and k, or whose heads cannot be told from its samples.
    """
    calls: list[AttentionCall] = []
    for attention in fusion:
        watch = _Watch(attention, calls)
        enter, leave = watch.enter, watch.leave
        changes.note(leave)
        changes.hook(attention.module, "register_forward_pre_hook", enter)
        changes.hook(attention.module, "register_forward_hook", leave, always_call=True)
    return calls


@contextmanager
def capture_attention(fusion: Iterable[FusionAttention]) -> Iterator[list[AttentionCall]]:
    """Collect the calls of attention modules while the block lasts; see `watch_attention`."""
    with Changes() as changes:
        yield watch_attention(changes, fusion)


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
        query, key = unfold_heads(query, heads), unfold_heads(key, heads)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = unfold_heads(attn_mask, heads)
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
    return masked_call(attention.name, turn, side_by_side(query), side_by_side(key), scale / heads, masks)


def _eager_call(attention: FusionAttention, turn: int, softmaxed: list[_Softmax]) -> EagerCall:
    """From what a softmax gets: scores with scale and bias, (B, H, N_q, N_k) or (B * H, N_q, N_k)."""
    scores = [x.scores for x in softmaxed if x.scores.dim() == 4]
    if not scores and attention.heads > 1:
        folded = [x.scores for x in softmaxed if x.scores.dim() == 3 and x.scores.shape[0] % attention.heads == 0]
        scores = [unfold_heads(x, attention.heads) for x in folded]
    if len(scores) != 1 or any(x.dim not in (-1, x.scores.dim() - 1) for x in softmaxed if x.scores.dim() > 2):
        listed = ", ".join(f"{tuple(x.scores.shape)} over dimension {x.dim}" for x in softmaxed)
        raise ValueError(
            f"Expected the eager attention '{attention.name}' to have one softmax, over the last dimension of (batch, "
            f"heads, query tokens, key tokens), but got {listed}. Use its fused attention."
        )
    keep, _ = read_mask(scores[0], scores[0].shape[-1], relative=True)
    assert keep is not None
    return EagerCall(attention.name, scores[0].mean(1), keep, turn)
