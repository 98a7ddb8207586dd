"""What a module's call depends on besides its arguments, and what it leaves behind besides its output."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_hooks", "kept_by", "precision", "versions"]


def versions(leaves: Iterable[Any]) -> list[int | None]:
    """How often each tensor was edited in place; None for what is none, or does not tell."""
    return [x._version if isinstance(x, Tensor) and not x.is_inference() else None for x in leaves]


def call_hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Those of its calls, as they are at any time."""
    return module._forward_hooks, module._forward_pre_hooks


def kept_by(modules: list[nn.Module]) -> dict[tuple[int, str], tuple[Any, ...]]:
    """What modules keep between calls, tensors and containers, so that it can be told whether a call changed it.

    Numbers, such as a count of calls, do not matter.
    """
    kept: dict[tuple[int, str], tuple[Any, ...]] = {}
    for place, module in enumerate(modules):
        for name, value in (*module.__dict__.items(), *module._buffers.items()):
            if isinstance(value, Tensor):
                kept[place, name] = (id(value), *versions([value]))
            elif isinstance(value, (list, set, deque)):
                kept[place, name] = (id(value), *map(id, value))
            elif isinstance(value, dict):
                kept[place, name] = (id(value), *value, *map(id, value.values()))
    return kept


def precision(leaves: Iterable[Any]) -> tuple[Any, ...]:
    """In which precision torch computes now, on the device of the first tensor."""
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return (autocast, torch.get_default_dtype())
