"""Attention masks of the usual forms, read for the scores averaged over heads, and calls under them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_abpem.attention.calls import FusedCall, masked_call, side_by_side

__all__ = ["causal_mask", "fused_call", "read_mask"]

_MASKED = -9000.0  # no score, but one of the usual ways to mask one: -inf, the dtype's least value, -10000
_INVISIBLE = -500.0  # so far below the row's largest score that its probability is zero, as -10000 / sqrt(D/H) is


def read_mask(mask: Tensor, keys: int, *, relative: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """Read off a mask which scores it keeps, and what it adds to them on average over heads.

    Args:
        mask: of a shape that expands to (B, H, N_q, N_k): bool, True where a query may attend, or what is added to the
            scores.
        keys: N_k.
        relative: `mask` is the scores themselves, of which those 500 below the row's largest are masked too.

    Returns:
        keep: (B or 1, N_q or 1, N_k) bool, True where every head may attend.
        bias: (B or 1, N_q or 1, N_k), 0 where not kept; None for a bool mask, which adds nothing.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask.expand(*mask.shape[:3], keys)
    if mask.dtype == torch.bool:
        return mask.all(1), None
    hidden = mask <= (_MASKED if relative else _INVISIBLE)
    if relative:
        hidden = hidden | (mask - mask.amax(-1, keepdim=True) <= _INVISIBLE)
    keep = ~hidden.any(1)  # NaN counts as a score, which does not pass unnoticed
    return keep, mask.mean(1).where(keep, 0)


def fused_call(
    name: str,
    call_index: int,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> FusedCall:
    """Make a call from q (B, H, N_q, D/H) and k (B, H or fewer, N_k, D/H), as F.scaled_dot_product_attention has them.

    Args:
        name: the attention module's name.
        call_index: see `FusedCall`.
        query: queries by head.
        key: keys by head; one may serve several heads of queries.
        attn_mask: see `read_mask`.
        is_causal: a query sees no key behind its own place.
        scale: of the scores; 1 / sqrt(D/H) if None.
    """
    heads = query.shape[1]
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    masks = [] if attn_mask is None else [read_mask(attn_mask, key.shape[2])]
    if is_causal:
        masks.append((causal_mask(query.shape[2], key.shape[2], query.device), None))
    return masked_call(name, call_index, side_by_side(query), side_by_side(key), scale / heads, masks)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """F.scaled_dot_product_attention's `is_causal`: (1, N_q, N_k) bool, aligned at the first token."""
    return torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril()
