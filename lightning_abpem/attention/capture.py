"""Capturing the scores of a fusion attention, without touching the model.

Scores are wanted before the softmax, with gradients, also where the attention is fused and never materialises them. So
`capture_attention` watches the calls made inside the attention module. `F.scaled_dot_product_attention` and
`F.multi_head_attention_forward` give q and k. Eager code calls neither: there the softmax gives the scores themselves,
with whatever scale, bias or rotation they have. Shapes: B samples, N tokens, D width (all heads side by side), H heads.
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
from torch.utils._pytree import tree_leaves

from lightning_abpem.attention.calls import AttentionCall, EagerCall, FusedCall, refuse_nested
from lightning_abpem.attention.heads import Fold, choose_fold, fitting_folds
from lightning_abpem.attention.masks import fused_call, read_mask
from lightning_abpem.attention.multihead import call_multi_head
from lightning_abpem.attention.projections import FusionAttention, is_projection
from lightning_abpem.modules.patches import Changes

__all__ = ["SOFTMAX", "capture_attention", "softmax_dim", "watch_attention"]


class _Softmax(NamedTuple):
    """A softmax of eager code: what it got, and over which dimension it went."""

    scores: Tensor
    dim: int


def softmax_dim(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the dimension that one of `SOFTMAX` was called with."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return -1 if dim is None else int(dim)


SOFTMAX = frozenset((F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax))
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum}
_PRODUCTS |= {Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm}
_OWN_DIMENSION = "Give the heads a dimension of their own, (batch, heads, tokens, width)."


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Watches one attention module, between its forward pre-hook and its forward hook."""

    attention: FusionAttention
    calls: list[AttentionCall]
    call_index: int = 0
    fused: list[FusedCall] = field(default_factory=list)
    softmaxed: list[_Softmax] = field(default_factory=list)
    projected: list[Tensor] = field(default_factory=list)  # what projections put out
    factors: list[Tensor] = field(default_factory=list)  # of other products, such as v of the last one

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward or func in SOFTMAX:
            refuse_nested(self.attention.name, *args, *kwargs.values())
        if func is F.scaled_dot_product_attention:
            self.fused.append(_fused_call(self.attention.name, self.call_index, self.projected, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            output, call = call_multi_head(self.attention.name, self.call_index, args, kwargs)
            self.fused.append(call)
            return output
        elif func in SOFTMAX:
            self.softmaxed.append(_Softmax(args[0] if args else kwargs["input"], softmax_dim(args, kwargs)))
        output = func(*args, **kwargs)
        if func is F.linear:
            self.projected.append(output)
        elif func in _PRODUCTS:
            self._note_product([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)], output)
        return output

    def _note_product(self, factors: list[Tensor], output: Tensor) -> None:
        """Note a product with a matrix as a projection, and the factors of others."""
        if any(x.dim() == 2 for x in factors[-2:]):  # not what baddbmm adds
            self.projected.append(output)
        else:
            self.factors += [x for x in factors if x.dim() in (3, 4)]

    def note_projection(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Note the output of a module whose name is a projection's: an adapter may be in it, or a convolution."""
        if isinstance(output, Tensor):
            self.projected.append(output)

    def enter(self, *_: object) -> None:
        self._clear()
        self.__enter__()

    def leave(self, module: nn.Module | None = None, args: tuple[object, ...] = (), output: object = None) -> None:
        """End the watch, if it is on: an interrupt may have come before it was, or while it ended."""
        was_on = self in _get_current_function_mode_stack()
        while self in _get_current_function_mode_stack():
            self.__exit__(None, None, None)
        if was_on and output is not None:
            self._refuse_hidden()
            self.calls.extend(self.fused or [self._eager_call()])
            self.call_index += 1
        self._clear()

    def _clear(self) -> None:
        for noted in (self.fused, self.softmaxed, self.projected, self.factors):
            noted.clear()

    def _eager_call(self) -> EagerCall:
        return _eager_call(self.attention.name, self.call_index, self.softmaxed, self.factors, self.projected)

    def _refuse_hidden(self) -> None:
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
        for name, inner in attention.module.named_modules():
            if is_projection(name) and not isinstance(inner, torch.jit.ScriptModule):  # which takes no hooks
                changes.hook(inner, "register_forward_hook", watch.note_projection)
    return calls


@contextmanager
def capture_attention(fusion: Iterable[FusionAttention]) -> Iterator[list[AttentionCall]]:
    """Collect the calls of attention modules while the block lasts; see `watch_attention`."""
    with Changes() as changes:
        yield watch_attention(changes, fusion)


def _fused_call(
    name: str,
    call_index: int,
    projected: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedCall:
    """Make a call from the arguments of F.scaled_dot_product_attention, (B, H, N, D/H) or (B * H, N, D/H)."""
    if query.dim() == 3 and key.shape[0] == query.shape[0]:
        folds = fitting_folds((value, key, query), projected) or {Fold(query.shape[0], 1)}
        fold = choose_fold(name, folds, query, key)
        if attn_mask is not None and attn_mask.dim() == 3 and len(attn_mask) == len(query):
            attn_mask = fold.unfold(attn_mask)
        query, key = fold.unfold(query), fold.unfold(key)
    elif query.dim() != 4:
        raise ValueError(f"Expected queries (batch, heads, tokens, width) in '{name}', but got {tuple(query.shape)}.")
    else:
        _refuse_heads_first(name, query.shape, (value, key, query), projected)
    return fused_call(name, call_index, query, key, attn_mask, is_causal, scale)


def _eager_call(
    name: str, call_index: int, softmaxed: list[_Softmax], factors: list[Tensor], projected: list[Tensor]
) -> EagerCall:
    """Make a call from what a softmax gets: scores with scale and bias, (B, H, N_q, N_k) or (B * H, N_q, N_k)."""
    scores = [x.scores for x in softmaxed if x.scores.dim() == 4]
    for x in scores:
        _refuse_heads_first(name, x.shape, _of_rows(factors, x.shape[:2].numel()), projected)
    if not scores:
        folded = [x.scores for x in softmaxed if x.scores.dim() == 3]
        scores = [own for x in folded if (own := _unfold_scores(name, x, factors, projected)) is not None]
    if len(scores) != 1 or any(x.dim not in (-1, x.scores.dim() - 1) for x in softmaxed if x.scores.dim() > 2):
        listed = ", ".join(f"{tuple(x.scores.shape)} over dimension {x.dim}" for x in softmaxed)
        raise ValueError(
            f"Expected the eager attention '{name}' to have one softmax, over the last dimension of (batch, heads, "
            f"query tokens, key tokens), but got {listed}. Heads in the batch dimension are told from samples where a "
            f"factor of a product holds what its projections put out. {_OWN_DIMENSION} Or use its fused attention."
        )
    keep, _ = read_mask(scores[0], scores[0].shape[-1], relative=True)
    assert keep is not None
    return EagerCall(name, scores[0].mean(1), keep, call_index)


def _unfold_scores(name: str, scores: Tensor, factors: list[Tensor], projected: list[Tensor]) -> Tensor | None:
    """Return (B * H, N_q, N_k) as (B, H, N_q, N_k); None if the values do not tell which rows are whose."""
    folds = fitting_folds(_of_rows(factors, len(scores)), projected) if len(scores) else {Fold(0, 1)}
    return choose_fold(name, folds, scores).unfold(scores) if folds else None


def _of_rows(factors: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Yield the factors of that many matrices, each as it is and transposed, the last one first: it is v."""
    for x in reversed(list(factors)):
        if x.shape[:-2].numel() == rows:
            yield from (x.flatten(0, -3), x.flatten(0, -3).mT)


def _refuse_heads_first(name: str, shape: Sequence[int], folded: Iterable[Tensor], projected: list[Tensor]) -> None:
    """Refuse (heads, batch, ...), which as many samples as heads would hide.

    Raises:
        ValueError: if the values are known to lie like that.
    """
    samples, heads = shape[:2]
    if samples == heads > 1:
        folds = fitting_folds((x.flatten(0, -3) for x in folded), projected)
        if folds == {Fold(samples, heads, heads_first=True)}:
            raise ValueError(
                f"Expected (batch, heads, tokens, ...) in '{name}', but got {tuple(shape)} with the heads ahead of "
                "the batch. Permute what it attends with."
            )
