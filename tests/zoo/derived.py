"""Weights that modules derive from others, make late or keep, and modules that are built late."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.zoo.nets import WIDTH, Encoder, Net, Refusal, entry


@entry("a weight that is derived in the first call and kept")
class DerivedOnce(Encoder):
    def build(self):
        self.derived = None

    def forward(self, x):
        if self.derived is None:
            self.derived = self.embed.weight / self.embed.weight.norm()
        return self.norm((x @ self.derived.mT).tanh())


@entry("a weight behind the fusion that is derived in the first call, as a constant, and kept")
class DerivedBehind(Net):
    def build(self):
        self.kept: dict[str, Tensor] = {}

    def classify(self, x):
        if "head" not in self.kept:
            self.kept["head"] = self.head[1].weight.detach() * 2
        return self.head[0](self.fusion(x).mean(1)) @ self.kept["head"].mT


@entry("a state that depends on what adapts, made with gradients in the adapting pass", memory="its state has rows")
class StateOfAdapted(Net):
    def build(self):
        self.last = None

    def classify(self, x):
        x = self.fusion(x)
        self.last = x if self.last is None else x + 0.5 * self.last
        return 3 * self.head(self.last.mean(1))


@entry("the old weight_norm: a hook sets the weight before each call")
def weight_norm_old() -> Net:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.audio.embed = nn.utils.weight_norm(net.audio.embed)
        net.fusion[0].attn.out = nn.utils.weight_norm(net.fusion[0].attn.out)
    return net


@entry("the new weight_norm: a parametrization")
def weight_norm_new() -> Net:
    net = Net()
    parametrizations.weight_norm(net.audio.embed)
    parametrizations.weight_norm(net.head[1])
    return net


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@entry("a parametrization that counts its calls")
def counting_parametrization() -> Net:
    net = Net()
    # Registered unsafely, or torch calls it once more for a check.
    parametrize.register_parametrization(net.audio.embed, "weight", Counts(), unsafe=True)
    return net


@entry("pruned: a mask and a hook that sets the weight")
def pruned() -> Net:
    net = Net()
    prune.l1_unstructured(net.audio.embed, "weight", 0.4)
    prune.random_unstructured(net.fusion[0].attn.out, "weight", 0.3)
    return net


@entry("the old spectral_norm set to train in the step: its vectors move in place")
class SpectralNormTrain(Net):
    def build(self):
        nn.utils.spectral_norm(self.video.embed)

    def step(self, call):
        self.video.embed.train()
        return super().step(call)


@entry("the new spectral_norm set to train in the step")
class SpectralParametrizationTrain(Net):
    def build(self):
        parametrizations.spectral_norm(self.video.embed)

    def step(self, call):
        self.video.embed.parametrizations.train()
        return super().step(call)


@entry(
    "a submodule that is built in the first call, and draws its weights",
    refused=Refusal("call", "adapter|built|new module|registered", is_needed=False),
)
class LazySubmodule(Encoder):
    def forward(self, x):
        if not hasattr(self, "adapter"):
            self.adapter = nn.Linear(WIDTH, WIDTH, dtype=x.dtype)
        return self.adapter(super().forward(x))


@entry(
    "torch's lazy layer: its first call makes its weights",
    refused=Refusal("opening", "(?i)lazy|uninitialized", is_needed=False),
)
class LazyLayer(Encoder):
    def build(self):
        self.lazy = nn.LazyLinear(WIDTH, dtype=torch.double)

    def forward(self, x):
        return self.lazy(super().forward(x))


@entry("the model swaps one of its submodules for another, from call to call")
class SwapsSubmodules(Net):
    def build(self):
        self.audio, self.other = Encoder(), Encoder()

    def forward(self, audio, video):
        self.audio, self.other = self.other, self.audio
        return super().forward(audio, video)
