"""Heads and frames folded into the batch, in every order, against ABPEM written out by hand in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.attention.calls import EagerCall, FusedCall
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.heads import Fold, fitting_folds
from lightning_abpem.attention.projections import find_attention
from tests import reference
from tests.toy import AUDIO, CLASSES, HEADS, MODALITIES, PAPER, SPANS, VIDEO, WIDTH, Toy, batches

FRAMES, RATE = 3, 0.5


def by_sample(x):
    return x.transpose(1, 2).flatten(0, 1)


def by_head(x):
    return x.permute(2, 0, 1, 3).flatten(0, 1)


def by_cat(x):
    return torch.cat(x.unbind(2))


FOLDS = {"batch-major": by_sample, "heads-first": by_head, "heads behind one another": by_cat}


def attend_fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def attend_with_bmm(q, k, v):
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5, -1), v)


def attend_with_baddbmm(q, k, v):
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1) @ v


def attend_with_einsum(q, k, v):
    p = torch.einsum("bnd,bmd->bnm", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("bnm,bmd->bnd", p, v)


ATTENDS = {"fused": attend_fused, "bmm": attend_with_bmm, "baddbmm": attend_with_baddbmm, "einsum": attend_with_einsum}


class Folded(nn.Module):
    """q, k and v with the heads folded into the batch; `heads` is what it declares."""

    def __init__(self, fold=by_sample, attend=attend_fused):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fold, self.attend = fold, attend

    def project(self, x):
        return [linear(x).unflatten(-1, (HEADS, -1)) for linear in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, x):
        out = self.attend(*map(self.fold, self.project(x)))
        if self.fold is by_sample:
            return out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)
        return out.unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)


def make(attention):
    torch.manual_seed(0)
    attention.load_state_dict({name: torch.randn_like(p) / 3 for name, p in attention.state_dict().items()})
    return Toy(attention).double().eval()


def stream(count=6, size=4):
    return [tuple(x.double() for x in batch) for batch in batches(count, size)]


# -------------------------------------------------------------------------------------------------------- by hand


def step_by_hand(model, tokens):
    """Logits and ABPEM's loss, equation by equation, one head after the other."""
    attn, x = model.fusion[0].attn, model.fusion[0].norm(tokens)
    q, k, v = (linear(x) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    size = WIDTH // HEADS
    columns = [slice(h * size, (h + 1) * size) for h in range(HEADS)]
    scores = [q[..., own] @ k[..., own].mT / size**0.5 for own in columns]
    out = torch.cat([own_scores.softmax(-1) @ v[..., own] for own_scores, own in zip(scores, columns, strict=True)], -1)
    logits, mean = model.head((tokens + out).mean(1)), sum(scores) / HEADS
    p = logits.softmax(-1)
    top, marginal = p.topk(2).values, p.mean(0)
    loss = -(top * (top + 1e-6).log()).sum(-1).mean() + (marginal * marginal.log()).sum()
    for m, n in (("audio", "video"), ("video", "audio")):
        cross, own = mean[:, SPANS[m], SPANS[n]].flatten(1), mean[:, SPANS[n], SPANS[n]].flatten(1).detach()
        normal = [torch.distributions.Normal(block.mean(1), block.std(1)) for block in (cross, own)]
        loss = loss + torch.distributions.kl_divergence(*normal).mean()
    return logits, loss


def adapt_by_hand(model, data, memory):
    """Logits and losses: one step of plain SGD for each batch, then its prediction."""
    moving = [p for name, p in model.named_parameters() if "_proj." in name]
    stored, predictions, losses = [], [], []
    for audio, video in data:
        tokens = torch.cat([model.audio(audio), model.video(video)], 1).detach()
        stored.append(tokens)
        _, loss = step_by_hand(model, torch.cat(stored[-memory:]))
        gradients = torch.autograd.grad(loss, moving)
        with torch.no_grad():
            for p, gradient in zip(moving, gradients, strict=True):
                p -= RATE * gradient
            predictions.append(step_by_hand(model, tokens)[0])
        losses.append(loss.detach())
    return torch.stack(predictions), torch.stack(losses)


def adapt(model, data, memory=1, fusion="fusion.0.attn", **options):
    abpem = ABPEM(fusion, MODALITIES, memory_batches=memory, optimizer=sgd, **(PAPER | options))
    with abpem.attach(model.eval()) as adaptation, torch.no_grad():
        seen = [(model(*args), adaptation.record["loss"]) for args in data]
    logits, losses = zip(*seen, strict=True)
    return torch.stack(logits), torch.stack(losses)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE)


def check(ours, by_hand):
    for own, expected in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("memory", [1, 4])
@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS)
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_folded_heads_adapt_as_by_hand(fold, attend, memory):
    ours = adapt(make(Folded(fold, attend)), stream(), memory)
    check(ours, adapt_by_hand(make(Folded()), stream(), memory))


# ---------------------------------------------------------------------------------------------------------- frames


class Frames(nn.Module):
    """Clips of several frames, folded into the batch ahead of the model; logits for each frame or for each clip."""

    def __init__(self, toy, time_major, per_clip=False):
        super().__init__()
        self.toy, self.time_major, self.per_clip = toy, time_major, per_clip

    def forward(self, audio, video):
        logits = self.toy(*(frames(x, self.time_major) for x in (audio, video)))
        if not self.per_clip:
            return logits
        return logits.view(FRAMES, -1, CLASSES).mean(0) if self.time_major else logits.view(-1, FRAMES, CLASSES).mean(1)


def frames(x, time_major):
    return (x.transpose(0, 1) if time_major else x).flatten(0, 1)


def clips(count=6, size=2):
    return [tuple(x.unflatten(0, (size, FRAMES)) for x in batch) for batch in stream(count, size * FRAMES)]


@pytest.mark.parametrize("memory", [1, 4])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("time_major", [True, False])
def test_frames_that_are_samples_adapt_as_by_hand(time_major, fold, memory):
    ours = adapt(Frames(make(Folded(fold)), time_major), clips(), memory, "toy.fusion.0.attn")
    flat = [tuple(frames(x, time_major) for x in batch) for batch in clips()]
    check(ours, adapt_by_hand(make(Folded()), flat, memory))


@pytest.mark.parametrize("memory", [1, 4])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("time_major", [True, False])
def test_frames_of_one_prediction_are_refused(time_major, fold, memory):
    model = Frames(make(Folded(fold)), time_major, per_clip=True)
    fault = "attend with 2 samples, .* but got 6.* logits for each frame" if memory == 1 else "6 current samples"
    with pytest.raises(ValueError, match=f"Expected .*{fault}"):
        adapt(model, clips(), memory, "toy.fusion.0.attn")


class FoldingFrames(Folded):
    """Folds frames as well as heads: each frame's tokens attend to each other alone."""

    order = "tbh"

    def forward(self, x):
        sizes = {"t": 2, "b": len(x), "h": HEADS}
        axes = {"b": 0, "t": 1, "h": 3}
        q, k, v = (part.unflatten(1, (2, -1)) for part in self.project(x))  # (B, T, N, H, d)
        q, k, v = (y.permute(*(axes[name] for name in self.order), 2, 4).flatten(0, 2) for y in (q, k, v))
        out = self.attend(q, k, v).unflatten(0, [sizes[name] for name in self.order])
        back = [self.order.index("b"), self.order.index("t"), 3, self.order.index("h"), 4]
        return out.permute(*back).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("attend", ATTENDS.values(), ids=ATTENDS)
@pytest.mark.parametrize("order", ["tbh", "bth", "htb", "thb", "bht"])
def test_frames_folded_inside_the_attention_are_refused(order, attend):
    attention: Any = FoldingFrames(attend=attend)
    attention.order, attention.num_heads = order, HEADS
    with pytest.raises(ValueError, match=r"Expected .*'fusion.0.attn' to .*"):
        adapt(make(attention), stream(1))


def test_frames_that_pass_for_heads_are_none():
    """As many frames as declared heads, each as wide as a head would be: they are not averaged over."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(3))
            self.proj, self.num_heads = nn.Linear(WIDTH // HEADS, WIDTH), HEADS

        def forward(self, x):
            return self.proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))

    assert FRAMES == HEADS
    with pytest.raises(ValueError, match="to attend with 2 samples, .* but got 6"):
        adapt(Frames(make(Narrow()), time_major=True, per_clip=True), clips(), fusion="toy.fusion.0.attn")


# ----------------------------------------------------------------------------------------------- what the order says


def captured_scores(module, x):
    """Scores averaged over heads, as captured and as by hand."""
    with capture_attention([find_attention(module, "attn")]) as calls, torch.no_grad():
        module(x)
    (call,) = calls
    ours = call.scores if hasattr(call, "scores") else call.scale * call.q @ call.k.mT
    return ours, reference.mean_scores(module.q_proj(x), module.k_proj(x), HEADS)


@pytest.mark.parametrize("fold", [by_sample, by_head])
def test_scores_that_are_folded_alone(fold):
    """The factors of the product have heads of their own, and the softmax gets three dimensions."""

    def attend(q, k, v):
        p = (q @ k.mT * q.shape[-1] ** -0.5).flatten(0, 1).softmax(-1)
        return (p.unflatten(0, q.shape[:2]) @ v).flatten(0, 1)

    module = make(Folded(lambda x: fold(x).unflatten(0, (4, HEADS) if fold is by_sample else (HEADS, 4)), attend))
    torch.testing.assert_close(*captured_scores(module.fusion[0].attn, torch.randn(4, 10, WIDTH).double()))


@pytest.mark.parametrize("attend", [attend_fused, attend_with_bmm])
def test_one_head_without_a_dimension(attend):
    class Single(Folded):
        def forward(self, x):
            return self.attend(*(part.flatten(2) for part in self.project(x)))

    module, x = make(Single(attend=attend)).fusion[0].attn, torch.randn(4, 10, WIDTH).double()
    ours, _ = captured_scores(module, x)
    torch.testing.assert_close(ours, reference.mean_scores(module.q_proj(x), module.k_proj(x), 1))


@pytest.mark.parametrize("attend", [attend_fused, attend_with_bmm])
@pytest.mark.parametrize("fold", [by_sample, by_head])
@pytest.mark.parametrize("samples", [1, 2, HEADS, 4])
def test_samples_that_are_alike(samples, fold, attend):
    """Copies of one sample: the heads tell the order."""
    module = make(Folded(fold, attend)).fusion[0].attn
    x = torch.randn(1, 10, WIDTH, dtype=torch.float64).expand(samples, -1, -1)
    torch.testing.assert_close(*captured_scores(module, x))


@pytest.mark.parametrize("attend", [attend_fused, attend_with_bmm])
@pytest.mark.parametrize("fold", [by_sample, by_head])
def test_a_silent_projection_tells_nothing_and_the_others_do(fold, attend):
    module = make(Folded(fold, attend)).fusion[0].attn
    with torch.no_grad():
        module.v_proj.weight.zero_()
        module.v_proj.bias.zero_()
    torch.testing.assert_close(*captured_scores(module, torch.randn(4, 10, WIDTH, dtype=torch.float64)))


class Rotated(Folded):
    """q and k are turned and normalised once their heads are folded, so that v alone tells the order."""

    def forward(self, x):
        q, k, v = map(self.fold, self.project(x))
        q, k = (F.layer_norm(y.roll(1, -1) * torch.linspace(0.5, 2, y.shape[-1]).to(y), y.shape[-1:]) for y in (q, k))
        self.expected = q @ k.mT * q.shape[-1] ** -0.5
        out = self.attend(q, k, v)
        return out if self.fold is by_head else out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attend", [attend_fused, attend_with_bmm])
@pytest.mark.parametrize("fold", [by_sample, by_head])
def test_one_of_the_three_is_enough(fold, attend):
    module = make(Rotated(by_sample, attend)).fusion[0].attn
    module.fold = fold
    ours, _ = captured_scores(module, torch.randn(4, 10, WIDTH, dtype=torch.float64))
    sizes = (4, HEADS) if fold is by_sample else (HEADS, 4)
    torch.testing.assert_close(ours, module.expected.unflatten(0, sizes).mean(1 if fold is by_sample else 0))


def test_what_cannot_be_told_is_refused():
    module = make(Rotated()).fusion[0].attn
    with torch.no_grad():
        module.v_proj.weight.zero_()
        module.v_proj.bias.zero_()
    x = torch.randn(4, 10, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="'attn' .*q, k and v hold the same values under .* a dimension of their own"):
        captured_scores(module, x)
    captured_scores(module, x[:1])  # of one sample there is one order


@pytest.mark.parametrize("attend", [attend_fused, attend_with_bmm])
def test_values_that_no_projection_puts_out_are_refused(attend):
    module = Rotated(attend=lambda q, k, v: attend(q, k, 2 * v))
    message = {
        attend_fused: "4 samples, .* but got 12.* give the heads one of their own",
        attend_with_bmm: "'fusion.0.attn' .* holds what its projections.* a dimension of their own",
    }
    with pytest.raises(ValueError, match=message[attend]):
        adapt(make(module), stream(1))


def test_nan_is_a_value_like_others():
    module = make(Folded(by_head)).fusion[0].attn
    x = torch.randn(4, 10, WIDTH, dtype=torch.float64)
    x[1, 3] = float("nan")
    ours, expected = captured_scores(module, x)
    torch.testing.assert_close(ours, expected, equal_nan=True)


class Merged(nn.Module):
    """One linear for q, k and v, whose columns lie as `order` says: k(ind), h(ead), w(idth)."""

    def __init__(self, order, functional):
        super().__init__()
        self.qkv, self.order, self.functional = nn.Linear(WIDTH, 3 * WIDTH), order, functional

    def parts(self, x):
        sizes = {"k": 3, "h": HEADS, "w": WIDTH // HEADS}
        y = x @ self.qkv.weight.T if self.functional else self.qkv(x)
        y = y.unflatten(-1, [sizes[name] for name in self.order])
        return y.permute(2 + self.order.index("k"), 0, 1, 2 + self.order.index("h"), 2 + self.order.index("w"))

    def forward(self, x):
        return F.scaled_dot_product_attention(*map(by_head, self.parts(x)))


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("order", ["khw", "hkw", "kwh", "wkh", "hwk", "whk"])
def test_columns_in_any_order(order, functional):
    torch.manual_seed(0)
    module, x = Merged(order, functional), torch.randn(4, 10, WIDTH)
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(x)
    q, k, _ = module.parts(x)
    assert isinstance(calls[0], FusedCall)
    torch.testing.assert_close(calls[0].q, q.flatten(2))
    torch.testing.assert_close(calls[0].k, k.flatten(2))


class TokensFirst(nn.Module):
    """As fairseq has it: (tokens, batch, width), and as many tokens as samples."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y(x).view(len(x), -1, WIDTH // HEADS).transpose(0, 1) for y in linears)
        return torch.bmm(torch.softmax(torch.bmm(q * 0.5, k.mT), -1), v)


def test_tokens_ahead_of_the_batch():
    torch.manual_seed(0)
    module, x = TokensFirst(), torch.randn(6, 6, WIDTH)
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(x)
    q, k = (linear(x.transpose(0, 1)) for linear in (module.q_proj, module.k_proj))
    assert isinstance(calls[0], EagerCall)
    torch.testing.assert_close(calls[0].scores.double(), reference.mean_scores(q, k, HEADS))


class Pixels(nn.Module):
    """Projections that are convolutions: (batch, width, tokens)."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv1d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x):
        q, k, v = self.qkv(x.mT).chunk(3, 1)
        fold = [y.unflatten(1, (HEADS, -1)).mT.transpose(0, 1).flatten(0, 1) for y in (q, k, v)]
        return F.scaled_dot_product_attention(*fold)


def test_projections_that_are_convolutions():
    torch.manual_seed(0)
    module, x = Pixels(), torch.randn(4, 10, WIDTH)
    with capture_attention([find_attention(module, "attn")]) as calls:
        module(x)
    assert isinstance(calls[0], FusedCall)
    torch.testing.assert_close(calls[0].q, module.qkv(x.mT).chunk(3, 1)[0].mT)


class HeadsAhead(Folded):
    """Four dimensions, (heads, batch, tokens, width), which a batch of as many samples as heads hides."""

    def forward(self, x):
        q, k, v = (part.permute(2, 0, 1, 3) for part in self.project(x))
        out = self.attend(q, k, v)
        return out.permute(1, 2, 0, 3).flatten(2)


def attend_eagerly(q, k, v):
    return (q @ k.mT / 2).softmax(-1) @ v


def attend_beside_a_gate(q, k, v):
    return attend_eagerly(q, k, v) * v[0].softmax(-1)


@pytest.mark.parametrize("attend", [attend_fused, attend_eagerly, attend_beside_a_gate])
@pytest.mark.parametrize("size", [HEADS, 4])
def test_heads_ahead_of_the_batch_are_refused(size, attend):
    message = "with the heads ahead of the batch" if size == HEADS else "to attend with 4 samples, .* but got 3"
    with pytest.raises(ValueError, match=message):
        adapt(make(HeadsAhead(attend=attend)), stream(1, size))


@pytest.mark.parametrize("attend", [attend_fused, attend_eagerly])
def test_as_many_samples_as_heads(attend):
    class Plain(Folded):
        def forward(self, x):
            return attend(*(part.transpose(1, 2) for part in self.project(x))).transpose(1, 2).flatten(2)

    check(adapt(make(Plain()), stream(3, HEADS)), adapt_by_hand(make(Folded()), stream(3, HEADS), 1))


def test_a_watched_attention_without_gradients():
    """The self-attention of separate modalities does not move, and its frozen projections are replayed."""

    class Separate(nn.Module):
        def __init__(self, fold):
            super().__init__()
            torch.manual_seed(0)
            self.audio, self.video = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
            self.own, self.cross, self.head = Folded(fold), Cross(fold), nn.Linear(WIDTH, CLASSES)

        def forward(self, audio, video):
            x = self.audio(audio)
            return self.head(self.cross(self.video(video), x + self.own(x)).mean(1))

    class Cross(Folded):
        def forward(self, x, context):
            both = zip(self.project(x)[:1] + self.project(context)[1:], (VIDEO, AUDIO, AUDIO), strict=True)
            out = attend_fused(*(self.fold(part) for part, _ in both))
            if self.fold is by_sample:
                return out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)
            return out.unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)

    fusion = {"video->audio": "cross", "audio->audio": "own"}
    models = [Separate(fold).double() for fold in (by_sample, by_head)]
    check(*(adapt(model, stream(3), fusion=fusion, steps=2, attention_weight=0.01) for model in models))


@pytest.mark.parametrize("first", [True, False])
def test_folds_of_a_projection(first):
    projected = torch.arange(2 * 4 * 6.0).view(2, 4, 6)
    fold = Fold(2, 3, heads_first=first)
    rows = projected.unflatten(-1, (3, 2)).permute((2, 0, 1, 3) if first else (0, 2, 1, 3)).flatten(0, 1)
    assert fitting_folds([rows], [projected]) == {fold}
    assert torch.equal(fold.unfold(rows).transpose(1, 2).flatten(2), projected)
    assert fitting_folds([rows.flip(0)], [projected]) == set()
    assert fitting_folds([rows[:0]], [projected]) == set()
