"""Modalities of a batch's tokens: masks made from it, spans read off it."""

import logging
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.attention.calls import FusedCall
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import score_statistics
from lightning_abpem.attention.trace import trace_attention
from tests.attention.test_torch_models import CrossDecoder
from tests.toy import AUDIO, CLASSES, VIDEO, WIDTH, EagerFusedAttention, FusedAttention, batches, make_toy


def adapt(model, stream, **options):
    given: dict[str, Any] = {"fusion": "fusion.*.attn", "k": 2} | options
    with torch.inference_mode(), ABPEM(**given).attach(model) as adaptation:
        return torch.stack([model(*args) for args in stream]), adaptation


@pytest.mark.parametrize("memory", [1, 3])
def test_auto_is_the_spans_written_out(memory, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    read, _ = adapt(make_toy(), batches(), modalities="auto", memory_batches=memory)
    given, _ = adapt(make_toy(), batches(), modalities={"audio": AUDIO, "video": VIDEO}, memory_batches=memory)
    assert torch.equal(read, given)
    assert 'off this batch, of 10 tokens: modalities={"audio": (0, 6), "video": (6, 10)}' in caplog.text
    assert caplog.text.count("off this batch") == 1


def test_auto_reads_every_new_shape(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    short = [(audio[:, :5], video) for audio, video in batches()]
    _, adaptation = adapt(make_toy(), [*batches(2), *short[:2], *batches(1)], modalities="auto")
    assert adaptation.updates == 5
    assert caplog.text.count("off this batch") == 2
    assert '"audio": (0, 5), "video": (5, 9)' in caplog.text


class Trimmed(nn.Module):
    """Drops as many tokens of the video as the batch says."""

    def __init__(self):
        super().__init__()
        self.toy = make_toy()

    def forward(self, audio, video, keep):
        return self.toy(audio, video[:, : int(keep)])


@pytest.mark.parametrize("as_tensor", [True, False])
def test_auto_reads_again_what_does_not_fit(as_tensor):
    kept = [torch.tensor(n) if as_tensor else n for n in (4, 4, 2, 2, 4)]
    stream = [(*args, keep) for args, keep in zip(batches(5), kept, strict=True)]
    read, adaptation = adapt(Trimmed().eval(), stream, fusion="toy.fusion.*.attn", modalities="auto", reset="batch")
    assert adaptation.updates == 5
    for keep in (4, 2):
        chosen = [i for i, n in enumerate(kept) if n == keep]
        trimmed = [(stream[i][0], stream[i][1][:, :keep]) for i in chosen]
        given, _ = adapt(make_toy(), trimmed, modalities={"audio": AUDIO, "video": keep}, reset="batch")
        torch.testing.assert_close(read[chosen], given, rtol=0, atol=1e-6)


class Tagged(nn.Module):
    """Takes more than the modalities."""

    def __init__(self):
        super().__init__()
        self.toy = make_toy()

    def forward(self, sample, *rest):
        return self.toy(sample.audio, sample.video)


class Sample:
    """Arguments in an object of the user's own, which knows itself."""

    def __init__(self, audio, video, **more):
        self.audio, self.video, self.itself = audio, video, self
        self.__dict__.update(more)


@pytest.fixture
def read_off(monkeypatch):
    """Count the times that spans are read off a forward in a stream."""
    traced = []

    def trace(*args):
        traced.append(args)
        return trace_attention(*args)

    monkeypatch.setattr("lightning_abpem.engine.forward.trace_attention", trace)

    def count(stream):
        traced.clear()
        _, adaptation = adapt(Tagged().eval(), stream, fusion="toy.fusion.*.attn", modalities="auto")
        assert adaptation.updates == len(stream)
        return len(traced)

    return count


def test_auto_reads_one_kind_of_arguments_once(read_off):
    stream = [(Sample(*batch, name="clip"), 0.5) for batch in batches(6)]
    assert read_off(stream) == 1
    short = [
        (Sample(audio[:, :5], torch.cat([video, video[:, :1]], 1), name="clip"), 0.5) for audio, video in batches(2)
    ]
    assert read_off([*stream, *short, *stream]) == 2
    assert read_off([(Sample(*batches(1)[0]), flag) for flag in (True, False, None, True)]) == 3


@pytest.mark.parametrize("inside", [True, False])
def test_auto_says_what_a_value_that_always_differs_costs(inside, read_off, caplog):
    """A name, a number or a step may move tokens: each costs a forward, which is said once, with its place."""
    more: list[dict[str, Any]] = [{"name": f"clip-{i}.wav", "step": i} for i in range(8)]
    stream: list[tuple[Any, ...]]
    if inside:
        stream = [(Sample(*batches(1)[0], **own),) for own in more]
    else:
        stream = [(Sample(*batches(1)[0]), *own.values()) for own in more]
    assert read_off(stream[:3]) == 3
    assert "differ from batch to batch" not in caplog.text
    assert read_off(stream) == 8
    assert caplog.text.count("differ from batch to batch") == 1
    places = "args[0].name, args[0].step" if inside else "args[1], args[2]"
    assert f"{places}. Each new value costs" in caplog.text
    assert 'give the spans, modalities={"audio": (0, 6), "video": (6, 10)}; if' in caplog.text


def test_auto_forgets_what_was_met_longest_ago(monkeypatch, read_off):
    monkeypatch.setattr("lightning_abpem.attention.modalities._REMEMBERED", 2)
    a, b, c = ((Sample(audio[:, :n], video),) for n, (audio, video) in zip((6, 5, 4), batches(3), strict=True))
    assert read_off([a, b, a, b]) == 2
    assert read_off([a, b, a, c, a, b]) == 4
    named = [(a[0], name) for name in "xyzxyz"]
    assert read_off(named) == 6


class Shifted(nn.Module):
    """As many tokens in all, of which the last argument says how many are the audio's."""

    def __init__(self, tokens_of):
        super().__init__()
        self.toy, self.tokens_of = make_toy(), tokens_of

    def forward(self, audio, video, how):
        n = self.tokens_of(how)
        return self.toy(audio[:, :n], video[:, : 7 - n])


class Mode(Enum):
    MORE = 4
    LESS = 3


@dataclass(slots=True)
class Options:
    """Its fields are in no `__dict__`."""

    tokens: int


HOWS = {
    "int": (4, 3, int),
    "bool": (True, False, lambda how: 3 + how),
    "str": ("more", "less", lambda how: 3 + (how == "more")),
    "float": (0.5, 0.4, lambda how: int(how * 8)),
    "None": (None, "less", lambda how: 3 + (how is None)),
    "bytes": (b"1234", b"123", len),
    "enum": (Mode.MORE, Mode.LESS, lambda how: how.value),
    "list": (["a", 4], ["a", 3], lambda how: how[1]),
    "set": ({"sound", "all"}, {"sound"}, lambda how: 2 + len(how)),
    "number of numpy": (np.int64(4), np.int64(3), int),
    "bool of numpy": (np.True_, np.False_, lambda how: 3 + int(how)),
    "tensor without dimensions": (torch.tensor(4), torch.tensor(3), int),
    "slots": (Options(4), Options(3), lambda how: how.tokens),
    "slice": (slice(0, 4), slice(0, 3), lambda how: how.stop),
    "long text": ("x" * 10**5 + "more", "x" * 10**5 + "less", lambda how: 3 + how.endswith("more")),
}


@pytest.mark.parametrize(("more", "less", "tokens_of"), HOWS.values(), ids=HOWS)
def test_auto_sees_values_that_move_the_boundary(more, less, tokens_of):
    hows = [more, less, less, more, less]
    stream = [(*args, how) for args, how in zip(batches(5), hows, strict=True)]
    options: dict[str, Any] = {"fusion": "toy.fusion.*.attn", "reset": "batch"}
    read, _ = adapt(Shifted(tokens_of).eval(), stream, modalities="auto", **options)
    for logits, args in zip(read, stream, strict=True):
        spans = {"audio": tokens_of(args[2]), "video": 7 - tokens_of(args[2])}
        given, _ = adapt(Shifted(tokens_of).eval(), [args], modalities=spans, **options)
        assert torch.equal(logits, given[0])


@pytest.mark.parametrize("whole", [True, False])
def test_auto_and_compiled_code(whole):
    model: Any = make_toy()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.fusion = torch.compile(model.fusion, backend="eager")
    read, _ = adapt(model, batches(), modalities="auto")
    torch.testing.assert_close(read, adapt(make_toy(), batches())[0], rtol=0, atol=1e-6)


def test_masks_of_sequences_of_their_own():
    """In modules of their own the modalities' masks are of different sequences: nothing to overlap."""
    torch.manual_seed(0)
    model = CrossDecoder().eval()
    sound, words = torch.randn(3, AUDIO, 3), torch.randn(3, VIDEO, 3)
    fusion = {"words->sound": "decoder.layers.*.multihead_attn", "sound->sound": "encoder.layers.0.self_attn"}
    functions = {
        "words": lambda sound, words: torch.ones(3, VIDEO, dtype=torch.bool),
        "sound": lambda sound, words: torch.ones(3, AUDIO, dtype=torch.bool),
    }
    for args in ((sound, words), (sound[:, :VIDEO], words)):
        lengths = {"words": VIDEO, "sound": args[0].shape[1]}
        if args[0].shape[1] == VIDEO:
            functions["sound"] = functions["words"]
        masked, _ = adapt(model, [args], fusion=fusion, modalities=functions)
        given, _ = adapt(model, [args], fusion=fusion, modalities=lengths)
        torch.testing.assert_close(masked, given, rtol=0, atol=1e-6)


class WithEncoders(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio, self.video = (nn.Sequential(nn.Linear(3, WIDTH), FusedAttention()) for _ in range(2))
        self.attn, self.head = FusedAttention(), nn.Linear(WIDTH, CLASSES)

    def forward(self, audio, video):
        return self.head(self.attn(torch.cat([self.audio(audio), self.video(video)], 1)).mean(1))


def test_auto_where_the_pattern_matches_encoders_too():
    with pytest.raises(ValueError, match=r"of its 3 matches 2 see one module's tokens only: audio.1 .*=\['attn'\]"):
        adapt(WithEncoders().eval(), batches(), fusion=["*.1", "attn"], modalities="auto")


def test_auto_where_nothing_is_concatenated():
    with pytest.raises(ValueError, match=r"but its tokens are seen to come from 'audio.0' alone"):
        adapt(WithEncoders().eval(), batches(), fusion="audio.1", modalities="auto")


class Interleaved(nn.Module):
    """Tokens of two kinds in any order, as many as there are, padded at the end."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.fusion: Any = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, 3, batch_first=True)})])

    def forward(self, ids, padded):
        x = self.embed(ids)
        x = x + self.fusion[0]["attn"](x, x, x, key_padding_mask=padded)[0]
        return self.head((x * ~padded[..., None]).sum(1) / (~padded).sum(1, keepdim=True))


KINDS = {"words": lambda ids, padded: ids < 10, "sounds": lambda ids, padded: ids >= 10}


def interleaved(size=3):
    torch.manual_seed(size)
    padded = torch.arange(8) >= torch.randint(5, 9, (size, 1))
    return torch.randint(20, (size, 8)), padded


def test_masks_are_the_tokens_one_by_one():
    torch.manual_seed(0)
    model = Interleaved().eval()
    ids, padded = interleaved()
    options: dict[str, Any] = {"steps": 0, "modalities": KINDS}
    _, adaptation = adapt(model, [(ids, padded)], **options)
    mha, divergences = model.fusion[0]["attn"], []
    for sample in range(3):
        x = model.embed(ids[sample])[~padded[sample]].double()
        kinds = ids[sample][~padded[sample]] < 10
        (w_q, w_k, _), (b_q, b_k, _) = mha.in_proj_weight.double().chunk(3), mha.in_proj_bias.double().chunk(3)
        scores = (x @ w_q.T + b_q) @ (x @ w_k.T + b_k).T * 4**-0.5 / 3
        cross, own = scores[kinds][:, ~kinds], scores[~kinds][:, ~kinds]
        if min(cross.numel(), own.numel()) > 1:
            p, q = (torch.distributions.Normal(block.mean(), block.std()) for block in (cross, own))
            divergences.append(torch.distributions.kl_divergence(p, q))
    expected = torch.stack(divergences).mean().item()
    assert adaptation.record["divergence/words_to_sounds"].item() == pytest.approx(expected, rel=1e-4)


class Remembering(Interleaved):
    """Its block gets the tokens and their padding, and gives logits."""

    def __init__(self):
        super().__init__()
        self.block = Interleaved()

    def forward(self, ids, padded):
        return self.block(ids, padded)


def test_masks_are_remembered_with_the_tokens():
    """With the same batch twice, memory holds it twice: the figures are those of the batch alone."""
    torch.manual_seed(0)
    model = Remembering().eval()
    one, two = interleaved(3), interleaved(2)
    options: dict[str, Any] = {
        "fusion": "block.fusion.0.attn",
        "modalities": KINDS,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.0),
    }
    options |= {"memory_at": "block"}
    _, alone = adapt(model, [tuple(map(torch.cat, zip(one, two, strict=True)))], **options)
    torch.manual_seed(0)
    model = Remembering().eval()
    with torch.no_grad(), ABPEM(k=2, memory_batches=2, **options).attach(model) as adaptation:
        model(*one)
        model(*two)
    for name, value in adaptation.record.items():
        torch.testing.assert_close(value, alone.record[name], msg=name)


def test_masks_that_overlap():
    modalities = KINDS | {"sounds": lambda ids, padded: ids >= 9}
    with pytest.raises(ValueError, match="'words' and 'sounds' share some"):
        adapt(
            Interleaved().eval(), [(torch.full((2, 8), 9), torch.zeros(2, 8, dtype=torch.bool))], modalities=modalities
        )


def test_a_modality_that_is_missing_everywhere():
    """No cross block is left: the bootstrapping says nothing, entropy still adapts."""
    torch.manual_seed(0)
    ids = torch.randint(10, (3, 8))
    _, adaptation = adapt(Interleaved().eval(), [(ids, torch.zeros(3, 8, dtype=torch.bool))], modalities=KINDS)
    assert adaptation.updates == 1
    assert adaptation.record["divergence/words_to_sounds"].isnan()
    assert adaptation.record["loss"].isfinite()


def test_ranges_are_doubted_once_where_the_number_of_tokens_varies(caplog):
    longer = [(torch.cat((audio, audio[:, :2]), 1), video) for audio, video in batches(3)]
    words = "The ranges of `modalities` were first met by 10 tokens in 'fusion.0.attn' and now by 12"
    ranges = {"audio": (0, AUDIO), "video": (AUDIO, AUDIO + VIDEO)}
    adapt(make_toy(), batches(3), modalities=ranges)
    assert "The ranges of" not in caplog.text
    adapt(make_toy(), [*batches(2), *longer], modalities=ranges)
    assert caplog.text.count(words) == 1
    caplog.clear()
    adapt(make_toy(), [*batches(2), *longer], modalities="auto")
    assert "The ranges of" not in caplog.text


class Pooled(nn.Module):
    """As many tokens of each modality as its lengths say."""

    def __init__(self, audio, video, attention):
        super().__init__()
        torch.manual_seed(0)
        self.toy, self.lengths = make_toy(attention()), (audio, video)

    def forward(self, audio, video):
        parts = [self.toy.audio(audio)[:, : self.lengths[0]], self.toy.video(video)[:, : self.lengths[1]]]
        return self.toy.head(self.toy.fusion(torch.cat(parts, 1)).mean(1))


def masks(audio, video):
    columns = torch.arange(audio + video)[None]
    return {
        "audio": lambda a, v: (columns < audio).expand(len(a), -1),
        "video": lambda a, v: (columns >= audio).expand(len(a), -1),
    }


@pytest.mark.parametrize("attention", [FusedAttention, EagerFusedAttention])
@pytest.mark.parametrize("weight", ["auto", 1.0])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 4), (6, 1)])
def test_one_token_of_a_modality(lengths, weight, attention, caplog):
    """Lengths and masks say the same: pairs that are drawn to a single score do not count, and the rest adapts."""
    audio, video = lengths
    options: dict[str, Any] = {"fusion": "toy.fusion.*.attn", "attention_weight": weight, "balance": "marginal"}
    given = {"audio": audio, "video": video}
    seen = []
    for modalities in (given, masks(audio, video)):
        caplog.clear()
        model = Pooled(audio, video, attention).eval()
        logits, adaptation = adapt(model, batches(3), modalities=modalities, **options)
        seen.append((logits, adaptation.record))
        assert adaptation.updates == 3
        assert caplog.text.count("a single score has no deviation") == 1
    (logits, record), (masked_logits, masked_record) = seen
    torch.testing.assert_close(logits, masked_logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(record, masked_record, rtol=0, atol=1e-5, equal_nan=True)
    for pair, keys in {"audio_to_video": video, "video_to_audio": audio}.items():
        assert bool(record[f"attention_gap/{pair}"].isnan()) == (keys == 1)
    if lengths == (1, 1):
        alone, _ = adapt(
            Pooled(1, 1, attention).eval(), batches(3), modalities=given, **(options | {"attention_weight": 0.0})
        )
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["dense", "moments"])
def test_one_token_has_no_deviation_in_any_form(form):
    call = FusedCall("attn", torch.randn(2, 9, 3), torch.randn(2, 9, 3), 0.5)
    tokens = {"one": Tokens(slice(0, 1)), "many": Tokens(slice(1, 9))}
    block = score_statistics(call, tokens, tokens, form)
    alone, across = block("one", "one"), block("one", "many")
    assert alone.seen is not None
    assert across.seen is not None
    assert not alone.seen.any()
    assert across.seen.all()
    scores = 0.5 * call.q[:, :1] @ call.k[:, 1:].mT
    torch.testing.assert_close(across.std, scores.flatten(1).std(1))
