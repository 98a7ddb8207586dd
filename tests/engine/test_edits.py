"""Forwards that edit their inputs, carry state, share storage or call themselves, through `attach`."""

from collections import UserDict
from dataclasses import dataclass, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.attached import abpem, predictions
from tests.toy import (
    AUDIO,
    CLASSES,
    VIDEO,
    WIDTH,
    FusedAttention,
    Toy,
    batches,
    make_toy,
)


class OwnDict(dict):
    """A dict that torch's trees take for a leaf."""


@dataclass
class Pair:
    audio: torch.Tensor
    video: dict


@dataclass(frozen=True)
class Frozen:
    audio: torch.Tensor
    video: dict


class Stashing(nn.Module):
    """A frozen head that reads what the fusion left behind, with a gradient, and gets no tensor."""

    state: Tensor

    def __init__(self):
        super().__init__()
        self.toy = make_toy()
        self.toy.fusion.register_forward_hook(lambda module, args, output: setattr(self, "state", output))
        self.reader: Any = nn.Linear(WIDTH, CLASSES)
        self.reader.forward = self._read  # type: ignore[assignment]

    def _read(self) -> Any:
        return nn.functional.linear(self.state.mean(1), self.reader.weight)

    def forward(self, audio, video):
        self.toy(audio, video)
        return self.reader()


class InPlace(nn.Module):
    """A residual added in place to what a frozen linear puts out."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.norm = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.fusion: Any = nn.Sequential(nn.ModuleDict({"attn": FusedAttention()}))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, audio, video):
        x = self.proj(self.embed(torch.cat([audio, video], 1)))
        x += self.fusion[0]["attn"](self.norm(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize("make", [Stashing, InPlace])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_replay_changes_nothing_where_state_or_storage_is_shared(make, weight):
    predictions = []
    for replay in (True, False):
        torch.manual_seed(0)
        model = make().eval()
        fusion = "toy.fusion.*.attn" if make is Stashing else "fusion.*.attn"
        with torch.no_grad(), abpem(fusion=fusion, replay=replay, attention_weight=weight).attach(model) as adaptation:
            predictions.append(torch.stack([model(*args) for args in batches()]))
        assert adaptation.updates == len(batches())
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


class Mutating(nn.Module):
    """Edits its inputs in place, and takes them out of their dict."""

    def __init__(self):
        super().__init__()
        self.inner = make_toy()

    def forward(self, batch):
        audio = batch.pop("audio")
        audio -= 1
        return self.inner(audio, batch["video"])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_forward_that_edits_its_inputs(steps):
    shifted = [(audio - 1, video) for audio, video in batches()]
    expected = predictions(make_toy(), shifted, steps=steps)
    model = Mutating().eval()
    with torch.no_grad(), abpem(fusion="inner.fusion.*.attn", steps=steps).attach(model):
        for (audio, video), logits in zip(batches(), expected, strict=True):
            batch = {"audio": audio.clone(), "video": video}
            assert torch.equal(model(batch), logits)
            assert set(batch) == {"video"}


class Masked(nn.Module):
    """Gets the masks of its modalities with the batch, and may turn them over in place, as paddings are made."""

    def __init__(self, turns):
        super().__init__()
        self.inner, self._turns = make_toy(), turns

    def forward(self, batch):
        if self._turns:
            batch["is_audio"].logical_not_()
            batch["is_video"].logical_not_()
        return self.inner(batch["audio"], batch["video"])


def masked_batches(count):
    """Batches in which every sample but the first lacks more and more tokens at the end of its audio."""
    for i, (audio, video) in enumerate(batches(count)):
        token, lengths = torch.arange(AUDIO + VIDEO), AUDIO - (torch.arange(len(audio)) + i) % 4
        yield {
            "audio": audio,
            "video": video,
            "is_audio": token < lengths[:, None],
            "is_video": (token >= AUDIO).repeat(len(audio), 1),
        }


@pytest.mark.parametrize(("turns", "is_static"), [(True, False), (False, True)])
@pytest.mark.parametrize("memory", [1, 4])
def test_masks_that_are_edited_after_they_were_given(turns, is_static, memory):
    """By the forward, or by a loader that fills the same buffers anew."""
    seen = []
    copied = {"audio": lambda batch: batch["is_audio"].clone(), "video": lambda batch: batch["is_video"].clone()}
    for masks in (copied, {"audio": lambda batch: batch["is_audio"], "video": lambda batch: batch["is_video"]}):
        own: dict[str, Tensor] = {}
        logits = []
        options = {"fusion": "inner.fusion.*.attn", "modalities": masks, "memory_batches": memory}
        with torch.no_grad(), abpem(**options).attach(Masked(turns).eval()) as adaptation:
            for batch in masked_batches(6):
                own = own if own and is_static else {name: torch.empty_like(x) for name, x in batch.items()}
                for name, x in batch.items():
                    own[name].copy_(x)
                logits.append(adaptation.model(own))
        assert adaptation.updates == 6
        seen.append(torch.stack(logits))
    assert torch.equal(*seen)


class Twice(Toy):
    """Its forward calls itself on the sequence turned around."""

    def forward(self, audio, video, turned=False):
        logits = super().forward(audio, video)
        if turned:
            return logits
        self.interrupt()
        return (logits + self(audio.flip(1), video, turned=True)) / 2

    def interrupt(self):
        """Nothing."""


@pytest.mark.parametrize("options", [{}, {"predicts": "before"}, {"reset": "batch"}])
def test_a_forward_that_calls_itself_is_one_call(options):
    model = make_toy()
    model.__class__ = Twice
    outputs = []
    with torch.no_grad(), abpem(**options).attach(model) as adaptation:
        for args in batches(4):
            outputs.append(model(*args))
            if options.get("predicts") != "before":  # both views by the weights of now
                audio, video = args
                views = [Toy.forward(model, view, video) for view in (audio, audio.flip(1))]
                torch.testing.assert_close(outputs[-1], sum(views) / 2)
        assert adaptation.calls == adaptation.updates == 4


def test_a_call_that_was_interrupted_is_over():
    model: Any = make_toy()
    model.__class__ = Twice
    with torch.no_grad(), abpem().attach(model) as adaptation:
        calls = []
        for i, args in enumerate(batches(4)):

            def interrupt(i=i):
                calls.append(i)
                if calls.count(1) == 2:  # in the second batch's prediction
                    calls.append(None)
                    raise KeyboardInterrupt

            model.interrupt = interrupt
            try:
                model(*args)
            except KeyboardInterrupt:
                calls.append(1)
        assert adaptation.calls == adaptation.updates == 4


class Streaming(Toy):
    """Its video is mixed with a hidden state, which every call moves."""

    def __init__(self, way):
        super().__init__()
        self.load_state_dict(make_toy().state_dict())
        self.way, self.hidden = way, torch.zeros(1, VIDEO, 3)
        if way == "buffer":
            del self.hidden
            self.register_buffer("hidden", torch.zeros(1, VIDEO, 3))

    def forward(self, audio, video):
        hidden = 0.5 * self.hidden + video.mean(0, keepdim=True)
        if self.way == "in place":
            self.hidden.copy_(hidden)
        else:
            self.hidden = hidden
        return super().forward(audio, video + hidden)


@pytest.mark.parametrize("way", ["buffer", "attribute", "in place"])
def test_state_that_a_forward_carries_moves_once_for_a_batch(way):
    expected, model = Streaming(way).eval(), Streaming(way).eval()
    with torch.no_grad():
        plain = [expected(*args) for args in batches(4)]
        with abpem(steps=0).attach(model):
            outputs = [model(*args) for args in batches(4)]
        assert all(map(torch.equal, outputs, plain))
        assert torch.equal(model.hidden, expected.hidden)
        moved = Streaming(way).eval()
        with abpem(steps=2).attach(moved) as adaptation:
            for args in batches(4):
                moved(*args)
        assert adaptation.updates == 8
        assert torch.equal(moved.hidden, expected.hidden)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("kind", [UserDict, OwnDict, Pair, Frozen])
def test_a_forward_that_edits_other_containers(kind, inference_mode):
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_toy()

        def forward(self, batch):
            if isinstance(batch, Frozen | Pair):
                audio, video = batch.audio, batch.video["tokens"]
            else:
                audio, video = batch.pop("audio"), batch["video"]["tokens"]
            audio -= 1
            return self.inner(audio, video)

    expected = predictions(make_toy(), [(audio - 1, video) for audio, video in batches()])
    model = Taking().eval()
    with torch.inference_mode(inference_mode), torch.no_grad(), abpem(fusion="inner.fusion.*.attn").attach(model):
        for (audio, video), logits in zip(batches(), expected, strict=True):
            batch = kind(audio=audio.clone(), video={"tokens": video.clone()})
            assert torch.equal(model(batch), logits)
            assert is_dataclass(batch) or set(batch) == {"video"}
