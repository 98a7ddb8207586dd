"""The modules of a model, as they were before a pass of the engine: all of them in one go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_not
from typing import Any

from torch import nn

from lightning_abpem.modules.containers import differ, restore_object, write_dict

__all__ = ["SavedModules"]

_TABLES = (
    *("_modules", "_buffers", "_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    "_parameters",
)
_EMPTY: dict[Any, Any] = {}
_attributes_of = attrgetter("__dict__")


class SavedModules:
    """The class, the attributes and the tables of modules: their submodules, buffers, parameters and hooks.

    A model has hundreds of modules, and a pass changes few of them. So all are compared in one go, and one by one only
    if they differ.

    Args:
        is_sharded: True if FSDP2 replaces the modules' parameters in their calls.

    Attributes:
        owners: the modules.
    """

    def __init__(self, is_sharded: bool) -> None:
        self._names = _TABLES[: -1 if is_sharded else None]
        self.owners: list[nn.Module] = []
        self._kinds: list[type] = []
        self._attributes: list[dict[str, Any]] = []
        self._copies: list[dict[str, Any]] = []
        self._tables: list[dict[Any, Any]] = []  # of each module all of `_names`
        self._table_copies: list[dict[Any, Any]] = []
        self._transient: list[set[str]] = []  # of each module the names of buffers that are not saved with it
        self._transient_copies: list[set[str]] = []
        self._given: dict[int, dict[str, Any]] = {}  # by the module's place: its attributes with stand-ins
        self._before: tuple[list[Any], list[Any], list[int]] | None = None

    def add(self, modules: Sequence[nn.Module]) -> None:
        """Save modules."""
        attributes = [x.__dict__ for x in modules]
        tables = [own[name] for own in attributes for name in self._names]
        self._kinds += map(type, modules)
        self._attributes += attributes
        self._copies += map(dict.copy, attributes)
        self._tables += tables
        self._table_copies += [x.copy() if x else _EMPTY for x in tables]
        self._transient += [own["_non_persistent_buffers_set"] for own in attributes]
        self._transient_copies += map(set.copy, self._transient[len(self._transient_copies) :])
        self.owners += modules  # last: an interrupt leaves none without its copies

    def replace(self, place: int, stand_ins: dict[str, Any]) -> None:
        """Let the pass have other attributes of a module."""
        self._given[place] = self._copies[place] | stand_ins
        write_dict(self._attributes[place], self._given[place])

    def restore(self) -> set[int]:
        """Put all back, which can be done again; return the ids of the modules that the pass had changed."""
        if not self._given and not self._differ():
            return set()
        changed = {id(owner) for place, owner in enumerate(self.owners) if self._restore(place, owner)}
        self._given.clear()
        return changed

    def _differ(self) -> bool:
        if self._before is None:
            self._before = _flat([*self._copies, *self._table_copies])
        keys, values, sizes = _flat([*self._attributes, *self._tables])
        return (
            sizes != self._before[2]
            or keys != self._before[0]  # texts and numbers
            or any(map(is_not, values, self._before[1]))
            or self._transient != self._transient_copies
            or any(map(is_not, map(type, self.owners), self._kinds))
            or any(map(is_not, map(_attributes_of, self.owners), self._attributes))
        )

    def _restore(self, place: int, owner: Any) -> bool:
        own, before = self._attributes[place], self._copies[place]
        changed = restore_object(owner, self._kinds[place], own)
        given = self._given.get(place, before)
        if differ(own, given):
            changed = True
        if changed or given is not before:
            write_dict(own, before)
        if self._transient[place] != self._transient_copies[place]:
            self._transient[place].clear()
            self._transient[place].update(self._transient_copies[place])
            changed = True
        part = slice(place * len(self._names), (place + 1) * len(self._names))
        for table, items in zip(self._tables[part], self._table_copies[part], strict=True):
            if differ(table, items):
                write_dict(table, items)
                changed = True
        return changed


def _flat(every: Sequence[dict[Any, Any]]) -> tuple[list[Any], list[Any], list[int]]:
    """Return the keys and the values of several dicts, one dict after another, and the size of each."""
    filled = list(filter(None, every))
    return list(chain.from_iterable(filled)), list(chain.from_iterable(map(dict.values, filled))), list(map(len, every))
