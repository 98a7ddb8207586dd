"""Finding the q, k and v projections of an attention module: what adapts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

__all__ = ["FusionAttention", "collect_params", "find_attention"]

_FUSED_NAMES = ("qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv")
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
    linears: tuple[nn.Linear, ...]
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


def collect_params(fusion: Iterable[FusionAttention]) -> dict[str, nn.Parameter]:
    """What adapts: weights and biases of the q, k, v projections of the fusion attention, by full name, once each."""
    named = {p: name for attention in reversed(list(fusion)) for name, p in reversed(attention.parameters.items())}
    return {name: parameter for parameter, name in reversed(named.items())}


def _own_projections(owner: nn.Module) -> tuple[tuple[str, ...], tuple[nn.Linear, ...]] | None:
    """How the names of its projections' parameters start, and its q and k linears; None if `owner` is no attention."""
    if isinstance(owner, nn.MultiheadAttention):
        return ("in_proj", "q_proj", "k_proj", "v_proj"), ()
    linears = {name: child for name, child in owner.named_children() if isinstance(child, nn.Linear)}
    for fused in _FUSED_NAMES:
        if fused in linears:
            return (f"{fused}.",), (linears[fused],)
    for names in _SPLIT_NAMES:
        if all(name in linears for name in names):
            return tuple(f"{name}." for name in names), (linears[names[0]], linears[names[1]])
    return None
