"""One attention written in many ways: the weights of its q and k, and the names of what adapts in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.toy import (
    HEADS,
    WIDTH,
    EagerFusedAttention,
    EagerSplitAttention,
    FusedAttention,
    GroupedAttention,
    TorchAttention,
)


class Variant(NamedTuple):
    """An attention; from it to the weights and biases of q and k, for `HEADS` heads; what adapts."""

    make: Callable[[], nn.Module]
    weights: Callable[[Any], Any]
    adapting: set[str]


def fused_weights(module):
    return module.qkv.weight.chunk(3)[:2], module.qkv.bias.chunk(3)[:2]


def split_weights(module):
    return (module.query.weight, module.key.weight), (module.query.bias, module.key.bias)


def torch_weights(module):
    mha = module.mha
    weights = (
        mha.in_proj_weight.chunk(3)[:2] if mha.in_proj_weight is not None else (mha.q_proj_weight, mha.k_proj_weight)
    )
    biases = (torch.zeros(WIDTH), torch.zeros(WIDTH)) if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)[:2]
    return weights, biases


def grouped_weights(module):
    weights = (module.q_proj.weight, module.k_proj.weight.repeat(HEADS, 1))
    return weights, (module.q_proj.bias, module.k_proj.bias.repeat(HEADS))


def separate_weights():
    module = TorchAttention(kdim=WIDTH, vdim=WIDTH)
    own: Any = module.mha
    own._qkv_same_embed_dim, own.in_proj_weight = False, None
    for name in ("q", "k", "v"):
        setattr(module.mha, f"{name}_proj_weight", nn.Parameter(torch.randn(WIDTH, WIDTH)))
    return module


def linears(*names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


TORCH = {"mha.in_proj_weight", "mha.in_proj_bias"}
VARIANTS = {
    "fused": Variant(FusedAttention, fused_weights, linears("qkv")),
    "fused with a scale": Variant(lambda: FusedAttention(scale=0.7), fused_weights, linears("qkv")),
    "eager, fused qkv": Variant(EagerFusedAttention, fused_weights, linears("qkv")),
    "eager, split qkv": Variant(EagerSplitAttention, split_weights, linears("query", "key", "value")),
    "grouped query": Variant(GroupedAttention, grouped_weights, linears("q_proj", "k_proj", "v_proj")),
    "torch": Variant(TorchAttention, torch_weights, TORCH),
    "torch with weights": Variant(lambda: TorchAttention(need_weights=True), torch_weights, TORCH),
    "torch, tokens first": Variant(lambda: TorchAttention(batch_first=False), torch_weights, TORCH),
    "torch without bias": Variant(lambda: TorchAttention(bias=False), torch_weights, {"mha.in_proj_weight"}),
    "torch, separate weights": Variant(
        separate_weights, torch_weights, {"mha.in_proj_bias", *(f"mha.{name}_proj_weight" for name in "qkv")}
    ),
}
