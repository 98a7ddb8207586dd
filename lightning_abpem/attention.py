"""Capturing the q and k of a fusion attention, without touching the model, and the statistics of their scores.

Scores are wanted before the softmax, with gradients, also where the attention is fused and never materialises them. So
`capture_attention` watches the calls made inside the attention module (`F.scaled_dot_product_attention` and
`F.multi_head_attention_forward`) and, where there is none because the code is eager, the outputs of the module's own
q and k projections. Shapes: B samples, N tokens, D width (all heads side by side), H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_abpem.functional import (
    ScoreStatistics,
    dense_score_statistics,
    moment_score_statistics,
    token_moments,
)
from lightning_abpem.projections import FusionAttention

__all__ = [
    "AttentionCall",
    "capture_attention",
    "list_attention_calls",
    "score_statistics",
]

_HEADS_NAMES = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head")


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention: q (B, N_q, D) and k (B, N_k, D), heads side by side, with gradients.

    `scale` is the attention's scale divided by the number of heads: ``scale * q @ k.mT`` is the mean over heads of the
    scores that the softmax sees. `kind` is "fused", "multi_head" or "eager".
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float
    kind: str


@dataclass
class _Watch(TorchFunctionMode):
    """Watches one attention module, between its forward pre-hook and its forward hook."""

    attention: FusionAttention
    calls: list[AttentionCall]
    eager: list[Tensor] = field(default_factory=list)
    entered: bool = False
    seen: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = object.__hash__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append(_fused_call(self.attention.name, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self.calls.append(_multi_head_call(self.attention, *args, **kwargs))
        return func(*args, **kwargs)

    def enter(self, *_: Any) -> None:
        self.entered, self.seen = True, len(self.calls)
        self.eager.clear()
        self.__enter__()

    def leave(self, module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
        if not self.entered:
            return
        self.entered = False
        self.__exit__(None, None, None)
        if output is not None and len(self.calls) == self.seen:
            self.calls.extend(_eager_calls(self.attention, self.eager))

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.eager.append(output)


@contextmanager
def capture_attention(fusion: Iterable[FusionAttention]) -> Iterator[list[AttentionCall]]:
    """Collect the calls of these attention modules while the block lasts, in the order in which they are made.

    Raises:
        ValueError: at a masked attention, or an eager one whose scores cannot be told from its projections.
    """
    calls: list[AttentionCall] = []
    with ExitStack() as stack:
        for attention in fusion:
            watch = _Watch(attention, calls)
            stack.callback(watch.leave)
            for linear in attention.linears:
                stack.callback(linear.register_forward_hook(watch.keep).remove)
            stack.callback(attention.module.register_forward_pre_hook(watch.enter).remove)
            stack.callback(attention.module.register_forward_hook(watch.leave, always_call=True).remove)
        yield calls


def _fused_call(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """From the arguments of F.scaled_dot_product_attention: (B, H, N, D/H), or (B, N, D) with a single head."""
    _refuse_mask(name, attn_mask is not None or is_causal)
    if query.dim() == 3:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    if query.dim() != 4:
        raise ValueError(f"Expected queries (batch, heads, tokens, width) in '{name}', but got {tuple(query.shape)}.")
    heads = query.shape[1]
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionCall(name, _side_by_side(query), _side_by_side(key), scale / heads, "fused")


def _side_by_side(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _multi_head_call(attention: FusionAttention, query: Tensor, key: Tensor, *_: Any, **kwargs: Any) -> AttentionCall:
    """From the arguments of F.multi_head_attention_forward: tokens (N, B, D), projected here once more."""
    name, owner = attention.name, attention.owner
    assert isinstance(owner, nn.MultiheadAttention)
    masks = (kwargs.get("key_padding_mask"), kwargs.get("attn_mask"), owner.bias_k)
    _refuse_mask(name, any(mask is not None for mask in masks) or owner.add_zero_attn)
    if query.dim() != 3:
        raise ValueError(f"Expected batched tokens in '{name}', but got queries {tuple(query.shape)}.")
    if owner.in_proj_weight is not None:
        w_q, w_k, _w_v = owner.in_proj_weight.chunk(3)
    else:
        w_q, w_k = owner.q_proj_weight, owner.k_proj_weight
    b_q, b_k = (None, None) if owner.in_proj_bias is None else owner.in_proj_bias.chunk(3)[:2]
    q, k = F.linear(query, w_q, b_q).transpose(0, 1), F.linear(key, w_k, b_k).transpose(0, 1)
    return AttentionCall(name, q, k, owner.head_dim**-0.5 / owner.num_heads, "multi_head")


def _eager_calls(attention: FusionAttention, outputs: list[Tensor]) -> Iterator[AttentionCall]:
    """From the outputs of the q and k projections: (B, N, D), or (B, N, 3D) where one linear makes q, k and v."""
    name, owner = attention.name, attention.owner
    if any(isinstance(getattr(owner, norm, None), nn.Module) and not isinstance(getattr(owner, norm), nn.Identity)
           for norm in ("q_norm", "k_norm")):  # fmt: skip
        raise ValueError(f"'{name}' normalises q and k after projecting them: use its fused attention.")
    heads = next((getattr(owner, n) for n in _HEADS_NAMES if isinstance(getattr(owner, n, None), int)), None)
    if heads is None:
        raise ValueError(
            f"Expected the eager attention '{name}' to tell its number of heads as one of {', '.join(_HEADS_NAMES)}, "
            f"but {type(owner).__name__} has none of them."
        )
    if len(attention.linears) == 1:
        pairs = [output.chunk(3, dim=-1)[:2] for output in outputs]
    else:
        pairs = list(zip(outputs[::2], outputs[1::2], strict=True))
    for q, k in pairs:
        own_scale = getattr(owner, "scale", None)
        scale = own_scale if isinstance(own_scale, float) else math.sqrt(heads / q.shape[-1])
        yield AttentionCall(name, q, k, scale / heads, "eager")


def list_attention_calls(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Every fused or multi-head attention call during `forward()`: the module it was made in and its token counts."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    inside: list[str] = []
    seen: list[str] = []

    class Lister(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
                token_dim = -2 if func is F.scaled_dot_product_attention else 0
                q = args[0] if args else kwargs["query"]
                k = args[1] if len(args) > 1 else kwargs["key"]
                seen.append(f"{inside[-1]} ({q.shape[token_dim]} query and {k.shape[token_dim]} key tokens)")
            return func(*args, **kwargs)

    def enter(module: nn.Module, args: Any) -> None:
        inside.append(names[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        inside.append(names[id(model)])
        with Lister():
            forward()
    return seen


def _refuse_mask(name: str, masked: bool) -> None:
    if masked:
        raise ValueError(f"'{name}' attends under a mask (or with added key tokens), which is not supported yet.")


# ------------------------------------------------------------------------------------------------- score statistics


def score_statistics(
    call: AttentionCall, spans: Mapping[str, slice], form: str = "auto"
) -> dict[tuple[str, str], ScoreStatistics]:
    """Statistics of every block of a call's head-averaged scores, by (query, key) modality; self blocks detached.

    Args:
        form: "dense" makes the N x N map; "moments" needs O(D^2) memory; "auto" takes the cheaper one, which is
            "moments" where N > 2D.
    """
    if form == "auto":
        form = "moments" if call.q.shape[1] > 2 * call.q.shape[2] else "dense"
    prepare = token_moments if form == "moments" else lambda tokens: tokens
    combine: Any = partial(moment_score_statistics if form == "moments" else dense_score_statistics, scale=call.scale)
    q = {m: prepare(call.q[:, span]) for m, span in spans.items()}
    k = {n: prepare(call.k[:, span]) for n, span in spans.items()}
    blocks = {(m, n): combine(q[m], k[n]) for m in spans for n in spans if m != n}
    with torch.no_grad():
        return blocks | {(n, n): combine(q[n].detach(), k[n].detach()) for n in spans}
