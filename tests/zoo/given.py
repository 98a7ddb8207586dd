"""Encoders that give more than new tensors."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tests.zoo.nets import WIDTH, Block, Encoder, Net, entry


class _Banked(Encoder):
    def build(self):
        self.bank: Any = []

    def forward(self, x):
        y = super().forward(x)
        return (y + 0.1 * torch.stack(list(self.bank)).mean(0) if self.bank else y), self.bank


@entry("an encoder gives its memory bank, to which the forward appends")
class GivenBank(Net):
    def build(self):
        self.audio = _Banked()

    def encode(self, audio, video):
        x, bank = self.audio(audio)
        bank.append(x.mean((0, 1)).detach())
        return torch.cat((x, self.video(video)), 1)


@entry("the same with a deque that lets the oldest go")
class GivenDeque(GivenBank):
    def build(self):
        super().build()
        self.audio.bank = deque(maxlen=2)


class _Counting(Encoder):
    def build(self):
        self.figures = {"calls": 0}

    def forward(self, x):
        return {"tokens": super().forward(x) * (1 + self.figures["calls"]), "figures": self.figures}


@entry("an encoder gives a dict of its figures inside another, which the forward counts up")
class GivenFigures(Net):
    def build(self):
        self.audio = _Counting()

    def encode(self, audio, video):
        given = self.audio(audio)
        given["figures"]["calls"] += 1
        return torch.cat((given["tokens"], self.video(video)), 1)


class _Passing(Encoder):
    def forward(self, x, seen):
        return super().forward(x) * (1 + 0.1 * len(seen)), seen


@entry("a list of the model goes through an encoder, and is appended to as it came out")
class GivenThrough(Net):
    def build(self):
        self.audio, self.memory = _Passing(), []

    def encode(self, audio, video):
        x, memory = self.audio(audio, self.memory)
        memory.append("seen")
        return torch.cat((x, self.video(video)), 1)


class _WithScale(Encoder):
    def forward(self, x):
        output = BaseModelOutput(last_hidden_state=super().forward(x))
        output.scale = 2.0 + x.mean()
        return output


class _Bridge(Encoder):
    def build(self):
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, given):
        return self.proj(given.last_hidden_state) * getattr(given, "scale", 1.0)


@entry("an encoder gives a ModelOutput with an attribute that is no field")
class OutputWithScale(Net):
    def build(self):
        self.audio = _WithScale()

    def encode(self, audio, video):
        given = self.audio(audio)
        return torch.cat((given.last_hidden_state * getattr(given, "scale", 1.0), self.video(video)), 1)


@entry("a frozen bridge gets a ModelOutput with an attribute that is no field")
class BridgeWithScale(OutputWithScale):
    def build(self):
        super().build()
        self.bridge = _Bridge()

    def encode(self, audio, video):
        return torch.cat((self.bridge(self.audio(audio)), self.video(video)), 1)


class _Ordered(Encoder):
    def forward(self, x):
        output = OrderedDict(last_hidden_state=super().forward(x))
        output.scale = 3.0  # type: ignore[attr-defined]
        return output


@entry("an encoder gives an OrderedDict with an attribute")
class OrderedWithScale(OutputWithScale):
    def build(self):
        self.audio = _Ordered()

    def encode(self, audio, video):
        given = self.audio(audio)
        return torch.cat((given["last_hidden_state"] * getattr(given, "scale", 1.0), self.video(video)), 1)


class _Features(namedtuple("_Features", ["last_hidden_state"])):
    """Is made in a way of its own, and knows its scale."""

    def __new__(cls, x, *, scale):
        made = super().__new__(cls, x)
        made.scale = scale  # type: ignore[attr-defined]
        return made


class _Named(Encoder):
    def forward(self, x):
        return _Features(super().forward(x), scale=2.5)


@entry("an encoder gives a named tuple that is made in a way of its own")
class NamedWithScale(OutputWithScale):
    def build(self):
        self.audio = _Named()


@entry("a frozen bridge gets a named tuple that is made in a way of its own")
class BridgeNamed(BridgeWithScale):
    def build(self):
        super().build()
        self.audio = _Named()


class _BlockOfNamed(Block):
    def forward(self, given):
        return given.scale * super().forward(given.last_hidden_state)


@entry("the fusion block gets such a named tuple", memory_refused="got a _Features, which has attributes")
class BlockNamed(Net):
    def build(self):
        self.fusion = nn.ModuleList([_BlockOfNamed()])

    def classify(self, x):
        return 3 * self.head(self.fusion[0](_Features(x, scale=1.5)).mean(1))


class _Prototypes(Encoder):
    prototypes: torch.Tensor

    def build(self):
        self.register_buffer("prototypes", torch.randn(4, WIDTH))

    def forward(self, x):
        return super().forward(x) + self.prototypes.mean(0), self.prototypes[1:]


@entry("an encoder gives a part of its buffer, which the next call of the forward edits")
class GivenBuffer(Net):
    def build(self):
        self.audio, self.kept = _Prototypes(), None

    def encode(self, audio, video):
        if self.kept is not None:
            self.kept *= 0.5
        x, self.kept = self.audio(audio)
        return torch.cat((x, self.video(video)), 1)


@entry("an encoder gives a part of its buffer, which is edited behind the fusion where there are no gradients")
class GivenBehind(GivenBuffer):
    def forward(self, audio, video):
        x, prototypes = self.audio(audio)
        logits = self.classify(torch.cat((x, self.video(video)), 1))
        if not torch.is_grad_enabled():
            prototypes *= 0.5
        return logits
