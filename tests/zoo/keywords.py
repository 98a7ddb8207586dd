"""Modules that are called by keywords, some of them named like the engine's own parameters."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.nets import WIDTH, Block, Call, Encoder, Net, entry

WORDS = (
    *("key", "forward", "tokens", "target_call", "module", "original", "wrapper", "first", "changes", "args", "kwargs"),
    *("func", "function", "name", "owner", "call", "call_index", "output", "model", "target"),
)
"""Names of parameters of what stands around a module's call, and likely ones."""


@entry("a frozen cross-attention ahead of the fusion, called by query=, key= and value=")
class CrossAttended(Net):
    def build(self):
        self.cross = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def encode(self, audio, video):
        x, y = self.audio(audio), self.video(video)
        return torch.cat((x + self.cross(query=x, key=y, value=y)[0], y), 1)


class _Worded(nn.Module):
    """Calls another module, and adds what it gets by keyword."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, **words):
        return self.inner(x) + sum(words.values())


@entry("every module gets keywords that are named like the engine's own parameters")
class Worded(Net):
    def build(self):
        self.audio = _Worded(Encoder())
        self.fusion = nn.ModuleList([_WordedBlock()])

    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, **dict.fromkeys(WORDS, 0.01))

    def forward(self, audio, video, **words):
        x = torch.cat((self.audio(audio, **words), self.video(video)), 1)
        return 3 * self.head(self.fusion[0](x=x, **words).mean(1))


class _WordedBlock(Block):
    def forward(self, x, **words):
        return super().forward(x) + sum(words.values())
