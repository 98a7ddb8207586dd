"""The calls of a fusion attention, as they are captured: q and k of a fused one, the scores of an eager one.

Shapes: B samples, N tokens, D width (all heads side by side), H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AttentionCall", "EagerCall", "FusedCall", "masked_call", "refuse_nested", "side_by_side"]


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
        call_index: how many calls of this module came before, in this forward.
    """

    name: str
    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None
    keep: Tensor | None = None
    call_index: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N_q, N_k)."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    @property
    def device(self) -> torch.device:
        return self.q.device


@dataclass(frozen=True)
class EagerCall:
    """One call of an eager attention: what its softmax gets, averaged over heads, (B, N_q, N_k), with gradients.

    `name`, `keep` and `call_index` are those of a `FusedCall`; scores that are not kept may be -inf.
    """

    name: str
    scores: Tensor
    keep: Tensor
    call_index: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, N_q, N_k)."""
        return tuple(self.scores.shape)

    @property
    def device(self) -> torch.device:
        return self.scores.device


AttentionCall = FusedCall | EagerCall


def refuse_nested(name: str, *tensors: object) -> None:
    """Refuse nested tensors, whose samples differ in length, for the attention `name`.

    Raises:
        ValueError: if one of them is nested.
    """
    if any(isinstance(x, Tensor) and x.is_nested for x in tensors):
        raise ValueError(
            f"Expected '{name}' to get tensors of (batch, tokens, width), but got a nested one. Pad the samples to one "
            "length (torch.nested.to_padded_tensor), and give the attention a mask of what is padded."
        )


def side_by_side(x: Tensor) -> Tensor:
    """Return (B, H, N, D/H) as (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


def masked_call(
    name: str, call_index: int, q: Tensor, k: Tensor, scale: float, masks: list[tuple[Tensor | None, Tensor | None]]
) -> FusedCall:
    """Make a call under several masks. A bias that all queries share becomes one more feature of the keys."""
    keep = bias = None
    for kept, added in masks:
        if kept is not None:
            keep = kept if keep is None else keep & kept
        if added is not None and added.shape[1] == 1:
            q = torch.cat([q, q.new_ones(*q.shape[:2], 1)], -1)
            k = torch.cat([k, (added.mT / scale).to(k).expand(*k.shape[:2], 1)], -1)
        elif added is not None:
            bias = added if bias is None else bias + added
    return FusedCall(name, q, k, scale, bias, keep, call_index)
