"""`inspect`: what it shows, and that the line it gives works when pasted."""

import re

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


FUSION = {  # what the line names, by family
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
    callback = eval(found.line, {"ABPEM": ABPEM})
    assert callback.settings.fusion == FUSION[name]
    ours, known = (
        find_fusion(family.model, ABPEM(fusion, **options).settings.patterns)
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
    assert found.line == 'ABPEM(fusion={"text->audio": "cross"}, logits=lambda output: output[\'scores\'])'
    assert found.notes == ["No self-attention of 'audio' alone was seen: name the one that 'audio->audio' stands for."]
    found = inspect(OneWay(own=True).eval(), *BATCH)
    assert re.search(r'fusion=\{"text->audio": "cross", "audio->audio": "own"\}', found.line)
    with eval(found.line, {"ABPEM": ABPEM}).attach(OneWay(own=True).eval()) as adaptation:
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
    line = inspect(Scattered(), *BATCH).line
    assert line == (
        'ABPEM(\n    fusion="attn",\n    modalities={"audio": (0, 6), "video": (7, 11)},\n'
        "    logits=lambda output: ...,\n)"
    )
