"""`inspect`: what it shows, and that the line it gives works when pasted."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM, inspect
from lightning_abpem.attention.fusion import find_fusion
from tests.families import FAMILIES
from tests.toy import CLASSES, WIDTH, FusedAttention, batches, make_toy

BATCH = batches(1)[0]


def test_a_joint_sequence():
    found = inspect(make_toy(depth=2), *BATCH)
    assert found.line == 'ABPEM(fusion="fusion.*.attn", modalities={"audio": 6, "video": 4})'
    assert found.notes == ["2 attentions would adapt. Fewer: fusion='fusion.1.attn', the last, for instance."]
    assert found.rows()[0] == {
        "name": "fusion.0.attn",
        "kind": "fused",
        "queries": 10,
        "keys": 10,
        "heads": 3,
        "tokens": "audio\N{NO-BREAK SPACE}6 + video\N{NO-BREAK SPACE}4",
        "fusion": True,
        "values": 3 * WIDTH * WIDTH + 3 * WIDTH,
    }
    assert "fusion.1.attn" in str(found)
    assert str(found) == repr(found)
    assert "\x1b" not in str(found)


class Named(nn.Module):
    """The toy with its fusion under a name of any characters."""

    def __init__(self, name):
        super().__init__()
        self.audio, self.video, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.fusion = nn.ModuleDict({name: FusedAttention()})

    def forward(self, audio, video):
        x = torch.cat((self.audio(audio), self.video(video)), 1)
        (fusion,) = self.fusion.values()
        return self.head((x + fusion(x)).mean(1))


@pytest.mark.parametrize("name", ['a"b', "a\\", "é", '" + str(print("run")) + "', '", lr=1)', "{x}"])
def test_a_name_is_a_string_of_the_line(name, capsys):
    """And no part of the code, which is run to be tried."""
    found = inspect(Named(name), *BATCH)
    assert eval(str(found.line), {"ABPEM": ABPEM}).settings.fusion == f"fusion.{name}"
    assert "run" not in capsys.readouterr().out


def test_the_model_stays_as_it_was():
    model = make_toy().train()
    model.head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    inspect(model, *BATCH)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(RuntimeError):
        inspect(model, BATCH[0], torch.zeros(1))
    assert {name: module.training for name, module in model.named_modules()} == before


FUSION: dict[str, Any] = {  # what the line names, by family
    "ViLT": "vilt.encoder.layer.*.attention.attention",
    "FLAVA": "flava.multimodal_model.encoder.layer.*.attention.attention",
    "VisualBERT": "visual_bert.encoder.layer.*.attention.self",
    "LXMERT": {
        "text->image": "lxmert.encoder.x_layers.*.visual_attention.att[0]",
        "image->image": "lxmert.encoder.x_layers.*.visn_self_att.self",
        "image->text": "lxmert.encoder.x_layers.*.visual_attention.att[1]",
        "text->text": "lxmert.encoder.x_layers.*.lang_self_att.self",
    },
    "BridgeTower": {
        "text->image": "bridgetower.cross_modal_text_layers.*.crossattention.self",
        "image->image": "bridgetower.cross_modal_image_layers.*.attention.self",
        "image->text": "bridgetower.cross_modal_image_layers.*.crossattention.self",
        "text->text": "bridgetower.cross_modal_text_layers.*.attention.self",
    },
}


@pytest.mark.parametrize("name", FUSION)
@pytest.mark.filterwarnings("ignore:A frozen module gave another output")
def test_the_line_works_when_pasted(name):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    family = FAMILIES[name]()
    found = inspect(family.model, **family.inputs)
    callback = eval(str(found.line), {"ABPEM": ABPEM})
    assert callback.settings.fusion == FUSION[name]
    ours, known = (
        find_fusion(family.model, ABPEM(fusion, **options).settings.patterns or [])
        for fusion, options in ((FUSION[name], {}), (family.options["fusion"], _without(family, "fusion", "logits")))
    )
    assert _modules(ours) == _modules(known)
    with torch.inference_mode(), callback.attach(family.model) as adaptation:
        family.model(**family.inputs)
    assert adaptation.updates == 1


def _modules(fusion):
    return {next(iter(attention.parameters)) for attention in fusion.watched}


def _without(family, *names):
    return {name: value for name, value in family.options.items() if name not in names}


def test_modalities_in_one_sequence_without_concatenation():
    pytest.importorskip("transformers")
    family = FAMILIES["Qwen2-Audio, sdpa"]()
    found = inspect(family.model, **family.inputs)
    assert found.line is None
    assert "`modalities` as functions" in found.notes[0]
    assert {row["name"]: row["heads"] for row in found.rows()}["model.language_model.layers.0.self_attn"] == 4


class OneWay(nn.Module):
    """The words attend to the sound; nothing else attends."""

    def __init__(self, own=False):
        super().__init__()
        self.words, self.sound, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.cross = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.own = FusedAttention() if own else nn.Identity()

    def forward(self, words, sound):
        sound = self.own(self.sound(sound))
        return {"scores": self.head(self.cross(self.words(words), sound, sound)[0].mean(1)), "words": words}


def test_a_cross_attention_without_a_self_attention():
    found = inspect(OneWay().eval(), *BATCH)
    assert found.line is None
    [note] = found.notes
    assert note.startswith("No self-attention of 'audio' alone was seen, to whose scores those of 'text->audio' could")
    found = inspect(OneWay(own=True).eval(), *BATCH)
    assert re.search(r'fusion=\{"text->audio": "cross", "audio->audio": "own"\}', str(found.line))
    with eval(str(found.line), {"ABPEM": ABPEM}).attach(OneWay(own=True).eval()) as adaptation:
        adaptation.model(*BATCH)
    assert set(adaptation.params) == {"cross.in_proj_weight", "cross.in_proj_bias"}


class Scattered(nn.Module):
    """A class token between the modalities, and no logits to be found."""

    def __init__(self):
        super().__init__()
        self.audio, self.video = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
        self.cls, self.attn = nn.Parameter(torch.zeros(1, 1, WIDTH)), FusedAttention()

    def forward(self, audio, video):
        cls = self.cls.expand(len(audio), -1, -1)
        return {"tokens": self.attn(torch.cat([self.audio(audio), cls, self.video(video)], 1))}


def test_ranges_where_tokens_belong_to_nobody():
    found = inspect(Scattered(), *BATCH)
    assert found.line is None
    [note] = found.notes
    assert note.startswith("Expected logits in the target's output, but found none in a dict with keys ['tokens'].")
    assert note.endswith(
        'ABPEM(\n    fusion="attn",\n    modalities={"audio": (0, 6), "video": (7, 11)},\n'
        "    logits=lambda output: ...,\n)"
    )


class Question(nn.Module):
    """Words, padded, ask frames; only the words' own attention knows the padding."""

    def __init__(self):
        super().__init__()
        self.words, self.frames = nn.Embedding(50, WIDTH, padding_idx=0), nn.Linear(3, WIDTH)
        self.own_words, self.own_frames, self.cross = (nn.MultiheadAttention(WIDTH, 3, batch_first=True) for _ in "abc")
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words, frames):
        x, y = self.words(words), self.frames(frames)
        x = x + self.own_words(x, x, x, key_padding_mask=words == 0)[0]
        y = y + self.own_frames(y, y, y)[0]
        return self.head((x + self.cross(x, y, y)[0])[:, 0])


def test_padded_queries_are_told_by_their_own_attention():
    """A padded question gets the predictions of each question without its padding."""
    torch.manual_seed(0)
    model = Question().eval()
    words, frames = torch.tensor([[4, 7, 9, 3], [6, 2, 0, 0]]), torch.randn(2, 5, 3)
    found = inspect(model, words, frames)
    assert '"text->text": "own_words"' in str(found.line)
    gaps = []
    for questions in ([(words, frames)], [(words[:1], frames[:1]), (words[1:, :2], frames[1:])]):
        callback = eval(str(found.line), {"ABPEM": ABPEM})
        callback.settings = replace(callback.settings, steps=0)
        with callback.attach(model) as adaptation, torch.no_grad():
            records = []
            for question in questions:
                model(*question)
                records.append(adaptation.record)
            gaps.append(records)
    whole, *_ = (own["attention_gap/text_to_video"] for own in gaps[0])
    parts = torch.stack([own["attention_gap/text_to_video"] for own in gaps[1]])
    torch.testing.assert_close(whole, parts.mean(), rtol=0, atol=1e-6)


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.reads, self.shows = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k = (part.unsqueeze(1) for part in self.reads(x).chunk(2, -1))
        return nn.functional.scaled_dot_product_attention(q, k, self.shows(x).unsqueeze(1)).squeeze(1)


class Detached(FusedAttention):
    """Its scores carry no gradient."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Failing(nn.Module):
    """Can be called once."""

    def __init__(self):
        super().__init__()
        self.toy, self.calls = make_toy(), 0

    def forward(self, audio, video):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("no more")
        return self.toy(audio, video)


class Probabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.toy = make_toy()

    def forward(self, audio, video):
        return self.toy(audio, video).softmax(-1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (make_toy(Unnamed()), "No line to paste: Expected 'fusion.0.attn' to be an attention .* projections="),
        (make_toy(Detached()), "No line to paste: "),
        (Failing().eval(), "No line to paste: RuntimeError: no more"),
        (Probabilities().eval(), "these are probabilities"),
    ],
)
def test_a_line_that_would_be_refused_is_not_printed(model, reason):
    found = inspect(model, *BATCH)
    assert found.line is None
    assert any(re.search(reason, note) for note in found.notes)
    assert "ABPEM(" not in str(found)


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.toy = make_toy()

    def __deepcopy__(self, memo):
        raise TypeError("no copies")

    def forward(self, audio, video):
        audio.mul_(2)  # edits its input
        return self.toy(audio, video)


def test_the_model_and_its_inputs_stay_as_they_were():
    for model in (Uncopyable().eval(), make_toy()):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        inputs = [x.clone() for x in BATCH]
        torch.manual_seed(3)
        assert inspect(model, *inputs).line
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1))
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
        assert torch.equal(inputs[0], BATCH[0] * (2 if isinstance(model, Uncopyable) else 1))


def test_attention_over_other_tokens_is_left_out():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy, self.early = make_toy(), FusedAttention()

        def forward(self, audio, video):
            x = torch.cat((self.toy.audio(audio), self.toy.video(video[:, :2])), dim=1)
            y = torch.cat((self.toy.audio(audio), self.toy.video(video)), dim=1)
            return self.toy.head(self.early(x).mean(1) + self.toy.fusion(y).mean(1))

    found = inspect(Pooled().eval(), *BATCH)
    assert 'fusion="toy.fusion.*.attn"' in str(found.line)
    assert found.notes == ["Left out, for they see other tokens of several modules: early."]
