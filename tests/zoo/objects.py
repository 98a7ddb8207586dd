"""Arguments that are objects with a life of their own: caches, generators, modules, locks, functions."""

from __future__ import annotations

import threading
from abc import ABC
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.zoo.nets import WIDTH, Call, Encoder, Net, Refusal, entry, tensors


class Cache:
    """Keys of earlier calls, as Hugging Face's caches keep them."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def update(self, x: Tensor) -> Tensor:
        self.layers.append(x)
        return torch.cat(self.layers, 1)


class Cached(Net):
    def forward(self, audio, video, cache):
        seen = cache.update(self.audio(audio))
        return self.classify(torch.cat((self.audio(audio) + seen.mean(1, keepdim=True), self.video(video)), 1))


@entry("a cache that the forward fills, a new one for each batch")
class CachePerBatch(Cached):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, cache=Cache())


@entry("one cache for all batches, which grows")
class CacheForAll(Cached):
    @classmethod
    def calls(cls):
        cache = Cache()
        return [Call(audio, video, cache=cache) for audio, video in tensors()]


@entry("Hugging Face's own cache, which makes its layers as they come")
class HuggingFaceCache(Net):
    @classmethod
    def calls(cls):
        cache = DynamicCache()
        return [Call(audio, video, past_key_values=cache) for audio, video in tensors()]

    def forward(self, audio, video, past_key_values):
        keys = self.audio(audio)[:, None]
        keys, values = past_key_values.update(keys, 2 * keys, layer_idx=0)
        context = (keys.mean(2) + values.mean(2)) / past_key_values.get_seq_length()
        return self.classify(torch.cat((self.audio(audio) + context, self.video(video)), 1))


@entry("a generator as an argument is used up by the first pass", refused=Refusal("call", "generator"))
class GeneratorArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(x for x in (audio, video))

    def forward(self, parts):
        return super().forward(*parts)


@entry("a list's iterator, which can be copied", refused=Refusal("call", "iterator", is_needed=False))
class IteratorArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(iter([audio, video]))

    def forward(self, parts):
        return super().forward(next(parts), next(parts))


@entry("torch's generator as an argument, drawn from, one for all batches")
class TorchGeneratorArgument(Net):
    @classmethod
    def calls(cls):
        generator = torch.Generator().manual_seed(3)
        return [Call(audio, video, generator=generator) for audio, video in tensors()]

    def forward(self, audio, video, generator):
        return super().forward(audio + torch.rand(audio.shape, generator=generator, dtype=audio.dtype), video)


@entry("None and names that differ from call to call choose the way", memory="")
class NamesAndNone(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, None if index == 2 else video, task=("a", "b", "a", "c")[index])

    def forward(self, audio, video, task):
        video = audio[:, :4] if video is None else video
        return super().forward(audio * {"a": 1, "b": 2, "c": 3}[task], video)


@entry("a module as an argument: its buffers move")
class ModuleArgument(Net):
    @classmethod
    def calls(cls):
        torch.manual_seed(5)
        norm = nn.BatchNorm1d(3, momentum=0.5).double().train()
        return [Call(audio, video, norm) for audio, video in tensors()]

    def forward(self, audio, video, norm):
        return super().forward(norm(audio.mT).mT, video)


class Context:
    def __init__(self, owner: Any = None) -> None:
        self.owner, self.steps = owner, 0


@entry("an object that knows the model: a deep copy of it would be the whole model")
class KnowsTheModel(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, Context())

    def step(self, call):
        call.args[2].owner = self
        return self(*call.args)

    def forward(self, audio, video, context):
        context.steps += 1
        return context.owner.classify(context.owner.encode(audio * context.steps, video))


class Locked:
    def __init__(self, x: Tensor) -> None:
        self.x, self.lock = x, threading.Lock()


@entry("an object with a lock, which nobody can copy", refused=Refusal("call", "(?i)lock", is_needed=False))
class LockArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Locked(audio), video)

    def forward(self, held, video):
        with held.lock:
            held.x = held.x + 1
        return super().forward(held.x, video)


class Uncopied:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")

    __copy__ = __reduce_ex__ = __deepcopy__


@entry("an object that forbids its copy", refused=Refusal("call", "Uncopied", is_needed=False))
class ForbidsCopies(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Uncopied(audio), video)

    def forward(self, held, video):
        held.x = held.x + 1
        return super().forward(held.x, video)


def recorder() -> Any:
    seen: list[float] = []

    def record(x: Tensor) -> int:
        seen.append(x.sum().item())
        return len(seen)

    return record


@entry("a function with a list in its closure", refused=Refusal("call", "record|function|closure", is_needed=False))
class FunctionArgument(Net):
    @classmethod
    def calls(cls):
        record = recorder()
        return [Call(audio, video, record) for audio, video in tensors()]

    def forward(self, audio, video, record):
        return super().forward(audio * record(audio), video)


class Ambiguous:
    """Two of them are never simply equal, like arrays."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __eq__(self, other: object) -> Any:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


@entry("an object that cannot be compared, given to a frozen module, edited in a later batch")
class Incomparable(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Ambiguous(audio), video, index)

    def build(self):
        self.audio = Unpacks()

    def forward(self, held, video, index):
        if index == 2:
            held.x = held.x + 1
        return super().forward(held, video)


class Unpacks(Encoder):
    def forward(self, x: Ambiguous) -> Tensor:
        return super().forward(x.x)


class Meter:
    """Counts by a property; its values are NumPy's scalars in a nested dict."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Any]] = {"all": {"count": np.int64(0)}}

    @property
    def count(self) -> int:
        return int(self.sums["all"]["count"])

    @count.setter
    def count(self, value: int) -> None:
        self.sums["all"]["count"] = np.int64(value)


@entry("an object whose property leads to a dict in a dict")
class PropertyArgument(Net):
    @classmethod
    def calls(cls):
        meter = Meter()
        return [Call(audio, video, meter) for audio, video in tensors()]

    def forward(self, audio, video, meter):
        meter.count += 1
        return super().forward(audio * meter.count, video)


@entry("a remembered state goes in and out: what is put out is part of what came in")
class StateInAndOut(Net):
    @classmethod
    def calls(cls):
        state = {"h": torch.zeros(3, 1, WIDTH, dtype=torch.double), "all": []}
        return [Call(audio, video, state) for audio, video in tensors()]

    def forward(self, audio, video, state):
        x = self.encode(audio, video)
        state["h"].mul_(0.5).add_(x.mean(1, keepdim=True))
        state["all"].append(state["h"])
        return {"logits": self.classify(x + state["h"]), "state": state}


class Graph(ABC):  # noqa: B024
    def __init__(self, x: Tensor) -> None:
        self.x, self.turns = x, 0


GraphBatch: Any = type("GraphBatch", (Graph,), {})  # as PyTorch Geometric makes the class of its batches: from `abc`


@entry("an object of a class made by a call, whose tensors the forward turns and keeps")
class TurnsItsArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(GraphBatch(audio), video)

    def forward(self, graph, video):
        graph.turns += 1
        graph.x = graph.x.flip(-1) * 1.5
        return super().forward(graph.x, video) * graph.turns


@entry("parameters() and named_parameters() of the user's own, which give what an optimizer trains")
class TrainsItsHead(Net):
    def parameters(self):
        return iter(self.head.parameters())

    def named_parameters(self, prefix="", recurse=True):
        return self.head.named_parameters(prefix, recurse)
