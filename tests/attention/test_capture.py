"""Capturing q and k from attention written in many ways, against the same attention written out naively."""

from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_abpem.attention.calls import EagerCall, FusedCall
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.projections import find_attention
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import score_statistics
from lightning_abpem.attention.trace import trace_attention
from tests import reference
from tests.attention.variants import VARIANTS
from tests.toy import HEADS, SPANS, WIDTH, EagerFusedAttention, EagerSplitAttention, FusedAttention, heads_first

TOKENS = {name: Tokens(span) for name, span in SPANS.items()}


@pytest.fixture(params=VARIANTS)
def variant(request):
    torch.manual_seed(0)
    make, weights, _ = VARIANTS[request.param]
    module = make().eval()
    return module, weights(module)


def naive_scores(x, weights, scale):
    (w_q, w_k), (b_q, b_k) = weights
    return reference.mean_scores(x @ w_q.T + b_q, x @ w_k.T + b_k, HEADS, scale)


@pytest.mark.parametrize("form", ["auto", "dense", "moments"])
def test_captured_statistics_are_the_naive_ones(variant, form):
    module, weights = variant
    x = torch.randn(2, 10, WIDTH)
    with torch.no_grad():
        scores = naive_scores(x, weights, getattr(module, "scale", None))
        plain = module(x)
    with capture_attention([find_attention(module, "attn")]) as calls:
        output = module(x)
    assert torch.equal(output, plain)
    assert len(calls) == 1
    block = score_statistics(calls[0], TOKENS, TOKENS, form)
    for m, n in product(SPANS, repeat=2):
        ours = block(m, n)[:2]
        expected = torch.tensor(reference.block_statistics(scores, SPANS[m], SPANS[n]))
        torch.testing.assert_close(torch.stack(tuple(ours), dim=1).detach(), expected, rtol=0, atol=1e-6)


def test_gradients_reach_the_projections_of_q_and_k_alone(variant):
    module, _ = variant
    attention = find_attention(module, "attn")
    with capture_attention([attention]) as calls:
        module(torch.randn(2, 10, WIDTH))
    block = score_statistics(calls[0], TOKENS, TOKENS)
    torch.stack([x.sum() for m, n in permutations(SPANS, 2) for x in block(m, n)[:2]]).sum().backward()
    reached = {f"attn.{name}" for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached
    assert reached <= set(attention.parameters)
    for parameter in (p for name, p in attention.parameters.items() if name in reached):
        if parameter.shape[0] == 3 * WIDTH:  # fused: the rows of v
            assert parameter.grad is not None
            assert parameter.grad[2 * WIDTH :].abs().sum() == 0


def test_nothing_is_left_behind(variant):
    module, _ = variant

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]

    with pytest.raises(RuntimeError), capture_attention([find_attention(module, "attn")]):
        module(torch.randn(2, 10, WIDTH + 1))
    assert not any(hooks())
    assert not torch.overrides._get_current_function_mode_stack()


def test_calls_outside_the_module_are_not_captured():
    inside, outside = FusedAttention(), FusedAttention()
    x = torch.randn(2, 10, WIDTH)
    with capture_attention([find_attention(inside, "inside")]) as calls:
        outside(x)
        inside(x)
        outside(x)
    assert [call.name for call in calls] == ["inside"]


class EagerVariant(EagerFusedAttention):
    """Eager attention as others write it: returns its output and keeps the scores that its softmax got."""

    def __init__(self, scores, layout=lambda x: x.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)):
        super().__init__()
        self.own_scores, self.layout = scores, layout

    def forward(self, x):
        q, k, v = self.layout(self.qkv(x))
        self.scores = self.own_scores(q, k)
        p = nn.functional.softmax(self.scores, dim=-1)
        return self.proj((p @ v).transpose(1, 2).flatten(2))


BIAS = torch.linspace(-1, 1, 100).view(1, 1, 10, 10)
EAGER = {
    "divided by sqrt(d)": EagerVariant(lambda q, k: q @ k.mT / 2),
    "no scale, as in T5": EagerVariant(lambda q, k: q @ k.mT),
    "normalised q and k": EagerVariant(lambda q, k: 5 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT),
    "with a bias": EagerVariant(lambda q, k: q @ k.mT / 2 + BIAS),
    "rotated": EagerVariant(lambda q, k: q.roll(1, -1) @ (k * torch.linspace(0.5, 2, 4)).mT),
    "interleaved per head": EagerVariant(
        lambda q, k: q @ k.mT / 2, lambda x: x.unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
    ),
}


@pytest.mark.parametrize("module", EAGER.values(), ids=EAGER)
def test_eager_scores_are_those_that_the_softmax_sees(module):
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(torch.randn(2, 10, WIDTH))
    assert len(calls) == 1
    assert isinstance(calls[0], EagerCall)
    torch.testing.assert_close(calls[0].scores, module.scores.mean(1))
    torch.stack([x.sum() for x in score_statistics(calls[0], TOKENS, TOKENS)("audio", "video")[:2]]).sum().backward()
    assert module.qkv.weight.grad.abs().sum() > 0


def softmax_of(make):
    """An eager attention with its own softmax or softmaxes."""
    module = EagerSplitAttention()
    module.forward = lambda x: make(*(heads_first(linear(x)) for linear in (module.query, module.key, module.value)))
    return module


UNCLEAR = {
    "heads folded, of another number": lambda q, k, v: (q.flatten(1, 2) @ k.flatten(1, 2).mT).softmax(-1),
    "over the queries": lambda q, k, v: (k @ q.mT).softmax(-2),
    "over the queries, by name": lambda q, k, v: torch.softmax((k @ q.mT), dim=2),
    "two": lambda q, k, v: (q @ k.mT).softmax(-1) * (k @ q.mT).softmax(-1),
}


@pytest.mark.parametrize("make", UNCLEAR.values(), ids=UNCLEAR)
def test_softmaxes_that_say_too_little_are_refused(make):
    module = softmax_of(make)
    module.num_attention_heads = 4
    message = "'attn' to have one softmax, over the last dimension of .batch, heads, query tokens, key tokens., but got"
    with pytest.raises(ValueError, match=message), capture_attention([find_attention(module, "attn")]):
        module(torch.randn(2, 10, WIDTH))


def test_a_gate_beside_the_attention_is_none():
    module = softmax_of(lambda q, k, v: (q @ k.mT).softmax(-1) @ v * v.mean((1, 2)).softmax(-1)[:, None, None])
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(torch.randn(2, 10, WIDTH))
    assert len(calls) == 1


def test_nested_tensors_are_refused_by_the_attentions_name():
    module = softmax_of(F.scaled_dot_product_attention)
    clips = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(2, WIDTH)], layout=torch.jagged)

    def heads(linear):
        return linear(clips).unflatten(-1, [HEADS, 4]).transpose(1, 2)

    module.forward = lambda x: F.scaled_dot_product_attention(*map(heads, (module.query, module.key, module.value)))
    message = "'attn' to get tensors of .batch, tokens, width., but got a nested one. Pad the samples"
    with pytest.raises(ValueError, match=message), capture_attention([find_attention(module, "attn")]):
        module(clips)
    with pytest.raises(ValueError, match=message):
        trace_attention(nn.ModuleDict({"attn": module}), lambda: module(clips))


def test_a_forward_may_keep_its_own_gradients():
    """As Grad-CAM does: a map that is kept, and asked for its gradient."""

    def attend(q, k, v):
        kept.append(scores := (q @ k.mT * 0.5).softmax(-1))
        if scores.requires_grad:
            scores.retain_grad()
        return scores @ v

    kept: list[Tensor] = []
    module = softmax_of(attend)
    with capture_attention([find_attention(module, "attn")]) as calls:
        output = module(torch.randn(2, 10, WIDTH))
    assert isinstance(calls[0], EagerCall)
    (output.sum() + calls[0].scores.sum()).backward()
    assert kept[0].grad is not None


class PooledHead(nn.Module):
    """Own linears, given to F.multi_head_attention_forward as weights."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        x = x.transpose(0, 1)
        linears = (self.q_proj, self.k_proj, self.v_proj)
        return F.multi_head_attention_forward(
            *(x, x, x, WIDTH, HEADS, None, torch.cat([linear.bias for linear in linears]), None, None, False, 0.0),
            *(self.c_proj.weight, self.c_proj.bias),
            use_separate_proj_weight=True,
            training=False,
            need_weights=False,
            **{f"{name}_weight": getattr(self, name).weight for name in ("q_proj", "k_proj", "v_proj")},
        )[0].transpose(0, 1)


def test_multi_head_attention_with_weights_of_other_modules():
    torch.manual_seed(0)
    module, x = PooledHead(), torch.randn(2, 10, WIDTH)
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(x)
    assert isinstance(calls[0], FusedCall)
    torch.testing.assert_close(calls[0].q, module.q_proj(x))
    torch.testing.assert_close(calls[0].k, module.k_proj(x))
    torch.stack([x.sum() for x in score_statistics(calls[0], TOKENS, TOKENS)("audio", "video")[:2]]).sum().backward()
    for own in module.q_proj.parameters():
        assert own.grad is not None
        assert own.grad.abs().sum() > 0


class FusedVariant(EagerVariant):
    """The same, given to F.scaled_dot_product_attention: q and k as the user's function makes them."""

    def __init__(self, prepare, scale=None):
        super().__init__(None)
        self.prepare, self.scale = prepare, scale

    def forward(self, x):
        q, k, v = self.layout(self.qkv(x))
        q, k = self.prepare(q), self.prepare(k)
        self.scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


def rotate(x):
    """Rotary positions: pairs of features turned by an angle that grows with the position."""
    angles = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1])
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


FUSED = {
    "normalised q and k": FusedVariant(lambda x: F.layer_norm(x, x.shape[-1:])),
    "normalised q and k, own scale": FusedVariant(lambda x: F.normalize(x, dim=-1), scale=5.0),
    "rotary positions": FusedVariant(rotate),
}


@pytest.mark.parametrize("module", FUSED.values(), ids=FUSED)
def test_fused_scores_are_those_that_the_softmax_sees(module):
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(torch.randn(2, 10, WIDTH))
    assert isinstance(calls[0], FusedCall)
    scores = calls[0].scale * calls[0].q @ calls[0].k.mT
    torch.testing.assert_close(scores, module.scores.mean(1), rtol=0, atol=1e-6)
    torch.stack([x.sum() for x in score_statistics(calls[0], TOKENS, TOKENS)("audio", "video")[:2]]).sum().backward()
    assert module.qkv.weight.grad[: 2 * WIDTH].abs().sum() > 0


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_keys_of_another_width(need_weights, batch_first):
    """Cross-attention with `kdim`: the key modality's tokens are wider."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(WIDTH, HEADS, kdim=20, vdim=20, batch_first=batch_first)
    x, context = torch.randn(2, 4, WIDTH), torch.randn(2, 6, 20)
    tokens_first = [y if batch_first else y.transpose(0, 1) for y in (x, context, context)]
    with capture_attention([find_attention(mha, "cross")]) as calls:
        mha(*tokens_first, need_weights=need_weights)
    b_q, b_k, _ = mha.in_proj_bias.chunk(3)
    expected = reference.mean_scores(x @ mha.q_proj_weight.T + b_q, context @ mha.k_proj_weight.T + b_k, HEADS)
    ours = score_statistics(calls[0], {"text": Tokens(slice(None))}, {"sound": Tokens(slice(None))})("text", "sound")
    naive = torch.tensor(reference.block_statistics(expected, slice(None), slice(None)))
    torch.testing.assert_close(torch.stack(ours[:2], 1).detach(), naive, rtol=0, atol=1e-6)
