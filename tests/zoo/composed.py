"""Models put together from parts at random: what holds a value, where it is kept, and how a forward edits it."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tests.zoo.nets import Call, Encoder, Entry, Net, tensors

BATCHES = 3
ARGUMENTS, MODULES = ("argument", "shared argument"), ("audio", "video", "model", "behind")
EDITS = ("in place", "replaced", "data", "numpy", "shape", "grown")


@dataclass
class Data:
    value: Any


@dataclass(frozen=True)
class Frozen:
    value: Any


class Pair(NamedTuple):
    value: Any
    name: str = "pair"


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slots:
    __slots__ = ("more", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


class OwnDict(dict):
    def __init__(self, value: Any, *, rate: int) -> None:
        super().__init__(value=value)
        self.rate = rate


class Kind(NamedTuple):
    """A kind of container: making, reading, editing and extending it; one that cannot be edited is made anew."""

    make: Callable[[Any], Any]
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None] | None = None
    grow: Callable[[Any], Any] | None = None


def of_sequence(make: Callable[[Any], Any]) -> Kind:
    return Kind(lambda v: make([v]), lambda c: c[0], lambda c, v: c.__setitem__(0, v), lambda c: c.append(len(c)))


def of_mapping(make: Callable[[Any], Any]) -> Kind:
    grow = lambda c: c.__setitem__(f"{len(c)}", len(c))  # noqa: E731
    return Kind(make, lambda c: c["value"], lambda c, v: c.__setitem__("value", v), grow)


def of_object(make: Callable[[Any], Any]) -> Kind:
    grow = lambda c: setattr(c, "more", getattr(c, "more", 0) + 1)  # noqa: E731
    return Kind(make, lambda c: c.value, lambda c, v: setattr(c, "value", v), grow)


KINDS = {
    "list": of_sequence(list),
    "deque": of_sequence(lambda v: deque(v, maxlen=3)),
    "dict": of_mapping(lambda v: {"value": v}),
    "OrderedDict": of_mapping(lambda v: OrderedDict(value=v)),
    "UserDict": of_mapping(lambda v: UserDict(value=v)),
    "own dict": of_mapping(lambda v: OwnDict(v, rate=2)),
    "dataclass": of_object(Data),
    "object": of_object(Thing),
    "slots": of_object(Slots),
    "tuple": Kind(lambda v: (v,), lambda c: c[0]),
    "NamedTuple": Kind(Pair, lambda c: c.value),
    "frozen": Kind(Frozen, lambda c: c.value),
}


def tensor() -> Tensor:
    return torch.ones(1, 3, dtype=torch.double)


LEAVES: dict[str, Callable[[], Any]] = {
    "tensor": tensor,
    "view": lambda: torch.ones(4, 3, dtype=torch.double).T[:1, 1:],
    "expanded": lambda: torch.ones(1, 1, dtype=torch.double).expand(2, 3),
    "array": lambda: np.ones(3),
    "int": lambda: 1,
    "torch.Generator": lambda: torch.Generator().manual_seed(3),
    "random.Random": lambda: random.Random(3),
    "numpy Generator": lambda: np.random.default_rng(3),
}


@dataclass(frozen=True)
class Part:
    """A value, what it is in, where that is, and what a forward does to it.

    Args:
        place: where it is kept.
        kinds: the containers it is in, from outside.
        leaf: what it is.
        edit: what the forward does to it.
        batches: in which batches it does.
        is_late: whether a module makes it in the first call.
        is_buffer: whether a module has it as a buffer, if it is a tensor in no container.
    """

    place: str
    kinds: tuple[str, ...]
    leaf: str
    edit: str
    batches: frozenset[int]
    is_late: bool = False
    is_buffer: bool = False

    def make(self) -> Any:
        value = LEAVES[self.leaf]()
        for kind in reversed(self.kinds):
            value = KINDS[kind].make(value)
        return value

    def use(self, box: Any, index: int, delta: Tensor) -> tuple[Any, Tensor]:
        """Return the value to keep from now on, and a scalar that depends on it."""
        if index in self.batches:
            box = self._edited(box, self.kinds, delta)
        return box, self._said(self._read(box), index)

    def _read(self, box: Any) -> Any:
        for kind in self.kinds:
            box = KINDS[kind].read(box)
        return box

    def _edited(self, box: Any, kinds: tuple[str, ...], delta: Tensor) -> Any:
        if not kinds:
            return self._edited_leaf(box, delta)
        kind = KINDS[kinds[0]]
        if self.edit == "grown" and len(kinds) == 1 and kind.grow is not None:
            kind.grow(box)
            return box
        before = kind.read(box)
        after = self._edited(before, kinds[1:], delta)
        if after is before:
            return box
        if kind.write is None:
            return kind.make(after)
        kind.write(box, after)
        return box

    def _edited_leaf(self, x: Any, delta: Tensor) -> Any:
        if isinstance(x, Tensor) and self.leaf != "expanded" and self.edit in ("in place", "data", "numpy", "shape"):
            edit_tensor(x, self.edit, delta)
            return x
        if isinstance(x, np.ndarray) and self.edit != "replaced":
            x += delta.item()
            return x
        return x + 1 if isinstance(x, int) else x + delta.item() if isinstance(x, Tensor | np.ndarray) else x

    def _said(self, x: Any, index: int) -> Tensor:
        is_due = index in self.batches  # else nothing is drawn
        if isinstance(x, torch.Generator):
            x = torch.rand(1, generator=x).item() if is_due else 0
        elif isinstance(x, random.Random | np.random.Generator):
            x = x.random() if is_due else 0
        return torch.as_tensor(np.asarray(x).mean() if not isinstance(x, Tensor) else x.mean(), dtype=torch.double)


def edit_tensor(x: Tensor, edit: str, delta: Tensor) -> None:
    if edit == "in place":
        x.add_(delta)
    elif edit == "data":
        x.data = x.data + delta
    elif edit == "numpy":
        x.detach().numpy()[...] += delta.item()
    else:
        x.unsqueeze_(0)


def use_own(module: nn.Module, parts: list[tuple[str, Part]], index: int, x: Tensor) -> Tensor:
    """Use what a module keeps; a value that comes late is made now."""
    total = torch.zeros((), dtype=torch.double)
    for name, part in parts:
        if part.is_late and not hasattr(module, name):
            keep(module, name, part)
        kept, said = part.use(getattr(module, name), index, 0.1 * x.detach().mean())
        setattr(module, name, kept)
        total = total + said
    return total


def keep(module: nn.Module, name: str, part: Part) -> None:
    made = part.make()
    if part.is_buffer and isinstance(made, Tensor):
        module.register_buffer(name, made)
    else:
        setattr(module, name, made)


class KeepingEncoder(Encoder):
    def __init__(self, parts: list[tuple[str, Part]]) -> None:
        super().__init__()
        self.parts = parts
        for name, part in parts:
            if not part.is_late:
                keep(self, name, part)

    def forward(self, x: Tensor, index: int) -> Tensor:
        return super().forward(x + 0.1 * use_own(self, self.parts, index, x))


class Composed(Net):
    def __init__(self, parts: list[Part], draws: frozenset[int], is_recursive: bool) -> None:
        super().__init__()
        self.draws, self.is_recursive, self.parts = draws, is_recursive, {}
        for place in MODULES:
            self.parts[place] = [(f"kept{i}", part) for i, part in enumerate(parts) if part.place == place]
        self.audio, self.video = KeepingEncoder(self.parts["audio"]), KeepingEncoder(self.parts["video"])
        self.arguments = [part for part in parts if part.place in ARGUMENTS]
        for name, part in self.parts["model"] + self.parts["behind"]:
            if not part.is_late:
                keep(self, name, part)

    def forward(self, audio: Tensor, video: Tensor, index: int, *boxes: Any, inner: bool = False) -> Tensor:
        shift = use_own(self, self.parts["model"], index, audio)
        for part, box in zip(self.arguments, boxes, strict=True):
            shift = shift + part.use(box, index, 0.1 * video.mean())[1]
        if index in self.draws:
            shift = shift + torch.rand(()) + random.random()
        x = torch.cat((self.audio(audio + 0.1 * shift, index), self.video(video, index)), 1)
        logits = self.classify(x)
        if self.parts["behind"]:
            logits = logits * (1 + 0.1 * use_own(self, self.parts["behind"], index, logits))
        if self.is_recursive and not inner:
            logits = logits + self(audio, video.flip(1), index, *boxes, inner=True)
        return logits


def compose(parts: list[Part], draws: frozenset[int], is_recursive: bool) -> Entry:
    """An entry of the zoo that is not in it."""

    def make() -> Net:
        torch.manual_seed(0)
        return Composed(parts, draws, is_recursive).double().eval()

    def calls() -> list[Call]:
        shared = {i: part.make() for i, part in enumerate(parts) if part.place == "shared argument"}
        made = []
        for index, (audio, video) in enumerate(tensors(BATCHES)):
            boxes = [
                shared[i] if i in shared else part.make() for i, part in enumerate(parts) if part.place in ARGUMENTS
            ]
            made.append(Call(audio, video, index, *boxes))
        return made

    return Entry("composed", "put together at random", make, calls)


def without_behind(parts: list[Part]) -> list[Part]:
    """Parts that a memory allows: nothing that bypasses the fusion."""
    return [replace(part, place="model") if part.place == "behind" else part for part in parts]
