"""Containers of outputs and arguments: whether they can be made anew, and whether they are the state's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lightning_abpem.modules.containers import slots_of
from lightning_abpem.modules.kinds import PLAIN
from lightning_abpem.modules.state import Snapshot

__all__ = ["editable", "find_odd", "gives_state"]

_MISSING = object()
_BUILTIN = (tuple, list, dict, deque)


def editable(output: Any) -> Any:
    """Return an output that may be edited under autograd, which refuses that for views made without it.

    Containers that cannot be made anew, as `find_odd` tells, stay as they are.
    """
    if isinstance(output, Tensor):
        return _editable(output)
    return output if find_odd(output) is not None else tree_map_only(Tensor, _editable, output)


def _editable(x: Tensor) -> Tensor:
    return x.data if x._is_view() and not x.is_nested else x


def gives_state(output: Any, before: Snapshot) -> bool:
    """Return True if a part of an output was there before the call, so that an edit of it is one of the state.

    That is a container, or a tensor in the memory of another.

    Args:
        output: as the call gave it.
        before: what the call could reach.
    """
    given = {_memory(x) for x in tree_leaves(output) if isinstance(x, Tensor)} - {0}
    if not given.isdisjoint(map(_memory, before.tensors)):
        return True
    ids = set() if isinstance(output, Tensor) else before.ids
    return any(id(x) in ids for x in _containers(output) if not isinstance(x, tuple))


def _memory(x: Tensor) -> int:
    """Return where the memory of a tensor is; 0 if it has none, or a kind of its own."""
    is_plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta
    return x.untyped_storage().data_ptr() if is_plain else 0


def find_odd(tree: Any) -> Any:
    """Return the first container of a tree that says more than its items, None without one.

    That is one with attributes that torch's trees lose, or with a constructor of its own.
    """
    return next((x for x in _containers(tree) if not _is_made_anew(x)), None)


def _containers(tree: Any) -> Iterator[Any]:
    """Yield all containers of a tree, the tree first."""
    if isinstance(tree, Tensor) or type(tree) in PLAIN:
        return
    children = tree_leaves(tree, is_leaf=lambda x: x is not tree)
    if not (len(children) == 1 and children[0] is tree):
        yield tree
        for child in children:
            yield from _containers(child)


def _is_made_anew(x: Any) -> bool:
    """Return True if a container made of the items of another, by torch's trees, is like that one."""
    if type(x) in (tuple, list, dict):
        return True
    try:
        again = tree_unflatten(*tree_flatten(x, is_leaf=lambda item: item is not x))
    except Exception:  # of a constructor of the user's
        return False
    if type(again) is not type(x):
        return False
    own, made = _parts(x), _parts(again)
    if not own and not isinstance(x, _BUILTIN):
        return False  # nobody can tell
    return list(own) == list(made) and all(map(_is_same, own.values(), made.values()))


def _parts(x: Any) -> dict[Any, Any]:
    """Return the items of a container and its attributes."""
    items = dict.items(x) if isinstance(x, dict) else enumerate(x) if isinstance(x, _BUILTIN) else ()
    attributes = {name: getattr(x, name, _MISSING) for name in slots_of(type(x))} | getattr(x, "__dict__", {})
    return {("item", key): item for key, item in items} | attributes


def _is_same(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and type(x) in PLAIN and bool(x == y))
