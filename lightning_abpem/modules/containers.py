"""Containers and objects, as they were before a pass of the engine."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Iterator
from operator import is_not
from types import CellType
from typing import Any

__all__ = [
    "Saved",
    "SavedAttributes",
    "SavedCell",
    "SavedClass",
    "SavedDict",
    "SavedObject",
    "SavedPartial",
    "SavedSequence",
    "SavedSet",
    "SavedSlots",
    "differ",
    "restore_object",
    "slots_of",
    "write_dict",
]


class Saved:
    """A container's items before a pass, by key.

    Args:
        owner: the container, or the object whose attributes they are.
        items: its items.

    Attributes:
        given: the items that the pass gets: the same, but for those that have a stand-in.
    """

    __slots__ = ("given", "items", "owner")

    def __init__(self, owner: Any, items: dict[Any, Any]) -> None:
        self.owner, self.items, self.given = owner, items, items

    def replace(self, stand_ins: dict[object, object]) -> None:
        """Let the pass have other items."""
        self.given = self.items | stand_ins
        self._write(self.given)

    def restore(self) -> bool:
        """Put the items back, which can be done again; return True if the pass had changed them."""
        now = self._read()
        changed = differ(now, self.given)
        if changed or self.given is not self.items:
            self._write(self.items)
            self.given = self.items
        return changed

    def exchange(self, others: dict[int, Any]) -> None:
        """Put others in the place of items of now, by the ids of these; it can be done again."""
        now = self._read()
        if put := {key: others[id(x)] for key, x in now.items() if id(x) in others}:
            self._write({**now, **put})

    def _read(self) -> dict[Any, Any]:
        """Return the items of now."""
        return {}

    def _write(self, items: dict[Any, Any]) -> None:
        """Replace the items of now. An interrupt may come at any point: never leave an object without attributes."""


def _base(own: dict[object, object]) -> Any:
    """Return the class whose methods read and write a dict as it is, whatever those of its own class do."""
    return OrderedDict if isinstance(own, OrderedDict) else dict


def write_dict(own: dict[Any, Any], items: dict[Any, Any]) -> None:
    """Give a dict these items, in their order; an interrupt leaves old and new ones, never none."""
    base = _base(own)
    for key in [key for key in base.__iter__(own) if key not in items]:
        base.__delitem__(own, key)
    for key, value in items.items():
        base.__setitem__(own, key, value)
    if any(map(is_not, base.__iter__(own), items)):  # in their order, and none that only equals one
        for key, value in items.items():
            base.__delitem__(own, key)
            base.__setitem__(own, key, value)


def differ(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Return True if two dicts have other objects as keys or values, or in another order."""
    if not before:
        return bool(now)
    if len(now) != len(before) or any(map(is_not, now.values(), before.values())):
        return True
    return any(map(is_not, now, before))


class SavedDict(Saved):
    """The items of a dict, or of an object's `__dict__`."""

    __slots__ = ("_dict",)

    def __init__(self, owner: Any, own: dict[Any, Any]) -> None:
        super().__init__(owner, own.copy() if type(own) is dict else dict(_base(own).items(own)))
        self._dict = own

    def _read(self) -> dict[Any, Any]:
        own = self._dict
        return own if type(own) is dict else dict(_base(own).items(own))

    def _write(self, items: dict[Any, Any]) -> None:
        write_dict(self._dict, items)


class SavedAttributes(Saved):
    """The attributes of a tensor, but for the compiler's own."""

    __slots__ = ()

    def __init__(self, owner: Any, items: dict[str, Any] | None = None) -> None:
        super().__init__(owner, items if items is not None else {})
        if items is None:
            self.items = self.given = self._read()

    def _read(self) -> dict[str, Any]:
        own = self.owner.__dict__
        return {name: own[name] for name in own if not name.startswith("_dynamo")} if own else {}

    def _write(self, items: dict[str, Any]) -> None:
        for name in self._read().keys() - items.keys():
            self.owner.__dict__.pop(name, None)
        self.owner.__dict__.update(items)


class SavedObject(SavedDict):
    """The class of an object, and its attributes."""

    __slots__ = ("_kind",)

    def __init__(self, owner: Any) -> None:
        super().__init__(owner, owner.__dict__)
        self._kind = type(owner)

    def restore(self) -> bool:
        """Put class and attributes back; return True if the pass had changed them."""
        changed = restore_object(self.owner, self._kind, self._dict)
        return super().restore() or changed


def restore_object(owner: Any, kind: type, attributes: dict[str, Any]) -> bool:
    """Give an object its class and its own `__dict__` back; return True if it had others."""
    changed = False
    if type(owner) is not kind:
        object.__setattr__(owner, "__class__", kind)
        changed = True
    if owner.__dict__ is not attributes:
        object.__setattr__(owner, "__dict__", attributes)
        changed = True
    return changed


class SavedSequence(Saved):
    """The items of a list or a deque."""

    __slots__ = ("_base",)

    def __init__(self, owner: Any) -> None:
        self._base: Any = list if isinstance(owner, list) else deque
        super().__init__(owner, dict(enumerate(self._base.__iter__(owner))))

    def _read(self) -> dict[Any, Any]:
        return dict(enumerate(self._base.__iter__(self.owner)))

    def _write(self, items: dict[Any, Any]) -> None:
        if isinstance(self.owner, list):
            list.__setitem__(self.owner, slice(None), list(items.values()))
        else:
            deque.clear(self.owner)
            deque.extend(self.owner, items.values())


class SavedSet(Saved):
    """The items of a set."""

    __slots__ = ()

    def __init__(self, owner: set[Any]) -> None:
        super().__init__(owner, {id(item): item for item in set.__iter__(owner)})

    def restore(self) -> bool:
        """Put the items back, in any order; return True if the pass had changed them."""
        changed = {id(item) for item in set.__iter__(self.owner)} != self.items.keys()
        if changed:
            set.clear(self.owner)
            set.update(self.owner, self.items.values())
        return changed

    def _write(self, items: dict[Any, Any]) -> None:
        raise ValueError("Expected a set without tensors of inference mode or with a history, but got one.")


class SavedSlots(Saved):
    """The attributes in an object's `__slots__`."""

    __slots__ = ("_slots",)

    def __init__(self, owner: Any, slots: dict[str, Any]) -> None:
        self._slots = slots
        super().__init__(owner, _slot_values(owner, slots))

    def _read(self) -> dict[Any, Any]:
        return _slot_values(self.owner, self._slots)

    def _write(self, items: dict[Any, Any]) -> None:
        for name in self._read().keys() - items.keys():
            self._slots[name].__delete__(self.owner)
        for name, value in items.items():
            self._slots[name].__set__(self.owner, value)


class SavedPartial(Saved):
    """The function and the arguments of a `functools.partial`."""

    __slots__ = ()

    def __init__(self, owner: functools.partial[Any]) -> None:
        super().__init__(owner, _parts_of(owner))

    def _read(self) -> dict[str, Any]:
        return _parts_of(self.owner)

    def _write(self, items: dict[str, Any]) -> None:
        self.owner.__setstate__((*items.values(), self.owner.__dict__))


def _parts_of(x: functools.partial[Any]) -> dict[str, Any]:
    return {"its function": x.func, "its arguments": x.args, "its keyword arguments": x.keywords}


class SavedClass(Saved):
    """The attributes of a class of the user's own."""

    __slots__ = ()

    def __init__(self, owner: type) -> None:
        super().__init__(owner, dict(owner.__dict__))

    def _read(self) -> dict[Any, Any]:
        return dict(self.owner.__dict__)

    def _write(self, items: dict[Any, Any]) -> None:
        for name in self._read().keys() - items.keys():
            type.__delattr__(self.owner, name)
        for name, value in items.items():
            if self.owner.__dict__.get(name) is not value:
                type.__setattr__(self.owner, name, value)


class SavedCell(Saved):
    """The variable of a closure."""

    __slots__ = ()

    def __init__(self, owner: CellType) -> None:
        super().__init__(owner, _cell_value(owner))

    def _read(self) -> dict[Any, Any]:
        return _cell_value(self.owner)

    def _write(self, items: dict[Any, Any]) -> None:
        if items:
            self.owner.cell_contents = items["variable"]
        elif _cell_value(self.owner):
            del self.owner.cell_contents


_SLOTS: dict[type, dict[str, Any]] = {}


def slots_of(kind: type) -> dict[str, Any]:
    """Return the descriptors of a class's `__slots__`, those of its bases included."""
    if kind not in _SLOTS:
        _SLOTS[kind] = dict(pair for own in kind.__mro__ for pair in _own_slots(own))
    return _SLOTS[kind]


def _own_slots(kind: type) -> Iterator[tuple[str, Any]]:
    names = kind.__dict__.get("__slots__", ())
    for name in {names} if isinstance(names, str) else {*names} - {"__weakref__", "__dict__"}:
        slot = kind.__dict__.get(name) or kind.__dict__.get(f"_{kind.__name__.lstrip('_')}{name}")
        if hasattr(slot, "__set__"):
            yield name, slot


def _slot_values(x: object, slots: dict[str, object]) -> dict[str, Any]:
    missing = object()
    values = {name: _slot_value(slot, x, missing) for name, slot in slots.items()}
    return {name: value for name, value in values.items() if value is not missing}


def _slot_value(slot: Any, x: Any, missing: object) -> Any:
    try:
        return slot.__get__(x)
    except AttributeError:
        return missing


def _cell_value(cell: CellType) -> dict[str, Any]:
    try:
        return {"variable": cell.cell_contents}
    except ValueError:  # it is empty
        return {}
