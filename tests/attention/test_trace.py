"""The trace of a forward: its attention calls and where their tokens come from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_abpem.attention.origins import Segment, TracedCall, joint_spans, short_names
from lightning_abpem.attention.trace import trace_attention
from tests.toy import (
    HEADS,
    WIDTH,
    EagerSplitAttention,
    FusedAttention,
    HiddenKernel,
    TorchAttention,
    batches,
    make_toy,
)

BATCH = batches(1)[0]


def seen_in(model, *args):
    return trace_attention(model, lambda: model(*args))


def summary(call):
    return call.name, call.kind, call.queries, call.keys, call.heads, call.shape


@pytest.mark.parametrize(
    ("attention", "name", "kind"),
    [
        (FusedAttention, "fusion.0.attn", "fused"),
        (EagerSplitAttention, "fusion.0.attn", "eager"),
        (TorchAttention, "fusion.0.attn.mha", "torch"),
        (lambda: TorchAttention(batch_first=False), "fusion.0.attn.mha", "torch"),
    ],
)
def test_a_joint_call(attention, name, kind):
    [call] = seen_in(make_toy(attention()), *BATCH)
    assert summary(call) == (name, kind, 10, 10, HEADS, "joint")
    assert call.query_segments == (Segment("audio.embed", 6), Segment("video.embed", 4))


def test_beside_scripted_modules_and_in_none():
    model = nn.Sequential(torch.jit.script(nn.Linear(WIDTH, WIDTH)), FusedAttention())
    [call] = seen_in(model, torch.randn(2, 10, WIDTH))
    assert str(call) == "1 (10 query and 10 key tokens)"

    class Functional(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    [call] = seen_in(Functional(), torch.randn(2, HEADS, 10, 4))
    assert summary(call) == ("Functional", "fused", 10, 10, HEADS, "self")


def test_kernels_that_hide_q_and_k():
    [call] = seen_in(nn.Sequential(HiddenKernel()), torch.randn(2, 10, WIDTH))
    assert call.kind == "hidden"
    assert str(call) == "0 (its kernel hides q and k)"


class Encoded(nn.Module):
    """A class token in front, convolutions before, a slice after, a tokens-first encoder: origins survive."""

    def __init__(self):
        super().__init__()
        self.patches, self.words = nn.Conv1d(3, WIDTH, 1), nn.Embedding(20, WIDTH)
        self.embed = nn.Identity()
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, batch_first=False)
        self.attn = FusedAttention()

    def forward(self, image, text):
        x = self.embed(self.patches(image).transpose(1, 2))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = self.encoder(x.transpose(0, 1)).transpose(0, 1)
        t = self.words(text)[:, 1:]
        return self.attn(torch.cat((x, t + 1), 1))


def test_origins_through_an_encoder():
    encoder, fusion = seen_in(Encoded().eval(), torch.randn(2, 3, 5), torch.randint(20, (2, 8)))
    assert summary(encoder) == ("encoder.self_attn", "torch", 6, 6, HEADS, "self")
    assert fusion.query_segments == (Segment(None, 1), Segment("embed", 5), Segment("words", 7))
    assert joint_spans(fusion)["embed"].span == slice(1, 6)
    assert joint_spans(fusion)["words"].span == slice(6, 13)
    assert {tokens.of for tokens in joint_spans(fusion).values()} == {13}


@pytest.mark.parametrize(
    ("change", "segments"),
    [
        (lambda x: x[:, 1:], [("audio.embed", 5), ("video.embed", 4)]),
        (lambda x: x[:, 2:8], [("audio.embed", 4), ("video.embed", 2)]),
        (lambda x: x[:1, :, :4], [("audio.embed", 6), ("video.embed", 4)]),
        (lambda x: x[:, torch.arange(10).flip(0)], [(None, 10)]),
        (lambda x: x[:, ::2], [(None, 5)]),
        (lambda x: x.flip(1), [(None, 10)]),
        (lambda x: x.gather(1, torch.zeros(4, 10, WIDTH, dtype=torch.long)), [(None, 10)]),
        (lambda x: torch.roll(x, 1, 1), [(None, 10)]),
    ],
)
def test_tokens_in_another_order_are_not_told_apart(change, segments):
    model = make_toy()
    model.fusion[0].attn.forward = lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])

    def forward(x):
        model.fusion[0].attn(change(x))
        return x

    model.fusion[0].forward = forward
    [call] = seen_in(model, *BATCH)
    assert [(segment.source, segment.tokens) for segment in call.query_segments] == segments


def test_compiled_modules_by_their_own_names():
    model = make_toy()
    model.fusion = torch.compile(model.fusion, backend="eager")
    [call] = seen_in(torch.compile(model, backend="eager"), *BATCH)
    assert summary(call) == ("fusion.0.attn", "fused", 10, 10, HEADS, "joint")


def test_prefixes_are_no_joint_call():
    call = TracedCall("a", 0, "fused", 9, 11, 1, (Segment("x", 5), Segment("y", 4)))
    assert call.shape == "self"


class OneEncoder(nn.Module):
    """The same encoder for both, its outputs concatenated."""

    def __init__(self):
        super().__init__()
        self.encoder, self.attn = nn.Linear(3, WIDTH), FusedAttention()

    def forward(self, a, b):
        return self.attn(torch.cat([self.encoder(a), self.encoder(b)], 1))


def test_a_module_that_is_called_twice_is_two_origins():
    [call] = seen_in(OneEncoder(), *BATCH)
    assert call.sources == ["encoder", "encoder[1]"]
    assert {name: tokens.span for name, tokens in joint_spans(call).items()} == {
        "encoder_0": slice(0, 6),
        "encoder_1": slice(6, 10),
    }


def test_spans_that_cannot_be_read():
    def of(*segments):
        return TracedCall("a", 0, "fused", 9, 9, 1, tuple(Segment(*s) for s in segments))

    with pytest.raises(ValueError, match="seen to come from 'x' alone. .* give their spans"):
        joint_spans(of(("x", 9)))
    with pytest.raises(ValueError, match="seen to come from no module"):
        joint_spans(of((None, 9)))
    with pytest.raises(ValueError, match="the tokens of 'x' side by side in 'a', but they are in several places"):
        joint_spans(of(("x", 3), ("y", 3), ("x", 3)))


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["m.audio_encoder.norm", "m.video_encoder.embed.proj"], ["audio", "video"]),
        (["blocks_a.10", "blocks_v.10"], ["a", "v"]),
        (["enc.embed", "enc.embed[1]"], ["embed_0", "embed_1"]),
        (["flava.image_model.patches", "flava.text_model.words"], ["image", "text"]),
        (["lxmert.embeddings.word_embeddings", "lxmert.encoder.visn_fc.visn_fc"], ["text", "image"]),
        (["left.image", "right.image"], ["left", "right"]),
        (["x"], ["x"]),
    ],
)
def test_short_names(sources, names):
    assert list(short_names(sources).values()) == names
    assert list(short_names(sources)) == sources


def test_nothing_is_left_behind():
    model = make_toy()
    with pytest.raises(RuntimeError):
        seen_in(model, torch.randn(2, 6, 4), BATCH[1])
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
