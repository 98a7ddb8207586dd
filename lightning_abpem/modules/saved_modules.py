"""The modules of a model, as they were before a pass of the engine: all of them in one go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, islice, starmap
from operator import attrgetter, is_not, itemgetter
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
_attributes_of, _transient_of = attrgetter("__dict__"), itemgetter("_non_persistent_buffers_set")

_Flat = tuple[list[Any], list[Any], list[int]]  # keys, values and sizes of dicts


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
        self._tables_of = itemgetter(*_TABLES[: -1 if is_sharded else None])
        self.owners: list[nn.Module] = []
        self._kinds: list[type] = []
        self._attributes: list[dict[str, Any]] = []
        self._tables: list[dict[Any, Any]] = []
        self._filled: list[dict[Any, Any]] = []  # tables that are not empty
        self._before: list[tuple[list[dict[Any, Any]], _Flat]] = []  # attributes and filled tables, and their items
        self._ordered: dict[int, dict[Any, Any]] = {}  # by id: copies of tables whose order is their own
        self._transient: list[set[str]] = []  # of each module the names of buffers that are not saved with it
        self._transient_copies: list[set[str]] = []
        self._given: dict[int, dict[str, Any]] = {}  # by the module's place: its attributes with stand-ins

    def add(self, modules: Sequence[nn.Module]) -> None:
        """Save modules."""
        attributes = list(map(_attributes_of, modules))
        tables = list(chain.from_iterable(map(self._tables_of, attributes)))
        filled = list(filter(None, tables))
        dicts = [*attributes, *filled]
        ordered = [own for own in filled if isinstance(own, OrderedDict)]
        self._ordered |= {id(own): dict(OrderedDict.items(own)) for own in ordered}
        self._before.append((dicts, _flat(dicts)))
        self._transient += map(_transient_of, attributes)
        self._transient_copies += map(set.copy, self._transient[len(self.owners) :])
        self._kinds += map(type, modules)
        self._attributes += attributes
        self._tables += tables
        self._filled += filled
        self.owners += modules  # last: an interrupt leaves none without its copies

    def replace(self, place: int, stand_ins: dict[str, Any]) -> None:
        """Let the pass have other attributes of a module."""
        self._given[place] = self._attributes[place] | stand_ins
        write_dict(self._attributes[place], self._given[place])

    def restore(self) -> set[int]:
        """Put all back, which can be done again; return the ids of the modules that the pass had changed."""
        if not self._given and not self._differ():
            return set()
        copies: dict[int, dict[Any, Any]] = {}
        for dicts, (keys, values, sizes) in self._before:
            items = zip(keys, values, strict=True)
            copies |= {id(own): dict(islice(items, size)) for own, size in zip(dicts, sizes, strict=True)}
        copies |= self._ordered
        changed = {id(owner) for place, owner in enumerate(self.owners) if self._restore(place, owner, copies)}
        self._given.clear()
        return changed

    def _differ(self) -> bool:
        filled = list(filter(None, self._tables))
        return (
            len(filled) != len(self._filled)
            or any(map(is_not, filled, self._filled))
            or any(starmap(_changed, self._before))
            or self._transient != self._transient_copies
            or any(map(is_not, map(type, self.owners), self._kinds))
            or any(map(is_not, map(_attributes_of, self.owners), self._attributes))
        )

    def _restore(self, place: int, owner: Any, copies: dict[int, dict[Any, Any]]) -> bool:
        own = self._attributes[place]
        before = copies[id(own)]
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
        for table in self._tables_of(before):
            if differ(table, items := copies.get(id(table), _EMPTY)):
                write_dict(table, items)
                changed = True
        return changed


def _flat(dicts: Sequence[dict[Any, Any]]) -> _Flat:
    """Return the keys and the values of several dicts, one dict after another, and the size of each."""
    return list(chain.from_iterable(dicts)), list(chain.from_iterable(map(dict.values, dicts))), list(map(len, dicts))


def _changed(dicts: Sequence[dict[Any, Any]], before: _Flat) -> bool:
    keys, values, sizes = _flat(dicts)
    is_other = sizes != before[2] or keys != before[0]  # texts and numbers
    return is_other or any(map(is_not, values, before[1]))
