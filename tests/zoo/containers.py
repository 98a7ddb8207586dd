"""Forwards that edit the containers and objects that they are called with."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tests.zoo.nets import Call, Net, entry

# --------------------------------------------------------------------------------------------------------- containers


@entry("a dict that the forward empties and fills: its order counts as well")
class Dict(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call({"audio": audio, "video": video, "index": index})

    def forward(self, batch):
        audio, video = batch.pop("audio"), batch["video"]
        batch["audio"], batch["index"] = audio + 1, batch["index"] + 1
        return super().forward(audio * (1 + batch["index"]), video)


@entry("a list that the forward makes longer and shorter")
class List(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call([audio, video])

    def forward(self, batch):
        video = batch.pop()
        batch.append(video + len(batch))
        return super().forward(batch[0], batch[-1])


@entry("a tensor three containers deep, edited in a later batch alone")
class Nested(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call({"inputs": [{"audio": (audio, [video])}], "index": index})

    def forward(self, batch):
        audio, (video,) = batch["inputs"][0]["audio"]
        if batch["index"] > 1:
            video += 1
            batch["inputs"].append("seen")
        return super().forward(audio, video)


@entry("a list that holds itself")
class HoldsItself(Net):
    @classmethod
    def call(cls, index, audio, video):
        batch: list[Any] = [audio, video]
        return Call([*batch, batch] if index % 2 else _closed(batch))

    def forward(self, batch):
        batch[0] = batch[0] + 1
        return super().forward(batch[0], batch[1])


def _closed(batch: list[Any]) -> list[Any]:
    batch.append(batch)
    return batch


Pair = namedtuple("Pair", ["audio", "video"])


class Sample(NamedTuple):
    name: str
    audio: Tensor
    video: Tensor


@entry("a namedtuple whose tensor is edited")
class NamedTupleArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Pair(audio, video))

    def forward(self, batch):
        batch.audio.neg_()
        return super().forward(*batch)


@entry("NamedTuples in a list, which the forward replaces")
class NamedTuplesInList(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call([Sample(f"{i}", a, v) for i, (a, v) in enumerate(zip(audio, video, strict=True))])

    def forward(self, batch):
        batch[:] = [sample._replace(audio=sample.audio * 2, name=sample.name + "'") for sample in batch]
        return super().forward(torch.stack([s.audio for s in batch]), torch.stack([s.video for s in batch]))


@entry("a deque of frames that is turned")
class DequeArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, deque(video.unbind(1), maxlen=4))

    def forward(self, audio, frames):
        frames.rotate(1)
        frames.append(frames[0] + 1)
        return super().forward(audio, torch.stack(tuple(frames), 1))


@entry("NumPy's arrays, edited in place, one a view of the other")
class NumpyArrays(Net):
    @classmethod
    def call(cls, index, audio, video):
        array = audio.numpy()
        return Call(array, array[:, :4], video)

    def forward(self, array, part, video):
        part += 1
        array[..., 0] *= 2
        return super().forward(torch.from_numpy(array), video + torch.from_numpy(part))


@entry("bytes that can be edited, as a decoder's")
class Bytes(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, bytearray([1, 2, index]))

    def forward(self, audio, video, header):
        header[0] += 1
        header.append(9)
        return super().forward(audio * header[0], video)


@entry("a UserDict, whose items are an attribute")
class UserDictArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(UserDict(audio=audio, video=video))

    def forward(self, batch):
        batch["audio"] = batch["audio"] + 1
        batch.steps = getattr(batch, "steps", 0) + 1
        return super().forward(batch["audio"] * batch.steps, batch.pop("video"))


@entry("dicts that make what is missing, and know an order")
class OtherDicts(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(defaultdict(list, audio=[audio]), OrderedDict(video=video, index=index))

    def forward(self, lists, ordered):
        lists["seen"].append(ordered["index"])
        ordered.move_to_end("video", last=len(lists["seen"]) > 1)
        return super().forward(lists["audio"][0] * len(lists["seen"]), ordered["video"])


class Features(dict):
    """A dict with an attribute and a constructor of its own, like a tokenizer's."""

    def __init__(self, audio: Tensor, video: Tensor, *, rate: int) -> None:
        super().__init__(audio=audio, video=video)
        self.rate = rate


@entry("a dict of the user's own class, with attributes, that cannot be made from a dict")
class DictSubclass(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Features(audio, video, rate=2))

    def forward(self, batch):
        batch.rate *= 2
        batch["audio"] = batch["audio"] * batch.rate
        return super().forward(**batch)


@entry("Hugging Face's output class as an argument: a dict and a dataclass in one")
class ModelOutputArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(BaseModelOutput(last_hidden_state=audio), video)

    def forward(self, output, video):
        output.last_hidden_state = output.last_hidden_state + 1
        output["hidden_states"] = (output.last_hidden_state,)
        return super().forward(output[0], video)


# ------------------------------------------------------------------------------------------------------------ objects


class Batch:
    def __init__(self, **tensors: Any) -> None:
        self.__dict__.update(tensors)


class Slotted:
    __slots__ = ("audio", "count", "video")

    def __init__(self, audio: Tensor, video: Tensor) -> None:
        self.audio, self.video, self.count = audio, video, 0


@dataclass(frozen=True)
class Frozen:
    audio: Tensor
    video: Tensor


@dataclass
class Data:
    audio: Tensor
    video: Tensor
    steps: int = 0


def attribute(kind: Any) -> Any:
    class Takes(Net):
        @classmethod
        def call(cls, index, audio, video):
            return Call(kind(audio=audio, video=video))

        def forward(self, batch):
            batch.audio = batch.audio * 2 + getattr(batch, "steps", 0)
            batch.steps = getattr(batch, "steps", 0) + 1
            batch.video.add_(batch.steps)
            return super().forward(batch.audio, batch.video)

    return Takes


_TakesOwnObject: Any = attribute(Batch)


@entry("the user's own object, whose attributes are set, also one that was not there")
class OwnObject(_TakesOwnObject):
    pass


_TakesDataclassArgument: Any = attribute(Data)


@entry("a dataclass whose field is set")
class DataclassArgument(_TakesDataclassArgument):
    pass


@entry("an object without a __dict__")
class SlottedArgument(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Slotted(audio, video))

    def forward(self, batch):
        batch.count += 1
        batch.audio = batch.audio * (1 + batch.count)
        return super().forward(batch.audio, batch.video)


@entry("a frozen dataclass whose tensor is edited in place")
class FrozenDataclass(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(batch=Frozen(audio, video))

    def forward(self, batch):
        batch.video.mul_(-1)
        return super().forward(batch.audio, batch.video)


@entry("an object that holds a list of objects that hold tensors")
class ObjectsInLists(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(Batch(parts=[Batch(x=audio), Batch(x=video)], log=[]))

    def forward(self, batch):
        batch.parts[0].x += 1
        batch.parts.reverse()
        batch.log.append(len(batch.log))
        first, second = sorted((part.x for part in batch.parts), key=lambda x: -x.shape[1])
        return super().forward(first * len(batch.log), second)
