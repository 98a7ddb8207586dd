"""Modules under torch.compile: where a call enters compiled code, and how to go around it.

Inside compiled code nothing can be watched or stood in for: hooks that come later are not seen, and a changed forward
is compiled anew. So the engine watches the plain forward, and replays compiled modules as a whole.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.stand_ins import hides_attribute

__all__ = [
    "check_entry",
    "compiled_around",
    "compiled_entry",
    "eagerly",
    "inside_compiled",
    "is_compiled",
    "plain_forward",
]


def compiled_entry(module: nn.Module) -> str | None:
    """Return the attribute through which a call of the module enters compiled code; None if it is not compiled itself.

    `_compiled_call_impl` after ``module.compile()``; `forward` of what ``torch.compile(module)`` gives, also by way of
    a Trainer, and after ``module.forward = torch.compile(module.forward)``.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "_compiled_call_impl"
    return "forward" if _plain(module) is not None else None


def is_compiled(model: nn.Module) -> bool:
    """Return True if torch.compile was applied to the model or a part of it."""
    return any(compiled_entry(module) is not None for module in model.modules())


def inside_compiled(model: nn.Module) -> set[nn.Module]:
    """Return the modules that run inside compiled code of the model: the descendants of compiled modules."""
    compiled = [module for module in model.modules() if compiled_entry(module) is not None]
    return {inner for module in compiled for inner in module.modules() if inner is not module}


def check_entry(model: nn.Module, target: nn.Module) -> None:
    """Raise unless calls of the target can be seen.

    Raises:
        ValueError: if they are made inside compiled code, or its forward is a property.
    """
    if hides_attribute(target, "forward"):
        raise ValueError(
            f"Expected forward of {type(target).__name__} to be a method, for the engine stands in for it, but it is a "
            "property. Let a method call what the property gives, or name another `target`."
        )
    if target in inside_compiled(model):
        name = next(name for name, module in model.named_modules() if module is target)
        raise ValueError(
            f"Expected `target` to be called from Python, but '{name}' runs inside compiled code. Name the module that "
            "torch.compile was applied to, or one around it."
        )


def compiled_around(model: nn.Module, watched: Collection[nn.Module]) -> list[nn.Module]:
    """Return the compiled modules of the model that hold a watched one, or are one."""
    compiled = [module for module in model.modules() if compiled_entry(module) is not None]
    return [module for module in compiled if not set(watched).isdisjoint(module.modules())]


def eagerly(changes: Changes, compiled: Collection[nn.Module]) -> None:
    """Let compiled modules run their plain forward."""
    for module in compiled:
        entry = compiled_entry(module)
        if entry is not None:  # else it does so already
            changes.set(module, entry, None if entry == "_compiled_call_impl" else _plain(module))


def plain_forward(module: nn.Module) -> Any:
    """Return the module's forward as it was before it was compiled."""
    return _plain(module) or module.forward


def _plain(module: nn.Module) -> Any:
    """Return what the compiled forward of a module was made of; None if its forward is not compiled."""
    return getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
