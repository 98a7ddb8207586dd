"""Finding the q, k and v projections of an attention module: what adapts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["FusionAttention", "find_attention"]

_FUSED_NAMES = ("qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv", "query_key_value")
_SPLIT_NAMES = (
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("linear_q", "linear_k", "linear_v"),
)


@dataclass(frozen=True)
class FusionAttention:
    """An attention module with its q, k and v projections.

    Args:
        name: its name in the model.
        module: the module whose forward is watched.
        parameters: what adapts, by full name: weights and biases of the projections.
        linears: the linear modules that compute q and k: one fused (its output is q, k, v side by side) or two.
        owner: the module that holds them, whose attributes tell the number of heads and the scale.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    linears: tuple[nn.Module, ...]
    owner: nn.Module


def find_attention(module: nn.Module, name: str) -> FusionAttention:
    """The one attention inside `module`, which is called `name` in the model.

    Raises:
        ValueError: if there is no attention in it, or more than one; both list what was found.
    """
    found = {
        path: (owner, *projections)
        for path, owner in module.named_modules(prefix=name)
        if (projections := _own_projections(owner)) is not None
    }
    if len(found) == 1:
        path, (owner, names, linears) = next(iter(found.items()))
        parameters = {f"{path}.{own}": p for own, p in owner.named_parameters() if own.startswith(names)}
        return FusionAttention(name, module, parameters, linears, owner)
    if found:
        listed = ", ".join(f"'{path}'" for path in found)
        raise ValueError(f"Expected '{name}' to be one attention module, but it holds {len(found)}: {listed}.")
    children = ", ".join(child for child, _ in module.named_children()) or "none"
    raise ValueError(
        f"Expected '{name}' to be an attention module, but no query, key and value projections were found in this "
        f"{type(module).__name__} (its children: {children}). Known: nn.MultiheadAttention; a fused linear named one "
        f"of {', '.join(_FUSED_NAMES)}; linears named {', '.join('/'.join(names) for names in _SPLIT_NAMES)}."
    )


def _own_projections(owner: nn.Module) -> tuple[tuple[str, ...], tuple[nn.Module, ...]] | None:
    """How the names of its projections' parameters start, and its q and k linears; None if `owner` is no attention."""
    if isinstance(owner, nn.MultiheadAttention):
        return ("in_proj", "q_proj", "k_proj", "v_proj"), ()
    children = dict(owner.named_children())
    for fused in _FUSED_NAMES:
        if isinstance(children.get(fused), nn.Linear):
            return (f"{fused}.",), (children[fused],)
    for names in _SPLIT_NAMES:
        if all(isinstance(children.get(child), nn.Linear) for child in names):
            return tuple(f"{child}." for child in names), (children[names[0]], children[names[1]])
    return None
