"""F.multi_head_attention_forward, which keeps its q and k to itself: both are made here from its arguments.

Shapes: B samples, N tokens, D width (all heads side by side), H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_abpem.attention.calls import FusedCall, masked_call, side_by_side
from lightning_abpem.attention.masks import read_mask

__all__ = ["call_multi_head"]

_PARAMETERS = inspect.signature(F.multi_head_attention_forward).parameters
_DEFAULTS = {name: p.default for name, p in _PARAMETERS.items() if p.default is not p.empty}


def call_multi_head(
    name: str, call_index: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, Tensor | None], FusedCall]:
    """Call F.multi_head_attention_forward for the attention `name`, and tell its q and k.

    Self-attention without masks, of which nobody asks the weights, is its plainest form: three lines, done here, that
    project q and k once. In any other form they are projected once more, beside the function.

    Returns:
        what the function returns, (N, B, D) and the weights or None; and its q and k.

    Raises:
        ValueError: if the tokens have no batch dimension.
    """
    given = SimpleNamespace(**(_DEFAULTS | dict(zip(_PARAMETERS, args, strict=False)) | dict(kwargs)))
    if given.query.dim() != 3:
        raise ValueError(f"Expected batched tokens in '{name}', but got queries {tuple(given.query.shape)}.")
    scale = (given.embed_dim_to_check // given.num_heads) ** -0.5 / given.num_heads
    if _is_plain(given):
        q, k, v = F.linear(given.query.transpose(0, 1), given.in_proj_weight, given.in_proj_bias).chunk(3, -1)
        by_head = [x.unflatten(-1, (given.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
        output = F.linear(
            side_by_side(F.scaled_dot_product_attention(*by_head)), given.out_proj_weight, given.out_proj_bias
        )
        return (output.transpose(0, 1), None), FusedCall(name, q, k, scale, call_index=call_index)
    q, k = _project(given)
    call = masked_call(name, call_index, q, k, scale, _read_masks(given, k.shape[1]))
    return F.multi_head_attention_forward(*args, **kwargs), call


def _is_plain(given: SimpleNamespace) -> bool:
    """Return True for self-attention from one weight, with nothing masked, appended, dropped or asked for besides."""
    one = given.query is given.key and given.key is given.value and given.in_proj_weight is not None
    masked = given.key_padding_mask is not None or given.attn_mask is not None
    appended = given.bias_k is not None or given.bias_v is not None or given.add_zero_attn
    dropped = given.training and given.dropout_p > 0
    return one and not (masked or appended or dropped or given.need_weights or given.use_separate_proj_weight)


def _project(given: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return q and k, (B, N, D).

    The key tokens that `bias_k` and `add_zero_attn` append belong to no modality, so nothing needs to be known of them.
    """
    w_q, w_k = given.q_proj_weight, given.k_proj_weight
    if given.in_proj_weight is not None:
        w_q, w_k = given.in_proj_weight.chunk(3)[:2]
    b_q, b_k = (None, None) if given.in_proj_bias is None else given.in_proj_bias.chunk(3)[:2]
    return F.linear(given.query, w_q, b_q).transpose(0, 1), F.linear(given.key, w_k, b_k).transpose(0, 1)


def _read_masks(given: SimpleNamespace, n_keys: int) -> list[tuple[Tensor | None, Tensor | None]]:
    masks = []
    if given.key_padding_mask is not None:
        masks.append(read_mask(_allowed(given.key_padding_mask)[:, None, None], n_keys))
    if given.attn_mask is not None:
        mask = _allowed(given.attn_mask)
        masks.append(read_mask(mask.unflatten(0, (-1, given.num_heads)) if mask.dim() == 3 else mask, n_keys))
    return masks


def _allowed(mask: Tensor) -> Tensor:
    """Return a mask of what to hide, as nn.MultiheadAttention has it, as one of what to keep."""
    return ~mask if mask.dtype == torch.bool else mask
