"""State in places that no attribute of a module shows: references, closures of C, classes, contexts, other threads."""

from __future__ import annotations

import contextvars
import copy
import functools
import io
import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.zoo.nets import WIDTH, Encoder, Net, Refusal, entry

# ------------------------------------------------------------------------------------------------- kinds of objects


class Empty:
    """An object without attributes of its own at first."""

    count = 0

    def __repr__(self) -> str:
        return "Empty"


@entry("an object whose first attribute the forward sets")
class FirstAttribute(Encoder):
    def build(self):
        self.own = Empty()

    def forward(self, x):
        self.own.count += 1
        return super().forward(x) * self.own.count


class Proxy:
    """Hands every attribute on to another object."""

    def __init__(self, other: Any) -> None:
        object.__setattr__(self, "_other", other)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_other"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._other, name, value)


class Grumpy:
    """Raises, as pydantic's mocks do, when it is asked for what it has not."""

    __slots__ = ("__weakref__", "count")

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


@entry("a proxy of another object, and one that raises when asked for its __dict__")
class ProxyAndGrumpy(Encoder):
    def build(self):
        self.proxy, self.grumpy = Proxy(Empty()), Grumpy()
        self.reference = weakref.ref(self.grumpy)

    def forward(self, x):
        self.proxy.count += 1
        self.grumpy.count += 1
        return super().forward(x) * self.proxy.count * self.grumpy.count


_KEPT_ALIVE: list[Any] = []


@entry("weak references to an object that somebody else keeps, and a dict of such")
class WeakReferences(Encoder):
    def build(self):
        _KEPT_ALIVE.append(Empty())
        self.reference: Callable[[], Any] = weakref.ref(_KEPT_ALIVE[-1])
        self.proxy = weakref.proxy(_KEPT_ALIVE[-1])
        self.others: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def forward(self, x):
        self.reference().count += 1
        self.others[str(self.proxy.count)] = self.reference()
        return super().forward(x) * self.reference().count * len(self.others)


@entry("objects as keys of a dict and in frozen sets, which count")
class ObjectsAsKeys(Encoder):
    def build(self):
        self.named, self.frozen = {Empty(): "a"}, frozenset([Empty()])

    def forward(self, x):
        for own in (*self.named, *self.frozen):
            own.count += 1
        return super().forward(x) * sum(own.count for own in (*self.named, *self.frozen))


@entry("NumPy's array of objects, one of them a list")
class ArrayOfObjects(Encoder):
    def build(self):
        self.array = np.array([None, []], dtype=object)

    def forward(self, x):
        self.array[1].append(1)
        self.array[0] = (self.array[0] or 0) + 1
        return super().forward(x) * (self.array[0] + len(self.array[1]))


@entry("files in memory: a log that grows, and a position that moves")
class FilesInMemory(Encoder):
    def build(self):
        self.log, self.read = io.StringIO(), io.BytesIO(bytes(range(1, 9)))

    def forward(self, x):
        self.log.write("x")
        return super().forward(x) * len(self.log.getvalue()) * self.read.read(1)[0]


@entry("a queue of the last features")
class FifoQueue(Encoder):
    def build(self):
        self.queue: queue.Queue[Tensor] = queue.Queue(maxsize=2)

    def forward(self, x):
        x = super().forward(x)
        if self.queue.full():
            self.queue.get()
        self.queue.put(x.mean(1, keepdim=True))
        return x + sum(self.queue.queue)


class OfThisThread(threading.local):
    calls = 0


@entry("state of the thread, in two ways")
class ThreadLocal(Encoder):
    def build(self):
        self.own, self.plain = OfThisThread(), threading.local()

    def forward(self, x):
        self.own.calls += 1
        self.plain.calls = getattr(self.plain, "calls", 0) + 1
        return super().forward(x) * self.own.calls * self.plain.calls


_CALLS = contextvars.ContextVar("_CALLS", default=0)


class CountsInContext(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        _CALLS.set(_CALLS.get() + 1)
        return super().forward(x) * _CALLS.get()


@entry(
    "a context variable of a Python module, and one that holds a list",
    twin="its passes would set the module's variable too",
)
def context_variables() -> Net:
    net = Net(CountsInContext())
    seen: contextvars.ContextVar[list[int]] = contextvars.ContextVar("seen")
    _CALLS.set(0)
    seen.set([])
    net.video.register_forward_pre_hook(lambda *_: seen.get().append(1))
    net.video.register_forward_hook(lambda module, args, output: output * len(seen.get()))
    return net


@entry("a forward that sets torch's default dtype and leaves it so")
class SetsDefaultDtype(Net):
    def forward(self, audio, video):
        was = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().forward(audio + (1 if was == torch.float32 else 2), video)

    def step(self, call):
        try:
            return super().step(call)
        finally:
            torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------------------------------------- iterators


@entry("an endless count, and a list's iterator")
class Counts(Encoder):
    def build(self):
        self.numbers, self.names = itertools.count(1), iter(["a", "bb", "ccc", "dddd"])

    def forward(self, x):
        return super().forward(x) * next(self.numbers) * len(next(self.names))


class OwnIterator:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __iter__(self) -> OwnIterator:
        return self

    def __next__(self) -> int:
        self.seen.append(len(self.seen))
        return len(self.seen)


@entry("an iterator of one's own class, with a list in it")
class OwnIteratorKept(Encoder):
    def build(self):
        self.numbers = OwnIterator()

    def forward(self, x):
        return super().forward(x) * next(self.numbers)


@entry("a cycle, whose copy would move it too", refused=Refusal("call", "'numbers' of module 'audio' is a cycle"))
class Cycle(Encoder):
    def build(self):
        self.numbers = itertools.cycle([1, 2, 3])

    def forward(self, x):
        return super().forward(x) * next(self.numbers)


@entry("a generator that is kept", refused=Refusal("call", "'numbers' of module 'audio' is a generator"))
class GeneratorKept(Encoder):
    def build(self):
        self.numbers = (i + 1 for i in range(9))

    def forward(self, x):
        return super().forward(x) * next(self.numbers)


@entry("a generator that is kept, and not used: nobody minds")
class GeneratorUnused(Encoder):
    def build(self):
        self.numbers = (i + 1 for i in range(9))


# ------------------------------------------------------------------------------------------------ classes, functions


@entry("a list that a metaclass keeps, and a class in a closure")
def metaclass_registry() -> Net:
    class Registers(type):
        made: list[str] = []

        def __call__(cls, *args: Any) -> Any:
            Registers.made.append(cls.__name__)
            return super().__call__(*args)

    class Token(metaclass=Registers):
        pass

    class Makes(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            Token()
            return super().forward(x) * len(Registers.made)

    return Net(Makes())


@entry("a class counts its objects, down by `__del__`: those of a pass die as it is put back")
def counts_its_objects() -> Net:
    class Counted:
        alive = 0

        def __init__(self) -> None:
            Counted.alive += 1

        def __del__(self) -> None:
            Counted.alive -= 1

    class Makes(Encoder):
        kind = Counted

        def build(self) -> None:
            self.kept: list[Counted] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept.append(self.kind())
            return super().forward(x) * self.kind.alive

    return Net(Makes())


@entry("lists as defaults of a property, a partial method and a dispatched one")
def defaults_of_methods() -> Net:
    class Keeps(Encoder):
        @property
        def read(self, box: Any = [0]) -> int:  # noqa: B006
            box[0] += 1
            return box[0]

        def _add(self, by: int, box: Any = [0]) -> int:  # noqa: B006
            box[0] += by
            return box[0]

        add = functools.partialmethod(_add, 2)

        @functools.singledispatchmethod
        def put(self, x: Any, box: Any = []) -> int:  # noqa: B006
            box.append(1)
            return len(box)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.read * self.add() * self.put(x)

    return Net(Keeps())


@entry("methods of a list in a closure, which is itself in none")
def methods_of_a_list() -> Net:
    net = Net()
    seen: list[int] = []
    append, count = seen.append, seen.__len__
    net.audio.register_forward_pre_hook(lambda *_: append(1))
    net.video.register_forward_hook(lambda module, args, output: output * (1 + count()))
    return net


@entry("functools.lru_cache around a method that counts how often it runs")
def cache_that_counts() -> Net:
    class Counted(Encoder):
        def build(self) -> None:
            self.misses = 0

        @functools.lru_cache(maxsize=2)  # noqa: B019
        def table(self, size: int) -> Tensor:
            self.misses += 1
            return torch.full((size, 1), float(self.misses), dtype=torch.double)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.table(x.shape[1]) + self.misses

    return Net(Counted())


# ----------------------------------------------------------------------------------------------------------- tensors


class OwnTensor(Tensor):
    """A subclass as image and medical libraries have it."""


@entry("a tensor of the user's own class, edited in place and by .data")
class OwnTensorKept(Encoder):
    def build(self):
        self.state = torch.zeros(WIDTH, dtype=torch.double).as_subclass(OwnTensor)

    def forward(self, x):
        self.state.add_(1)
        self.state.data.mul_(2)
        return super().forward(x) * self.state.as_subclass(Tensor)


@entry("the first Python attribute of an argument, a buffer and a parameter")
class FirstTensorAttribute(Net):
    mark: Any

    def build(self):
        self.register_buffer("mark", torch.ones(1))

    def forward(self, audio, video):
        for x in (audio, self.mark, self.audio.embed.weight):
            x.calls = getattr(x, "calls", 0) + 1
        return super().forward(audio * audio.calls, video * self.mark.calls * self.audio.embed.weight.calls)


@entry("a momentum encoder whose parameters the forward moves", refused=Refusal("call", "edited 'slow", moved="slow"))
class MomentumEncoder(Net):
    def build(self):
        self.slow = copy.deepcopy(self.audio).requires_grad_(False)

    def forward(self, audio, video):
        with torch.no_grad():
            for p, q in zip(self.slow.parameters(), self.audio.parameters(), strict=True):
                p.data.lerp_(q.data + 1, 0.1)
        return self.classify(self.encode(audio, video) + self.slow(audio).mean(1, keepdim=True))
