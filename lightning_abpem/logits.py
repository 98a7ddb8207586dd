"""Where the logits are in a module's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["read_logits"]


def read_logits(output: Any, how: Callable[..., Any] | None = None) -> Tensor:
    """The (B, C) logits in an output: itself, `.logits`, `["logits"]`, a tuple's (B, C), or `how(output)`.

    Raises:
        ValueError: if there are none, or they are not two-dimensional floats of two classes or more.
    """
    logits = output
    if how is not None:
        logits = how(output)
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        candidates = [item for item in output if _may_be_logits(item)]
        if len(candidates) > 1:
            raise ValueError(
                f"Expected one (batch, classes) tensor in the target's output, but got {len(candidates)} that could "
                f"be: {[tuple(item.shape) for item in candidates]}. Pass `logits`, a function to the right one."
            )
        logits = next(iter(candidates), None)
    if how is not None and not isinstance(logits, Tensor):
        raise ValueError(f"Expected `logits` to return a (batch, classes) tensor, but got a {type(logits).__name__}.")
    if not isinstance(logits, Tensor):
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ValueError(
            f"Expected logits in the target's output, but found none in a {type(output).__name__}{keys}. Pass "
            "`logits`, a function from that output to a (batch, classes) tensor."
        )
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"Expected logits of shape (batch, classes) with at least two classes, but got {tuple(logits.shape)} "
            f"{logits.dtype}. Pass `logits`, a function from the target's output to them."
        )
    return logits


def _may_be_logits(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() == 2 and item.is_floating_point()
