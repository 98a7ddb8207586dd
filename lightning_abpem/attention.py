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
    projected: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
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
            self.calls.append(_multi_head_call(self.attention.name, *args, **kwargs))
        return func(*args, **kwargs)

    def enter(self, *_: Any) -> None:
        self.entered, self.seen = True, len(self.calls)
        self.projected = {linear: [] for linear in self.attention.linears}
        self.__enter__()

    def leave(self, module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
        if not self.entered:
            return
        self.entered = False
        self.__exit__(None, None, None)
        if output is not None and len(self.calls) == self.seen:
            self.calls.extend(_eager_calls(self.attention, list(self.projected.values())))

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.entered:
            self.projected[module].append(output)


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


def _multi_head_call(
    name: str,
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
    *_: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    **__: Any,
) -> AttentionCall:
    """From the arguments of F.multi_head_attention_forward: tokens (N, B, D), projected here once more."""
    _refuse_mask(name, add_zero_attn or any(x is not None for x in (key_padding_mask, attn_mask, bias_k)))
    if query.dim() != 3:
        raise ValueError(f"Expected batched tokens in '{name}', but got queries {tuple(query.shape)}.")
    if in_proj_weight is not None:
        q_proj_weight, k_proj_weight, _v = in_proj_weight.chunk(3)
    assert q_proj_weight is not None
    assert k_proj_weight is not None
    b_q, b_k = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
    q, k = F.linear(query, q_proj_weight, b_q).transpose(0, 1), F.linear(key, k_proj_weight, b_k).transpose(0, 1)
    return AttentionCall(name, q, k, (embed_dim // heads) ** -0.5 / heads, "multi_head")


def _eager_calls(attention: FusionAttention, projected: list[list[Tensor]]) -> Iterator[AttentionCall]:
    """From the outputs of the q and k projections, call by call: (B, N, D) of each, or (B, N, 3D) of one for all."""
    name, owner = attention.name, attention.owner
    if not any(projected):
        return
    if any(not isinstance(getattr(owner, norm, nn.Identity()), nn.Identity) for norm in ("q_norm", "k_norm")):
        raise ValueError(f"'{name}' normalises q and k after projecting them: use its fused attention.")
    if len(projected) == 1:
        linear = attention.linears[0]
        if linear.out_features != 3 * linear.in_features:
            raise ValueError(
                f"Expected the projection of the eager attention '{name}' to make q, k and v side by side, but it maps "
                f"{linear.in_features} to {linear.out_features} values."
            )
        halves = [output.chunk(3, dim=-1) for output in projected[0]]
        projected = [[q for q, _, _ in halves], [k for _, k, _ in halves]]
    for q, k in zip(*projected, strict=True):
        yield AttentionCall(name, q, k, _eager_scale(name, owner, q.shape[-1]), "eager")


def _eager_scale(name: str, owner: nn.Module, width: int) -> float:
    """1 / sqrt(width of a head), over the number of heads."""
    heads = next((getattr(owner, n) for n in _HEADS_NAMES if isinstance(getattr(owner, n, None), int)), None)
    if heads is None:
        raise ValueError(
            f"Expected the eager attention '{name}' to tell its number of heads as one of {', '.join(_HEADS_NAMES)}, "
            f"but {type(owner).__name__} has none of them."
        )
    usual = math.sqrt(heads / width)
    own = getattr(owner, "scale", usual)
    if isinstance(own, float) and not any(math.isclose(own, known, rel_tol=1e-6) for known in (usual, 1 / usual)):
        raise ValueError(
            f"'{name}' has `scale` {own}, which is neither {usual:.6g}, the factor for {heads} heads, nor the divisor "
            f"{1 / usual:.6g}: the scores of eager code cannot be told then. Use its fused attention."
        )
    return usual / heads


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
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks from Python
                continue
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
