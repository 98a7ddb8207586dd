"""What adapts: the projections of one attention module, found by their names."""

import pytest
import torch
from torch import nn

from lightning_abpem.attention.projections import find_attention
from tests.toy import EagerFusedAttention, EagerSplitAttention, FusedAttention, GroupedAttention, TorchAttention


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (FusedAttention(), {"qkv.weight", "qkv.bias"}),
        (EagerFusedAttention(), {"qkv.weight", "qkv.bias"}),
        (EagerSplitAttention(), {f"{n}.{p}" for n in ("query", "key", "value") for p in ("weight", "bias")}),
        (GroupedAttention(), {f"{n}_proj.{p}" for n in "qkv" for p in ("weight", "bias")}),
        (TorchAttention(), {"mha.in_proj_weight", "mha.in_proj_bias"}),
        (TorchAttention(bias=False), {"mha.in_proj_weight"}),
        (TorchAttention(kdim=5), {"mha.in_proj_bias", *(f"mha.{n}_proj_weight" for n in "qkv")}),
        (nn.Sequential(nn.LayerNorm(3), FusedAttention()), {"1.qkv.weight", "1.qkv.bias"}),
    ],
)
def test_what_adapts(module, names):
    parameters = find_attention(module, "fusion.attn").parameters
    assert set(parameters) == {f"fusion.attn.{name}" for name in names}
    own = dict(module.named_parameters(prefix="fusion.attn"))
    assert all(parameters[name] is own[name] for name in parameters)


def test_no_attention():
    with pytest.raises(ValueError, match="'head' to be an attention module.* Linear .*its children: none"):
        find_attention(nn.Linear(3, 3), "head")


def test_several_attentions():
    with pytest.raises(ValueError, match="'fusion' to be one attention module, but it holds 2: 'fusion.0', 'fusion.1'"):
        find_attention(nn.Sequential(FusedAttention(), FusedAttention()), "fusion")


def test_scripted_modules_are_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="'fusion' to be an attention module written in Python, but .* TorchScript"):
        find_attention(scripted, "fusion")
