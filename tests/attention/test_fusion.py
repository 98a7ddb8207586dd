"""Names of the fusion, and those that do not fit the model."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.attention.calls import FusedCall
from lightning_abpem.attention.fusion import check_samples, find_fusion, fusion_patterns
from lightning_abpem.attention.spans import Tokens, own_spans, token_spans
from lightning_abpem.methods import READ
from tests.toy import CLASSES, HEADS, WIDTH, FusedAttention, batches, heads_first, make_toy

PAIRS = [("text", "image"), ("image", "text"), ("text", "text"), ("image", "image")]


def call(name="a", queries=10, keys=10, call_index=0, samples=2):
    torch.manual_seed(call_index)
    return FusedCall(name, torch.randn(samples, queries, 4), torch.randn(samples, keys, 4), 0.5, call_index=call_index)


# ------------------------------------------------------------------------------------------------------------- names


def test_patterns_of_a_joint_sequence():
    assert fusion_patterns("a.*", ["x", "y"]) == ["a.*"]
    assert fusion_patterns(("a", "b"), []) == ["a", "b"]


def test_pairs_as_tuples_or_arrows():
    tuples = {("text", "image"): "cross", ("image", "image"): ["self"]}
    assert fusion_patterns(tuples, []) == {("text", "image"): ["cross"], ("image", "image"): ["self"]}
    arrows = {"text->image": "cross", "image -> image": "self"}
    assert fusion_patterns(arrows, []) == fusion_patterns(tuples, [])


def test_a_rule_for_all_pairs():
    rule = {"self": "{query}.own", "cross": ["{query}.from_{key}"]}
    patterns = fusion_patterns(rule, ["text", "image"])
    assert patterns == {
        ("text", "text"): ["text.own"],
        ("text", "image"): ["text.from_image"],
        ("image", "text"): ["image.from_text"],
        ("image", "image"): ["image.own"],
    }


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({("text", "image"): "a"}, r"self-attention \('image', 'image'\) whose scores"),
        ({("text", "text"): "a"}, "a pair of different modalities"),
        ({}, "a pair of different modalities"),
        ({"text": "a"}, '"video->audio", query first, or "self" and "cross", but got \'text\''),
        ({("a", "b", "c"): "a"}, r"but got \('a', 'b', 'c'\)"),
        ({"self": "a", "cross": "b"}, "`modalities` to name those"),
    ],
)
def test_bad_mappings(fusion, message):
    with pytest.raises(ValueError, match=message):
        ABPEM(fusion, k=2)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ("audio", "map names to tokens, or \"auto\", but got 'audio'"),
        (["audio", "video"], "how many tokens of the joint sequence each has"),
    ],
)
def test_bad_modalities(modalities, message):
    with pytest.raises(ValueError, match=message):
        ABPEM("fusion", modalities, k=2)


def test_modalities_that_the_fusion_does_not_name():
    with pytest.raises(ValueError, match=r"to hold \['image'\], which `fusion` names"):
        ABPEM({"text->image": "a", "image->image": "b"}, {"text": 7}, k=2)


# ------------------------------------------------------------------------------------------------- the call's number


class Recurrent(nn.Module):
    """One attention, called three times."""

    def __init__(self):
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(3, WIDTH), FusedAttention(), nn.Linear(WIDTH, CLASSES)

    def forward(self, audio, video):
        x = self.embed(torch.cat([audio, video], 1))
        for _ in range(3):
            x = x + self.attn(x)
        return self.head(x.mean(1))


def recorded(model, fusion):
    with torch.no_grad(), ABPEM(fusion, {"audio": 6, "video": 4}, k=2, steps=0).attach(model) as adaptation:
        model(*batches(1)[0])
    return adaptation.record


def test_every_call_of_a_module_counts():
    torch.manual_seed(0)
    model = Recurrent().eval()
    one_by_one = [recorded(model, f"attn[{call_index}]")["divergence/audio_to_video"] for call_index in range(3)]
    assert len({value.item() for value in one_by_one}) == 3
    torch.testing.assert_close(recorded(model, "attn")["divergence/audio_to_video"], torch.stack(one_by_one).mean())
    first_two = recorded(model, ["attn[0]", "attn[1]"])["divergence/audio_to_video"]
    torch.testing.assert_close(first_two, torch.stack(one_by_one[:2]).mean())


def test_a_call_that_is_not_made():
    with pytest.raises(ValueError, match=r"Expected a call \[3\] of 'attn' in a forward, but it made 3 calls"):
        recorded(Recurrent().eval(), "attn[3]")


# ---------------------------------------------------------------------------------------------------- a joint sequence


def joint(*names):
    model = nn.ModuleDict({name: FusedAttention() for name in names})
    return find_fusion(model, list(names))


def test_spans_against_the_tokens():
    spans, lengths = token_spans({"audio": (1, 6), "video": (6, 10)}), token_spans({"audio": 6, "video": 4})
    fusion = joint("a")
    fusion.check([call()], spans)
    fusion.check([call(queries=12, keys=12)], spans)
    fusion.check([call()], lengths)
    with pytest.raises(ValueError, match=r"'a', but got 10 \(audio 1:6, video 6:10\) and 9 tokens"):
        fusion.check([call(queries=9, keys=9)], spans)
    with pytest.raises(ValueError, match="but got 10 .* and 12 tokens"):
        fusion.check([call(queries=12, keys=12)], lengths)
    with pytest.raises(
        ValueError, match=r"one joint sequence, but got 4 query and 6 key tokens. .* `fusion` maps pairs"
    ):
        fusion.check([call(queries=4, keys=6)], spans)


def test_masks_against_the_tokens():
    tokens = {"audio": Tokens(slice(None), torch.ones(2, 9, dtype=torch.bool), 9), "video": Tokens(slice(0, 2))}
    with pytest.raises(ValueError, match=r"mask of modality 'audio' to be \(2, 10\), .* but got \(2, 9\)"):
        joint("a").check([call()], tokens)


def test_a_pattern_that_matches_encoders_too():
    calls = [call("enc_a", 6, 6), call("enc_v", 4, 4), call("fused")]
    with pytest.raises(
        ValueError, match="fit 1 of 3 matches: fused. .* 'enc_a' \\(6\\), 'enc_v' \\(4\\).*=\\['fused'\\]"
    ):
        joint("enc_a", "enc_v", "fused").check(calls, token_spans({"audio": 6, "video": 4}))


def test_samples():
    check_samples([call()], 2)
    with pytest.raises(ValueError, match="with 4 samples, as many as the logits have, but got 2. Give it tokens"):
        check_samples([call()], 4)


# ------------------------------------------------------------------------------------------------- modules of their own


def separate(**extra):
    names = {"text->image": "ti", "image->text": "it", "text->text": "tt", "image->image": "ii"} | extra
    model = nn.ModuleDict({name: FusedAttention() for name in ("ti", "it", "tt", "ii")})
    return find_fusion(model, fusion_patterns(names, []))


CALLS = [call("ti", 7, 4), call("it", 4, 7), call("tt", 7, 7), call("ii", 4, 4)]
WHOLE = own_spans({"text": 7, "image": 4})


def test_the_modules_of_cross_blocks_adapt():
    fusion = separate()
    assert [attention.name for attention in fusion.watched] == ["ti", "it", "tt", "ii"]
    assert [attention.name for attention in fusion.adapting] == ["ti", "it"]
    fusion.check(CALLS, WHOLE)


def test_layers_are_compared_one_by_one_or_with_one():
    twice = [call("ti", 7, 4), call("ti", 7, 4, call_index=1), call("it", 4, 7), call("tt", 7, 7), call("ii", 4, 4)]
    fusion = separate()
    fusion.check(twice, WHOLE)
    compared = fusion.compare(twice, WHOLE)
    assert [len(layers) for layers in compared.values()] == [2, 1]
    (cross_0, target_0), (cross_1, target_1) = compared["text", "image"]
    assert torch.equal(target_0.mean, target_1.mean)
    assert not torch.equal(cross_0.mean, cross_1.mean)
    too_many = [*twice, call("ii", 4, 4, call_index=1), call("ii", 4, 4, call_index=2)]
    with pytest.raises(ValueError, match=r"as many calls for \('image', 'image'\) as .* but got 3 and 2"):
        fusion.check(too_many, WHOLE)


def test_modalities_of_another_length():
    with pytest.raises(ValueError, match="Expected 5 tokens of modality 'image', but 'ti' has 4 of it"):
        separate().check(CALLS, own_spans({"text": 7, "image": 5}))
    with pytest.raises(ValueError, match="Expected 3 tokens of modality 'image', but 'ti' has 4"):
        separate().check(CALLS, own_spans({"text": 7, "image": 3}))
    separate().check(CALLS, own_spans({"text": (1, 7), "image": (0, 3)}))


def test_a_module_that_serves_several_pairs_needs_numbers():
    fusion = separate(**{"image->text": "ti"})
    calls = [call("ti", 7, 4), call("ti", 4, 7, call_index=1), call("tt", 7, 7), call("ii", 4, 4)]
    with pytest.raises(
        ValueError, match=r"to stand for one pair of modalities, but call \[0\] of 'ti' .* in 'ti\[0\]'"
    ):
        fusion.check(calls, WHOLE)
    numbered = separate(**{"text->image": "ti[0]", "image->text": "ti[1]"})
    numbered.check(calls, WHOLE)


def test_calls_the_other_way_round():
    numbered = separate(**{"text->image": "ti[1]", "image->text": "ti[0]"})
    calls = [call("ti", 7, 4), call("ti", 4, 7, call_index=1), call("tt", 7, 7), call("ii", 4, 4)]
    with pytest.raises(ValueError, match=r"'text' to have the same tokens .* 4 in 'ti' and 7 in call \[0\] of 'tt'"):
        numbered.check(calls, WHOLE)


def test_an_attention_that_is_matched_twice():
    model: Any = nn.ModuleDict({"a": nn.ModuleDict({"attn": FusedAttention()})})
    model["alias"] = model["a"]["attn"]
    assert [x.name for x in find_fusion(model, ["a.attn", "alias"]).watched] == ["a.attn"]
    with pytest.raises(ValueError, match="match each attention once, but 'a' and 'a.attn' are one"):
        find_fusion(model, ["a", "alias"])


def test_padding_is_known_from_every_call_with_those_keys():
    """The text's padding masks its keys; it is out of the queries of text -> image too."""
    keep = torch.ones(2, 1, 7, dtype=torch.bool)
    keep[0, :, 5:] = False
    q, k = torch.randn(2, 2, 7, 4)
    calls = [call("ti", 7, 4), call("it", 4, 7), FusedCall("tt", q, k, 0.5, keep=keep), CALLS[3]]
    compared = separate().compare(calls, WHOLE)
    [(cross, _)] = compared["text", "image"]
    scores = calls[0].scale * calls[0].q @ calls[0].k.mT
    torch.testing.assert_close(cross.mean, torch.stack([scores[0, :5].mean(), scores[1].mean()]))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, context):
        q, k, v = (heads_first(y, HEADS) for y in (self.q_proj(x), self.k_proj(context), self.v_proj(context)))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ThreeModalities(nn.Module):
    """Every modality attends to itself and to each other one, as in MulT."""

    names = ("a", "t", "v")

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleDict({n: nn.Linear(3, WIDTH) for n in self.names})
        self.own = nn.ModuleDict({n: CrossAttention() for n in self.names})
        self.cross = nn.ModuleDict(
            {f"{m}_with_{n}": CrossAttention() for m in self.names for n in self.names if m != n}
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, **inputs):
        x = {name: self.embed[name](inputs[name]) for name in self.names}
        x = {name: y + self.own[name](y, y) for name, y in x.items()}
        seen = [x[m] + self.cross[f"{m}_with_{n}"](x[m], x[n]) for m in self.names for n in self.names if m != n]
        return self.head(torch.cat(seen, 1).mean(1))


def test_three_modalities_by_a_rule():
    torch.manual_seed(0)
    model = ThreeModalities().eval()
    inputs = {name: torch.randn(4, n, 3) for name, n in zip("atv", (6, 3, 5), strict=True)}
    rule = {"self": "own.{query}", "cross": "cross.{query}_with_{key}"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = ABPEM(rule, ["a", "t", "v"], k=2, restore=False)
    with torch.inference_mode(), callback.attach(model) as adaptation:
        model(**inputs)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("cross.")}
    assert sum(name.startswith("divergence/") for name in adaptation.record) == 6


def test_several_layers_are_averaged():
    toy = make_toy(depth=2)
    one_by_one = [recorded(toy, f"fusion.{layer}.attn")["divergence/audio_to_video"] for layer in range(2)]
    both = recorded(toy, "fusion.*.attn")["divergence/audio_to_video"]
    torch.testing.assert_close(both, torch.stack(one_by_one).mean())


class Bottleneck(nn.Module):
    """Each modality attends with latents beside it, and the modalities meet in these alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.video, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.attn_a, self.attn_v = FusedAttention(), FusedAttention()
        self.latents = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, audio, video):
        latents = self.latents.expand(len(audio), -1, -1)
        ya = self.attn_a(torch.cat([self.audio(audio), latents], 1))
        yv = self.attn_v(torch.cat([self.video(video), latents + ya[:, -3:]], 1))
        return self.head(yv.mean(1))


BLOCKS = {
    **{"z->audio": "attn_a", "audio->audio": "attn_a"},
    **{"z->video": "attn_v", "video->video": "attn_v"},
}
RANGES: dict[str, Any] = {"audio": (0, 6), "video": (0, 4), "z": (-3, None)}


def test_blocks_of_one_call_are_pairs():
    """The figures are those of the blocks of q k^T, by hand, and the attention of both streams moves."""
    model, batch = Bottleneck().eval(), batches(1)[0]
    inputs = {}
    for name in ("attn_a", "attn_v"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    with ABPEM(BLOCKS, RANGES, k=2, steps=0).attach(model) as adaptation, torch.no_grad():
        model(*batch)
        for name, modality in (("attn_a", "audio"), ("attn_v", "video")):
            attention: Any = model.get_submodule(name)
            q, k, _ = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in attention.qkv(inputs[name]).chunk(3, -1))
            scores = (q @ k.mT / 2).mean(1)
            gap = (scores[:, :-3, :-3].mean((1, 2)) - scores[:, -3:, :-3].mean((1, 2))).mean()
            torch.testing.assert_close(adaptation.record[f"attention_gap/z_to_{modality}"], gap)
    with ABPEM(BLOCKS, RANGES, k=2).attach(model) as adaptation, torch.no_grad():
        model(*batch)
    assert adaptation.updates == 1
    assert {name.split(".")[0] for name in adaptation.params} == {"attn_a", "attn_v"}


@pytest.mark.parametrize(
    ("fusion", "modalities", "message"),
    [
        (["attn_a", "attn_v"], {"audio": 6, "video": 4}, "add up to the tokens of 'attn_a'.* name pairs of blocks"),
        (["attn_a", "attn_v"], "auto", "come from 'audio' alone. .* name pairs of blocks"),
        (BLOCKS, RANGES | {"z": (6, 9)}, r"'z' to be among the 7 tokens of 'attn_v', but got the range \(6, 9\)"),
        (BLOCKS, RANGES | {"z": (-4, None)}, "named for .*'z', 'audio'.* and for .*'audio', 'audio'.*do not overlap"),
        (BLOCKS, ["audio", "video", "z"], "call .0. of 'attn_a' is named for"),
    ],
)
def test_blocks_that_are_named_wrongly(fusion, modalities, message):
    model = Bottleneck().eval()
    with (
        pytest.raises(ValueError, match=message),
        ABPEM(fusion, modalities, k=2).attach(model) as adaptation,
        torch.no_grad(),
    ):
        model(*batches(1)[0])
    assert adaptation.updates == 0


class Reading(nn.Module):
    """Latents that read the joint sequence, as in Perceiver."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.audio, self.video, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.latents, self.read = (
            nn.Parameter(torch.randn(1, 3, WIDTH)),
            nn.MultiheadAttention(WIDTH, 3, batch_first=True),
        )

    def forward(self, audio, video):
        x = torch.cat([self.audio(audio), self.video(video)], 1)
        return self.head(self.read(self.latents.expand(len(x), -1, -1), x, x)[0].mean(1))


@pytest.mark.parametrize("modalities", [{"audio": 6, "video": 4}, "auto"])
def test_latents_that_read_all_modalities_are_for_other_methods(modalities):
    model = Reading().eval()
    message = r"3 query and 10 key tokens.* latents .*READ\(fusion='read'\)"
    with pytest.raises(ValueError, match=message), ABPEM("read", modalities, k=2).attach(model):
        model(*batches(1)[0])
    with pytest.raises(ValueError, match=r"self-attention .'audio', 'audio'.*READ\(fusion='read'\)"):
        ABPEM({"read->audio": "read"})
    with READ(fusion="read").attach(model) as adaptation, torch.no_grad():
        model(*batches(1)[0])
    assert adaptation.updates == 1
