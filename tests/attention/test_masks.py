"""Reading attention masks, and what they leave of the scores that the softmax sees."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.masks import causal_mask, read_mask
from lightning_abpem.attention.projections import find_attention
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import score_statistics, visible_keys
from tests import reference
from tests.toy import HEADS, SPANS, WIDTH, EagerFusedAttention, heads_first

SAMPLES, TOKENS = 3, 10
PADDED = torch.zeros(SAMPLES, TOKENS, dtype=torch.bool)  # True where padded: text at the end, video at the end
PADDED[0, 5:6] = PADDED[0, 9:] = PADDED[1, 3:6] = True
CAUSAL = torch.ones(TOKENS, TOKENS).tril().bool()
BIAS = torch.linspace(-1, 1, TOKENS * TOKENS).view(TOKENS, TOKENS)
HEAD_BIAS = torch.linspace(-2, 2, HEADS * TOKENS * TOKENS).view(1, HEADS, TOKENS, TOKENS)
NO = float("-inf")
MASKS = {  # as F.scaled_dot_product_attention takes them
    "padding, bool": ~PADDED[:, None, None],
    "padding, additive": torch.zeros(SAMPLES, 1, 1, TOKENS).masked_fill(PADDED[:, None, None], NO),
    "padding, the least value": torch.zeros(SAMPLES, 1, 1, TOKENS).masked_fill(
        PADDED[:, None, None], torch.finfo(torch.float32).min
    ),
    "padding, -10000": torch.zeros(SAMPLES, 1, 1, TOKENS).masked_fill(PADDED[:, None, None], -10000.0),
    "padding, expanded": (~PADDED)[:, None, None].expand(-1, HEADS, TOKENS, -1),
    "padding, -10000 before the scale": torch.zeros(SAMPLES, 1, 1, TOKENS).masked_fill(
        PADDED[:, None, None], -10000.0 * (WIDTH // HEADS) ** -0.5
    ),
    "causal": CAUSAL,
    "causal and padding": CAUSAL & ~PADDED[:, None, None],
    "a bias": BIAS,
    "a bias of each head": HEAD_BIAS,
    "a bias of each key": BIAS[:1],
    "a bias and padding": HEAD_BIAS.masked_fill(PADDED[:, None, None], NO),
    "a bias of each key and padding": BIAS[:1].masked_fill(PADDED[:, None, None], NO),
}


class Masked(EagerFusedAttention):
    """Fused, under the mask; keeps the scores that the softmax sees, written out: (B, H, N, N)."""

    def __init__(self, mask, eager=False, **options):
        super().__init__()
        self.mask, self.eager, self.options = mask, eager, options

    def forward(self, x):
        q, k, v = (heads_first(part) for part in self.qkv(x).chunk(3, dim=-1))
        mask = CAUSAL if self.mask is None else self.mask
        added = torch.zeros(mask.shape).masked_fill(~mask, NO) if mask.dtype == torch.bool else mask
        self.scores = q @ k.mT * q.shape[-1] ** -0.5 + added
        if self.eager:
            return self.proj((self.scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.mask, **self.options).transpose(1, 2).flatten(2))


def naive(scores, m, n, padded=PADDED):
    """Mean and deviation per sample over what is left of a block; None where fewer than two scores are."""
    result = []
    for sample, score_map in enumerate(scores.detach().double().mean(1)):
        gone = padded[sample].tolist()
        values = [
            score_map[i, j].item()
            for i in range(SPANS[m].start, SPANS[m].stop)
            for j in range(SPANS[n].start, SPANS[n].stop)
            if not gone[i] and not gone[j] and score_map[i, j] > -4000
        ]
        block = torch.tensor(values).view(1, 1, -1)
        result.append(reference.block_statistics(block, slice(None), slice(None))[0] if len(values) > 1 else None)
    return result


def check(module, x, padded, form="auto"):
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(x)
    tokens = {name: Tokens(span).without(visible_keys(calls[0])) for name, span in SPANS.items()}
    block = score_statistics(calls[0], tokens, tokens, form)
    for m in SPANS:
        for n in SPANS:
            ours = block(m, n)
            for sample, expected in enumerate(naive(module.scores, m, n, padded)):
                assert ours.seen is None or ours.seen.expand(SAMPLES)[sample] == (expected is not None)
                if expected is not None:
                    assert ours.mean.expand(SAMPLES)[sample].item() == pytest.approx(expected[0], abs=1e-6)
                    assert ours.std.expand(SAMPLES)[sample].item() == pytest.approx(expected[1], abs=1e-6)
            if m != n and (ours.seen is None or ours.seen.any()):
                seen = slice(None) if ours.seen is None else ours.seen
                gradient = torch.autograd.grad(ours.std[seen].sum(), module.qkv.weight, retain_graph=True)[0]
                assert gradient.isfinite().all()
                assert gradient.abs().sum() > 0


@pytest.mark.parametrize("form", ["auto", "dense", "moments"])
@pytest.mark.parametrize("eager", [False, True], ids=["fused", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_scores_are_those_that_the_softmax_sees(name, eager, form):
    torch.manual_seed(0)
    module = Masked(MASKS[name], eager)
    check(module, torch.randn(SAMPLES, TOKENS, WIDTH), PADDED if "padding" in name else PADDED & False, form)


@pytest.mark.parametrize("form", ["auto", "dense", "moments"])
def test_is_causal(form):
    torch.manual_seed(0)
    check(Masked(None, is_causal=True), torch.randn(SAMPLES, TOKENS, WIDTH), PADDED & False, form)


class MultiHead(nn.Module):
    """nn.MultiheadAttention under its masks; keeps the scores written out."""

    def __init__(self, key_padding_mask=None, attn_mask=None, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv.weight, self.qkv.bias = self.mha.in_proj_weight, self.mha.in_proj_bias

    def forward(self, x):
        q, k, _ = (heads_first(part) for part in self.qkv(x).chunk(3, dim=-1))
        self.scores = q @ k.mT * q.shape[-1] ** -0.5
        for name, mask in self.masks.items():
            if mask is not None:
                added = torch.zeros(mask.shape).masked_fill(mask, NO) if mask.dtype == torch.bool else mask
                if name == "key_padding_mask":
                    added = added[:, None, None]
                elif added.dim() == 3:
                    added = added.view(SAMPLES, HEADS, TOKENS, TOKENS)
                self.scores = self.scores + added
        return self.mha(x, x, x, **self.masks)[0]


MULTI_HEAD: dict[str, Any] = {
    "padding": {"key_padding_mask": PADDED},
    "padding, additive": {"key_padding_mask": torch.zeros(PADDED.shape).masked_fill(PADDED, NO)},
    "causal": {"attn_mask": ~CAUSAL},
    "causal and padding": {"attn_mask": ~CAUSAL, "key_padding_mask": PADDED},
    "a bias": {"attn_mask": BIAS},
    "a bias of each head": {"attn_mask": HEAD_BIAS.repeat(SAMPLES, 1, 1, 1).flatten(0, 1)},
    "added key tokens": {"add_zero_attn": True, "add_bias_kv": True},
    "added key tokens and padding": {"key_padding_mask": PADDED, "add_zero_attn": True},
}


class OwnLinear(MultiHead):
    """So that one module owns the projections."""

    def __init__(self, **options):
        super().__init__(**options)
        self.__dict__["qkv"] = self._modules.pop("qkv")


@pytest.mark.parametrize("name", MULTI_HEAD)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_of_multi_head_attention(name):
    torch.manual_seed(0)
    module = OwnLinear(**MULTI_HEAD[name])
    check(module, torch.randn(SAMPLES, TOKENS, WIDTH), PADDED if "padding" in name else PADDED & False)


def said(mask, tokens):
    return [None if x is None else x.tolist() for x in read_mask(mask, tokens)]


def test_what_a_mask_says():
    keep, bias = said(torch.tensor([0.0, 2.0, NO]), 3)
    assert keep == [[[True, True, False]]]
    assert bias == [[[0, 2, 0]]]
    keep, bias = said(torch.tensor([[[[True], [False]]]]), 2)
    assert keep == [[[True, True], [False, False]]]
    assert bias is None
    heads = torch.tensor([[[1.0, NO]], [[3.0, 4.0]]])[None]  # what one head does not see does not count
    keep, bias = said(heads, 2)
    assert keep == [[[True, False]]]
    assert bias == [[[2, 0]]]


def test_a_nan_is_no_mask():
    assert said(torch.tensor([float("nan"), NO]), 2)[0] == [[[True, False]]]


def test_causal_masks_start_at_the_first_token():
    assert causal_mask(2, 3, torch.device("cpu")).tolist() == [[[True, False, False], [True, True, False]]]
