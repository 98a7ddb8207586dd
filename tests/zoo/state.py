"""Encoders and models that carry state from call to call, each in another place."""

from __future__ import annotations

import functools
import random
from collections import deque
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn

from tests.zoo.nets import WIDTH, Encoder, Net, Refusal, entry

ROWS = "after the fusion it holds a row for each sample, and a memory brings more of them"


@entry("a tensor that is None at first")
class NoneAtFirst(Encoder):
    def build(self):
        self.state = None

    def forward(self, x):
        x = super().forward(x)
        self.state = x if self.state is None else 0.5 * self.state + x
        return self.state


@entry("an attribute that is not there at first")
class MissingAtFirst(Encoder):
    def forward(self, x):
        x = super().forward(x)
        self.state = x + getattr(self, "state", 0)
        return self.state


@entry("an LSTM's pair of tensors")
class LstmPair(Encoder):
    def build(self):
        self.lstm, self.state = nn.LSTM(WIDTH, WIDTH, batch_first=True), None

    def forward(self, x):
        x, self.state = self.lstm(super().forward(x), self.state)
        return x


@entry("an LSTM's pair behind the fusion", memory=ROWS)
class LstmBehind(Net):
    def build(self):
        self.lstm, self.state = nn.LSTM(WIDTH, WIDTH, batch_first=True), None

    def forward(self, audio, video):
        x, self.state = self.lstm(self.fusion(self.encode(audio, video)).mean(1)[:, None], self.state)
        return 3 * self.head(x[:, 0])


@entry("a list that grows")
class ListOfTensors(Encoder):
    def build(self):
        self.seen = []

    def forward(self, x):
        self.seen.append(super().forward(x))
        return sum(self.seen) / len(self.seen)


@entry("a list whose tensors are edited in place")
class ListEditedInPlace(Encoder):
    def build(self):
        self.ring = [torch.zeros(WIDTH, dtype=torch.double) for _ in range(2)]
        self.at = 0

    def forward(self, x):
        x = super().forward(x)
        self.ring[self.at].copy_(x.mean((0, 1)))
        self.at = (self.at + 1) % 2
        return x + self.ring[0] - self.ring[1]


@entry("a dict whose keys come with the batches")
class DictOfTensors(Encoder):
    def build(self):
        self.seen = {}

    def forward(self, x):
        x = super().forward(x)
        self.seen[f"call {len(self.seen)}"] = x.mean()
        return x * len(self.seen)


@entry("a deque that lets the oldest go, and a set")
class DequeAndSet(Encoder):
    def build(self):
        self.last: deque[Tensor] = deque(maxlen=2)
        self.names: set[int] = set()

    def forward(self, x):
        x = super().forward(x)
        self.last.append(x.mean(1, keepdim=True))
        self.names.add(len(self.names))
        return x + sum(self.last) * len(self.names)


class Keeps:
    inner: dict[str, Any]

    def __init__(self) -> None:
        self.steps = 0
        self.state: Any = None


@entry("an object of one's own")
class OwnState(Encoder):
    def build(self):
        self.keeps = Keeps()

    def forward(self, x):
        x = super().forward(x)
        self.keeps.state = x if self.keeps.state is None else x + self.keeps.state
        self.keeps.steps += 1
        return self.keeps.state / self.keeps.steps


@entry("objects in dicts in objects, and one that two modules share")
class NestedState(Net):
    def build(self):
        shared = Keeps()
        shared.inner = {"deep": [Keeps(), shared]}
        self.audio.keeps = self.head.keeps = shared

    def forward(self, audio, video):
        deep, again = self.audio.keeps.inner["deep"]
        deep.steps += 1
        again.steps += deep.steps
        return super().forward(audio * self.head.keeps.steps, video)


@entry("a module with __slots__: its state is in no __dict__")
class SlottedModule(Encoder):
    __slots__ = ("kept",)

    def forward(self, x):
        x = super().forward(x)
        self.kept = x + getattr(self, "kept", 0)
        return self.kept


@entry("a hook of the user's appends to a list", refused=Refusal("opening", "hook|closure", is_needed=False))
def hook_with_a_list() -> Net:
    net, seen = Net(), []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.mean())
        return output * len(seen)

    net.audio.register_forward_hook(hook)
    return net


@entry("a hook of the user's counts in its closure", refused=Refusal("opening", "hook|closure", is_needed=False))
def hook_with_a_count() -> Net:
    net, count = Net(), 0

    def hook(module: nn.Module, args: Any) -> Any:
        nonlocal count
        count += 1
        return (args[0] * count,)

    net.fusion.register_forward_pre_hook(hook)
    return net


@entry("a hook of the user's is a method of an object that counts")
def hook_of_an_object() -> Net:
    class Counts:
        def __init__(self) -> None:
            self.count = 0
            self.features: list[Tensor] = []

        def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.count += 1
            self.features.append(output)
            return output * self.count

    net: Any = Net()
    net.counts = Counts()
    net.video.register_forward_hook(net.counts.hook)
    return net


@entry("a counter: every second call is another")
class EverySecondCall(Encoder):
    def build(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x if self.calls % 2 else -x)


@entry("generators of all kinds, kept in the module and drawn from")
class OwnGenerators(Encoder):
    def build(self):
        self.python, self.numpy = random.Random(3), np.random.default_rng(3)
        self.torch = torch.Generator().manual_seed(3)

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.torch, dtype=x.dtype)
        return super().forward(x + noise * self.python.random() + self.numpy.normal())


@entry("a state that is a class's, for all of its objects", refused=Refusal("opening", "class", is_needed=False))
def class_attribute() -> Net:
    class Counts(Encoder):
        calls = 0
        seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            self.seen.append(x.mean())
            return super().forward(x) * self.calls

    return Net(Counts())


@entry("modules in a plain list, which nobody registered")
class UnregisteredModules(Encoder):
    def build(self):
        self.extras = [LstmPair()]
        self.extras[0].double()

    def forward(self, x):
        return self.extras[0](x) + super().forward(x)


@entry("a metric of torchmetrics in the forward")
class MetricInForward(Encoder):
    def build(self):
        self.metric = torchmetrics.MeanMetric()
        self.values = torchmetrics.CatMetric()

    def forward(self, x):
        self.metric.update(x)
        self.values.update(x[:, 0, 0])
        return super().forward(x) + self.metric.compute() + self.values.compute().sum()


@entry("a table by functools.lru_cache: the module's, but in no attribute of it")
class CachedTable(Encoder):
    @functools.lru_cache(maxsize=4)  # noqa: B019
    def table(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.double)[:, None] * self.embed.bias

    def forward(self, x):
        return super().forward(x) + self.table(x.shape[1])


@entry("the prediction is the state itself, which the next call edits", memory=ROWS)
class OutputIsState(Net):
    last: Tensor

    def build(self):
        self.register_buffer("last", torch.zeros(3, 5))

    def forward(self, audio, video):
        logits = super().forward(audio, video)
        with torch.no_grad():
            self.last.mul_(0.5)
        return logits + self.last if torch.is_grad_enabled() else self.last.add_(logits)


@entry(
    "an exponential mean kept as a frozen parameter", refused=Refusal("call", "edited 'audio.mean'", moved="audio.mean")
)
class ParameterAsState(Encoder):
    def build(self):
        self.mean = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x):
        x = super().forward(x)
        self.mean.data.lerp_(x.mean((0, 1)), 0.5)
        return x - self.mean


@entry(
    "prototypes that are parameters in a plain list, which the forward moves",
    refused=Refusal("call", r"edited attribute 'prototypes' of module 'audio', 0 in place"),
)
class ParametersInAList(Encoder):
    def build(self):
        self.prototypes = [nn.Parameter(torch.zeros(WIDTH), requires_grad=False)]

    @torch.no_grad()
    def move(self, x):
        self.prototypes[0].lerp_(x.mean((0, 1)).float(), 0.5)

    def forward(self, x):
        x = super().forward(x)
        self.move(x)
        return x - self.prototypes[0]
