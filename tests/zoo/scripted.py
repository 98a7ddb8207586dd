"""Scripted parts, which keep their state in C++; TorchScript wants annotations that are no strings."""

import torch
from torch import Tensor, nn

from tests.zoo.nets import WIDTH, Net, entry


class _Counts(nn.Module):
    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.linear = 0, nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Counts()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Lists(nn.Module):
    seen: list[Tensor]
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.jit.annotate(list[Tensor], [])
        self.register_buffer("mean", torch.zeros(1))
        self.linear = nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean())
        self.mean = self.mean + 1
        return self.linear(x) * len(self.seen) + self.mean


@entry("a scripted part inside a scripted one counts its calls")
class ScriptedCount(Net):
    def build(self):
        self.audio = torch.jit.script(_Around())


@entry("a scripted part keeps a list of tensors, and replaces a buffer")
class ScriptedList(Net):
    def build(self):
        self.audio = torch.jit.script(_Lists())


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x).tanh())


def _with_video(change) -> Net:
    net = Net().double().eval()
    net.video = change(torch.jit.script(_Embedding().double().eval()))
    return net


@entry("an encoder that torch.jit.freeze has taken the parameters of")
def frozen_script() -> Net:
    return _with_video(torch.jit.freeze)


@entry("an encoder by torch.jit.optimize_for_inference")
def optimized_script() -> Net:
    return _with_video(torch.jit.optimize_for_inference)
