"""Encoders that give more than new tensors."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from tests.zoo.nets import Encoder, Net, entry


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
