"""Outputs of frozen modules: their containers, and whether they are new."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_abpem.modules.state import Snapshot

__all__ = ["editable", "gives_state"]


def editable(output: Any) -> Any:
    """Return an output that may be edited under autograd, which refuses that for views made without it."""
    return _editable(output) if isinstance(output, Tensor) else tree_map_only(Tensor, _editable, output)


def _editable(x: Tensor) -> Tensor:
    return x.data if x._is_view() and not x.is_nested else x


def gives_state(output: Any, before: Snapshot) -> bool:
    """Return True if a part of an output was there before the call: an edit of it is one of the state.

    Args:
        output: as the call gave it.
        before: what the call could reach.
    """
    if isinstance(output, Tensor):
        return False
    ids = before.ids
    return any(id(x) in ids for x in _containers(output) if not isinstance(x, tuple))


def _containers(tree: Any) -> Iterator[Any]:
    """Yield all containers of a tree, the tree first."""
    children = tree_leaves(tree, is_leaf=lambda x: x is not tree)
    if not (len(children) == 1 and children[0] is tree):
        yield tree
        for child in children:
            yield from _containers(child)
