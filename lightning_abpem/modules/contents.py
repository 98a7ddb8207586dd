"""The content of objects written in C or C++, as it was before a pass of the engine."""

from __future__ import annotations

from array import array
from typing import Any

from lightning_abpem.modules.containers import Saved
from lightning_abpem.modules.randomness import generator_state, set_generator_state

__all__ = ["SavedCache", "SavedGenerator", "SavedScript", "SavedStream", "SavedValues"]


class SavedValues(Saved):
    """The values of a NumPy array, a bytearray or an array."""

    __slots__ = ("_before", "_form")

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, {})
        self._before = owner[:] if isinstance(owner, bytearray | array) else owner.copy()
        self._form = _form(owner)

    def restore(self) -> bool:
        """Put the values back; return True if the pass had changed them."""
        owner, form = self.owner, _form(self.owner)
        if form != self._form:
            owner.shape = self._form[0]
        changed = bool(_values(owner) != _values(self._before))
        if changed and form:
            if not owner.flags.writeable:
                owner.flags.writeable = True
            owner[...] = self._before
        elif changed:
            owner[:] = self._before
        if changed or form != self._form:
            for flag in self._form[1:]:
                if owner.flags.writeable is not flag:  # memory that is another's may refuse it
                    owner.flags.writeable = flag
        return changed or form != self._form


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
        """Put content and position back; return True if the pass had changed them."""
        changed = not self.owner.closed and (self.owner.getvalue(), self.owner.tell()) != self._before
        if changed:
            self.owner.seek(0)
            self.owner.truncate()
            self.owner.write(self._before[0])
            self.owner.seek(self._before[1])
        return changed


class SavedCache(Saved):
    """The content of a `functools.lru_cache`: only an empty one can be put back."""

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


class SavedScript(Saved):
    """The attributes of a scripted module; each reading of a list is a new one."""

    __slots__ = ("_names",)

    def __init__(self, owner: Any) -> None:
        kinds = owner._concrete_type.get_attributes()
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


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, dict) and isinstance(y, dict):
        return list(x) == list(y) and all(map(_same, x.values(), y.values()))
    return x is y or (isinstance(x, bool | int | float | complex | str) and x == y)


def _form(x: Any) -> tuple[Any, ...]:
    """Return shape and writeability of an array of NumPy; nothing for others."""
    return (x.shape, x.flags.writeable) if hasattr(x, "flags") else ()


def _values(x: Any) -> bytes:
    return bytes(x) if isinstance(x, bytearray) else x.tobytes()
