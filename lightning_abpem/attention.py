"""Capturing the scores of a fusion attention, without touching the model, and their statistics.

Scores are wanted before the softmax, with gradients, also where the attention is fused and never materialises them. So
`capture_attention` watches the calls made inside the attention module: `F.scaled_dot_product_attention` and
`F.multi_head_attention_forward` give q and k, and in eager code, where there are neither, the softmax gives the scores
themselves, with whatever scale, bias or rotation they have. Shapes: B samples, N tokens, D width (all heads side by
side), H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_abpem.functional import (
    ScoreStatistics,
    dense_score_statistics,
    map_statistics,
    moment_score_statistics,
    token_moments,
)
from lightning_abpem.projections import FusionAttention

__all__ = [
    "AttentionCall",
    "EagerCall",
    "FusedCall",
    "capture_attention",
    "list_attention_calls",
    "score_statistics",
]

_MASKED = -9000.0  # no score, but one of the usual ways to mask one: -inf, the dtype's least value, -10000
_SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)


@dataclass(frozen=True)
class FusedCall:
    """One call of a fused attention: q (B, N_q, D) and k (B, N_k, D), heads side by side, with gradients.

    `scale` is the attention's scale divided by the number of heads: ``scale * q @ k.mT`` is the mean over heads of the
    scores that the softmax sees.
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N_q, N_k)."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]


@dataclass(frozen=True)
class EagerCall:
    """One call of an eager attention: what its softmax gets, averaged over heads, (B, N_q, N_k), with gradients."""

    name: str
    scores: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N_q, N_k)."""
        return tuple(self.scores.shape)


AttentionCall = FusedCall | EagerCall


@dataclass
class _Watch(TorchFunctionMode):
    """Watches one attention module, between its forward pre-hook and its forward hook."""

    name: str
    calls: list[AttentionCall]
    fused: list[AttentionCall] = field(default_factory=list)
    softmaxed: list[Tensor] = field(default_factory=list)
    entered: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = object.__hash__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.fused.append(_fused_call(self.name, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self.fused.append(_multi_head_call(self.name, *args, **kwargs))
        elif func in _SOFTMAX:
            self.softmaxed.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    def enter(self, *_: Any) -> None:
        self.entered = True
        self.fused.clear()
        self.softmaxed.clear()
        self.__enter__()

    def leave(self, module: nn.Module | None = None, args: Any = None, output: Any = None) -> None:
        if not self.entered:
            return
        self.entered = False
        self.__exit__(None, None, None)
        if output is not None:
            self.calls.extend(self.fused or [_eager_call(self.name, scores) for scores in self.softmaxed])


@contextmanager
def capture_attention(fusion: Iterable[FusionAttention]) -> Iterator[list[AttentionCall]]:
    """Collect the calls of these attention modules while the block lasts, in the order in which they are made.

    Raises:
        ValueError: at a masked attention, or one whose heads are not a dimension of their own.
    """
    calls: list[AttentionCall] = []
    with ExitStack() as stack:
        for attention in fusion:
            watch = _Watch(attention.name, calls)
            stack.callback(watch.leave)
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
) -> FusedCall:
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
    return FusedCall(name, _side_by_side(query), _side_by_side(key), scale / heads)


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
) -> FusedCall:
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
    return FusedCall(name, q, k, (embed_dim // heads) ** -0.5 / heads)


def _eager_call(name: str, scores: Tensor) -> EagerCall:
    """From what a softmax gets: (B, H, N_q, N_k) scores, scaled and with whatever bias there is."""
    if scores.dim() != 4:
        raise ValueError(
            f"Expected the softmax of the eager attention '{name}' to get (batch, heads, tokens, tokens), but it got "
            f"{tuple(scores.shape)}. Use its fused attention."
        )
    _refuse_mask(name, bool((scores <= _MASKED).any()))
    return EagerCall(name, scores.mean(1))


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
        form: of a fused call: "dense" makes the N x N map; "moments" needs O(D^2) memory; "auto" takes the cheaper
            one, which is "moments" where N > 2D. An eager call has made its map already.
    """
    block = _blocks(call, spans, form)
    statistics = {(m, n): block(m, n) for m in spans for n in spans if m != n}
    with torch.no_grad():
        return statistics | {(n, n): block(n, n) for n in spans}


def _blocks(call: AttentionCall, spans: Mapping[str, slice], form: str) -> Callable[[str, str], ScoreStatistics]:
    """The statistics of a block by its (query, key) modality."""
    if isinstance(call, EagerCall):
        return lambda m, n: map_statistics(call.scores[:, spans[m], spans[n]])
    q, k = ({name: x[:, span] for name, span in spans.items()} for x in (call.q, call.k))
    if form == "dense" or (form == "auto" and call.q.shape[1] <= 2 * call.q.shape[2]):
        return lambda m, n: dense_score_statistics(q[m], k[n], call.scale)
    q_moments, k_moments = ({name: token_moments(x) for name, x in side.items()} for side in (q, k))
    return lambda m, n: moment_score_statistics(q_moments[m], k_moments[n], call.scale)
