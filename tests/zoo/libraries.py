"""State as libraries keep it: dicts with ways of their own, arrays, maps, distributions, optimizers, models."""

from __future__ import annotations

import functools
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from mmap import mmap
from typing import Any

import attrs
import numpy as np
import pydantic
import torch
import torchmetrics
from sklearn.decomposition import IncrementalPCA
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision
from transformers import DynamicCache, LlamaConfig, LlamaModel, MambaConfig, MambaModel

from tests.zoo.nets import CLASSES, WIDTH, Call, Encoder, Net, entry

# --------------------------------------------------------------------------------------------------------- containers


class AttrDict(dict):
    """Its missing attributes are a KeyError."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


@entry("dicts whose items are attributes, as argument and as state")
class AttrDicts(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(AttrDict(audio=audio, video=video, steps=1))

    def build(self):
        self.state: Any = AttrDict(calls=0)

    def forward(self, batch):
        self.state.calls += 1
        batch.steps += 1
        batch.audio = batch.audio * batch.steps
        return super().forward(batch.audio * self.state.calls, batch.video)


class Decoding(OrderedDict):
    """Gives its values doubled, and its keys sorted."""

    def __getitem__(self, key: str) -> Any:
        return 2 * super().__getitem__(key)

    def __iter__(self) -> Any:
        return iter(sorted(super().__iter__()))

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]


class Backwards(list):
    def __iter__(self) -> Any:
        return reversed(self)


@entry("a dict and a list whose own ways of reading are other ones")
class OwnWaysOfReading(Encoder):
    def build(self):
        self.table, self.list = Decoding(b=1, a=2), Backwards([1, 2])

    def forward(self, x):
        self.table["b"] = self.table["b"] + 1
        self.table.move_to_end("b", last=self.table["b"] % 3 == 0)
        self.list.append(self.list[-1] + 1)
        return super().forward(x) * self.table["b"] * self.list[-1]


class Thing:
    def __repr__(self) -> str:
        return "Thing"


@entry("a weak set, an event and a read-only view of a dict")
class SmallOnes(Encoder):
    def build(self):
        self.things = [Thing() for _ in range(9)]
        self.seen: weakref.WeakSet[Thing] = weakref.WeakSet()
        self.table: Mapping[str, list[int]] = types.MappingProxyType({"calls": []})
        self.is_over, self.factor = threading.Event(), 1

    def forward(self, x):
        self.seen.add(self.things[len(self.seen)])
        self.table["calls"].append(1)
        if not self.is_over.is_set():
            self.is_over.set()
            self.factor = 3
        return super().forward(x) * self.factor * len(self.seen) * len(self.table["calls"])


class Row(tuple):
    reads = 0


class OwnRandom(random.Random):
    draws = 0


@entry("a tuple and a generator with attributes of their own")
class AttributesBesides(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Row((audio, video)))

    def build(self):
        self.random = OwnRandom(3)
        own: Any = functools.partial(int)
        own.calls = 0
        self.partial: Any = own

    def forward(self, row):
        row.reads += 1
        self.random.draws += 1
        self.partial.calls += 1
        factor = self.random.random() + self.random.draws + self.partial.calls
        return super().forward(row[0] * row.reads * factor, row[1])


@attrs.define
class AttrsBatch:
    audio: Any
    video: Any
    log: list = attrs.field(factory=list)

    @functools.cached_property
    def shifted(self) -> Any:
        self.log.append(1)
        return self.audio + len(self.log)


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    calls: int = 0
    _private: int = 0


@entry("classes of attrs, with slots and a property that is kept, and of pydantic, with private and extra attributes")
class AttrsAndPydantic(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(AttrsBatch(audio, video))

    def build(self):
        self.state: Any = Model()

    def forward(self, batch):
        self.state.calls += 1
        self.state._private += self.state.calls
        self.state.more = getattr(self.state, "more", 0) + 1
        factor = self.state.calls + self.state._private + self.state.more
        return super().forward(batch.shifted * len(batch.log), batch.video * factor)


class Tracker:
    calls = 0


Tracker.__module__ = "code.tracking"
sys.modules["code.tracking"] = types.ModuleType("code.tracking")
sys.modules["code.tracking"].__file__ = __file__


@entry("a class of a package that is called as one of the standard library: code")
class NamedLikeAStandardOne(Encoder):
    def build(self):
        self.tracker = Tracker()

    def forward(self, x):
        self.tracker.calls += 1
        return super().forward(x) * self.tracker.calls


# ------------------------------------------------------------------------------------------------------------- arrays


class Frame(np.ndarray):
    """As libraries have them that know units or coordinates."""


@entry("arrays: of the user's own class, masked, made longer in place, and read-only")
class Arrays(Encoder):
    def build(self):
        self.frame, self.log = np.zeros(WIDTH).view(Frame), np.zeros(1)
        self.masked: Any = np.ma.array([1.0, 2.0], mask=[True, False])
        self.fixed = np.frombuffer(b"12345678")

    def forward(self, x):
        self.frame += 1
        self.masked.mask[0] = not self.masked.mask[0]
        self.masked.data[0] += 1
        self.log.resize(len(self.log) + 1, refcheck=False)
        self.log[-1] = len(self.log)
        factor = self.masked.sum() + self.log.sum() + self.fixed.sum()
        return super().forward(x) * torch.from_numpy(np.asarray(self.frame).copy()) * factor


@entry("memory that is mapped, read by position and by a view")
class MappedMemory(Encoder):
    def build(self):
        self.map, self.viewed = mmap(-1, 16), memoryview(mmap(-1, 16))
        self.map[:4] = bytes([3, 1, 4, 1])

    def forward(self, x):
        self.viewed[0] += 1
        self.map[0] += 1
        return super().forward(x) * (self.map.read_byte() + self.map[0] + self.viewed[0])


@entry("NumPy's generator makes a child in each call")
class MakesChildren(Encoder):
    def build(self):
        self.generator, self.seeds = np.random.default_rng(3), np.random.SeedSequence(4)

    def forward(self, x):
        child = self.generator.spawn(1)[0].random() + np.random.default_rng(self.seeds.spawn(1)[0]).random()
        return super().forward(x) * child


# ------------------------------------------------------------------------------------------ torch and what is about it


@entry("a distribution of torch's, whose attributes the forward sets and edits")
class Distribution(Encoder):
    def build(self):
        self.prior = torch.distributions.Normal(torch.zeros(WIDTH).double(), torch.ones(WIDTH).double())

    def forward(self, x):
        x = super().forward(x)
        self.prior.loc = 0.5 * self.prior.loc + x.mean((0, 1))
        self.prior.scale.mul_(1.5)
        return (x - self.prior.mean) / self.prior.stddev


@entry("a latent with a gradient, which an optimizer with moments moves in the forward")
class OwnOptimizer(Encoder):
    def build(self):
        self.latent = torch.ones(WIDTH, dtype=torch.double, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.latent], lr=0.1)

    def forward(self, x):
        x = super().forward(x)
        with torch.inference_mode(False), torch.enable_grad():
            loss = (x.detach().clone().mean((0, 1)) * self.latent).square().sum()
            loss.backward()
            self.optimizer.step()
        return x * self.latent.detach()


@entry("metrics that share their states, and one over the last batches")
class MetricsTogether(Net):
    def build(self):
        kinds: dict[str, Any] = {"accuracy": MulticlassAccuracy(CLASSES), "precision": MulticlassPrecision(CLASSES)}
        self.metrics = torchmetrics.MetricCollection(kinds)
        self.running = torchmetrics.wrappers.Running(torchmetrics.MeanMetric(), window=2)

    def forward(self, audio, video):
        x = self.encode(audio, video)
        guess = x.mean(1)[:, :CLASSES]
        seen = self.metrics(guess.softmax(-1), torch.arange(len(x)))
        x = x * (1 + seen["accuracy"] + self.metrics.compute()["precision"]) + self.running(guess.mean())
        return self.classify(x + self.running.compute())


@entry("an estimator of scikit-learn's, fitted further in each call")
class FitsFurther(Encoder):
    def build(self):
        self.pca = IncrementalPCA(2)

    def forward(self, x):
        flat = x.detach().flatten(0, 1).numpy()
        self.pca.partial_fit(flat)
        return super().forward(x) + self.pca.transform(flat).sum()


SMALL: dict[str, Any] = {"hidden_size": WIDTH, "vocab_size": 8}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@entry("Hugging Face's Llama, whose rotary positions grow, with a cache that stays in the module")
class StreamingLlama(Encoder):
    def build(self):
        sizes: dict[str, Any] = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"max_position_embeddings": 8, "rope_scaling": ROPE}
        config = LlamaConfig(**SMALL, **sizes)
        self.llama, self.cache = LlamaModel(config), DynamicCache(config=config)

    def forward(self, x):
        x = super().forward(x)
        return self.llama(inputs_embeds=x, past_key_values=self.cache, use_cache=True).last_hidden_state


@entry("Hugging Face's Mamba, with its states from call to call")
class StreamingMamba(Net):
    def build(self):
        self.mamba, self.cache = MambaModel(MambaConfig(**SMALL, state_size=4, num_hidden_layers=1)), None

    def encode(self, audio, video):
        first = self.audio(audio[:, :1])
        given = self.mamba(inputs_embeds=first, use_cache=True, cache_params=self.cache)
        self.cache = given.cache_params
        return super().encode(audio, video) + given.last_hidden_state


@entry("packed sequences as arguments, edited, and a state that they leave")
class Packed(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(nn.utils.rnn.pack_padded_sequence(audio, [6, 5, 4], batch_first=True), video)

    def build(self):
        self.gru, self.state = nn.GRU(3, 3, batch_first=True), None

    def forward(self, audio, video):
        x, self.state = self.gru(audio, self.state)
        audio.data.mul_(2)
        x, _ = nn.utils.rnn.pad_packed_sequence(x, batch_first=True, total_length=6)
        return super().forward(x, video)


# --------------------------------------------------------------------------------------------- of torch's own package


@entry("a support set in torch's TensorDataset, whose rows are replaced one by one")
class SupportSet(Encoder):
    def build(self):
        self.support, self.calls = TensorDataset(torch.ones(4, WIDTH, dtype=torch.double), torch.arange(4)), 0

    def forward(self, x):
        x = super().forward(x)
        bank = self.support.tensors[0]
        output = x + bank.mean(0)
        bank[self.calls % 4] = x.detach().mean((0, 1))
        self.calls += 1
        return output


@entry("a subset of a support set, which grows by an index in each call")
class GrowingSubset(Encoder):
    def build(self):
        self.support: Any = Subset(TensorDataset(torch.arange(8).double()), [0])

    def forward(self, x):
        self.support.indices.append(len(self.support) % 8)
        return super().forward(x) + torch.stack([row for (row,) in self.support]).sum()
