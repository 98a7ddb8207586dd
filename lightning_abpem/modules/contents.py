"""The content of objects written in C or C++, as it was before a pass of the engine."""

from __future__ import annotations

import gc
import io
import sys
from mmap import mmap
from typing import Any

import torch

from lightning_abpem.modules.containers import Saved
from lightning_abpem.modules.randomness import generator_state, set_generator_state

__all__ = [
    "SavedArray",
    "SavedCache",
    "SavedGenerator",
    "SavedMap",
    "SavedScript",
    "SavedStream",
    "SavedValues",
    "is_locked",
    "unbounded_items",
]


class SavedValues(Saved):
    """The values of a bytearray or an array."""

    __slots__ = ("_before",)

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, {})
        self._before = owner[:]

    def restore(self) -> bool:
        """Put the values back; return True if the pass had changed them."""
        changed = bytes(memoryview(self.owner)) != bytes(memoryview(self._before))
        if changed:
            self.owner[:] = self._before
        return changed


class SavedArray(Saved):
    """The values, shape, dtype and write lock of NumPy's arrays."""

    __slots__ = ("_before", "_form")

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, {})
        self._before, self._form = _plain(owner).copy(), (owner.shape, owner.flags.writeable)

    def restore(self) -> bool:
        """Put all of it back; return True if the pass had changed something."""
        owner, (shape, lock) = self.owner, self._form
        changed = owner.shape != shape or owner.flags.writeable is not lock or owner.dtype != self._before.dtype
        if owner.dtype != self._before.dtype:
            owner.dtype = self._before.dtype
        if owner.shape != shape:
            if owner.size == self._before.size:
                owner.shape = shape
            else:
                _ndarray().resize(owner, shape, refcheck=False)
        if _plain(owner).tobytes() != self._before.tobytes():
            changed = True
            if not owner.flags.writeable:
                owner.flags.writeable = True
            _plain(owner)[...] = self._before
        if owner.flags.writeable is not lock:  # memory that is another's may refuse it
            owner.flags.writeable = lock
        return changed


class SavedMap(Saved):
    """The bytes of a file that is mapped into memory, and the position in it."""

    __slots__ = ("_before",)

    def __init__(self, owner: mmap) -> None:
        super().__init__(owner, {})
        self._before = owner[:], owner.tell()

    def restore(self) -> bool:
        """Put bytes and position back; return True if the pass had changed them."""
        changed = not self.owner.closed and (self.owner[:], self.owner.tell()) != self._before
        if changed:
            self.owner[:] = self._before[0]
            self.owner.seek(self._before[1])
        return changed


class SavedGenerator(Saved):
    """The state of a random number generator that somebody keeps."""

    __slots__ = ("_state",)

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, {})
        self._state = generator_state(owner)

    def restore(self) -> bool:
        """Put the state back; return True if the pass had drawn from it."""
        changed = generator_state(self.owner) != self._state
        if changed:
            set_generator_state(self.owner, self._state)
        return changed


class SavedStream(Saved):
    """The content of a file in memory, and the position in it."""

    __slots__ = ("_before",)

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, {})
        self._before = owner.getvalue(), owner.tell()

    def restore(self) -> bool:
        """Put content and position back; return True if the pass had changed them, or closed the file."""
        if self.owner.closed:
            (io.BytesIO if isinstance(self.owner, io.BytesIO) else io.StringIO).__init__(self.owner, self._before[0])
        changed = (self.owner.getvalue(), self.owner.tell()) != self._before
        if changed:
            self.owner.seek(0)
            self.owner.truncate()
            self.owner.write(self._before[0])
            self.owner.seek(self._before[1])
        return changed


class SavedCache(Saved):
    """The content of a `functools.lru_cache` of limited size: only an empty one can be put back."""

    __slots__ = ("_before",)

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, {})
        self._before = owner.cache_info()

    def restore(self) -> bool:
        """Empty the cache if it was empty; return True if the pass filled it."""
        changed = bool(self.owner.cache_info().misses != self._before.misses)
        if changed and not self._before.currsize:
            self.owner.cache_clear()
        return changed


def unbounded_items(cache: Any) -> dict[Any, Any] | None:
    """Return the dict of results in a `functools.cache`, which may be edited; None for one of limited size."""
    if cache.cache_parameters()["maxsize"] is not None:
        return None
    return next((own for own in gc.get_referents(cache) if type(own) is dict and own is not cache.__dict__), None)


class SavedScript(Saved):
    """The attributes of a scripted module; each reading of a list is a new one."""

    __slots__ = ("_names",)

    def __init__(self, owner: Any) -> None:
        kind: Any = torch._C.ConcreteModuleType.from_jit_type(owner._c._type())  # a frozen module does not keep it
        kinds = kind.get_attributes()
        self._names = [name for name, (_, is_parameter) in kinds.items() if not is_parameter]
        super().__init__(owner, {})
        self.items = self.given = self._read()

    def restore(self) -> bool:
        """Put the attributes back; return True if the pass had changed them."""
        now = self._read()
        changed = {name: value for name, value in self.items.items() if not _same(now[name], self.given[name])}
        if changed or self.given is not self.items:
            self._write(self.items)
            self.given = self.items
        return bool(changed)

    def _read(self) -> dict[str, Any]:
        return {name: self.owner._c.getattr(name) for name in self._names}

    def _write(self, items: dict[str, Any]) -> None:
        for name, value in items.items():
            self.owner._c.setattr(name, value)


def _same(x: object, y: object) -> bool:
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, dict) and isinstance(y, dict):
        return list(x) == list(y) and all(map(_same, x.values(), y.values()))
    return x is y or (isinstance(x, bool | int | float | complex | str) and x == y)


def is_locked(x: Any) -> bool:
    """Return True if nobody can write into an array of NumPy: its memory is read-only, such as a file's."""
    while isinstance(x, _ndarray()) and not x.flags.writeable and x.base is not None:
        x = x.base
    return not isinstance(x, _ndarray()) and memoryview(x).readonly


def _plain(x: Any) -> Any:
    """Return an array as one of NumPy's own class, which reads and writes values as they are."""
    return x if type(x) is _ndarray() else x.view(_ndarray())


def _ndarray() -> Any:
    return sys.modules["numpy"].ndarray
