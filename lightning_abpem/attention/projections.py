"""Finding the q, k and v projections of an attention module: what adapts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["FusionAttention", "collect_params", "find_attention", "has_projections"]

_FUSED_NAMES = ("qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv", "query_key_value")
_HEADS_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
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
    """An attention module and what adapts in it.

    Args:
        name: its name in the model.
        module: the module whose forward is watched.
        parameters: weights and biases of its q, k and v projections, by full name.
        heads: the number of heads that it declares; 1 if none.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    heads: int = 1

    def is_head_width(self, width: int) -> bool:
        """Whether `width` is that of one head, of several."""
        return self.heads > 1 and any(len(p) in (width * self.heads, 3 * width * self.heads) for p in self._weights())

    def _weights(self) -> list[nn.Parameter]:
        return [p for p in self.parameters.values() if p.dim() == 2]


def find_attention(module: nn.Module, name: str) -> FusionAttention:
    """The one attention inside `module`, which is called `name` in the model.

    Raises:
        ValueError: if there is no attention in it, or more than one; both list what was found.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"Expected '{name}' to be an attention module written in Python, but it is a TorchScript module, inside "
            "which nothing can be watched. Build the model from its code and load its weights."
        )
    owners = {path: owner for path, owner in module.named_modules(prefix=name) if _projections(owner)}
    if len(owners) == 1:
        path, owner = next(iter(owners.items()))
        adapting = [(own, p) for own, p in owner.named_parameters() if own.startswith(_projections(owner))]
        return FusionAttention(name, module, {f"{path}.{own}": p for own, p in adapting}, _declared_heads(owner))
    if owners:
        listed = ", ".join(f"'{path}'" for path in owners)
        raise ValueError(f"Expected '{name}' to be one attention module, but it holds {len(owners)}: {listed}.")
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


def has_projections(module: nn.Module) -> bool:
    """Whether a module has query, key and value projections of its own."""
    return bool(_projections(module))


def _declared_heads(owner: nn.Module) -> int:
    declared = (getattr(owner, name, None) for name in _HEADS_NAMES)
    return next((heads for heads in declared if isinstance(heads, int)), 1)


def _projections(owner: nn.Module) -> tuple[str, ...]:
    """How the names of a module's own projections start; empty if it has none."""
    if isinstance(owner, nn.MultiheadAttention):
        return ("in_proj", "q_proj", "k_proj", "v_proj")
    linears = {name for name, child in owner.named_children() if isinstance(child, nn.Linear)}
    for names in (*((fused,) for fused in _FUSED_NAMES), *_SPLIT_NAMES):
        if linears.issuperset(names):
            return tuple(f"{name}." for name in names)
    return ()
