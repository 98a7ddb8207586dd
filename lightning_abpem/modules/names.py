"""Finding a model's modules by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

__all__ = ["find_modules", "name_regex", "named_module", "plain_name"]


def find_modules(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules of `model` whose names match, in the model's order.

    In a pattern `*` stands for one part of a dotted name, or a piece of it, and `**` for any number of parts. The names
    are those without torch.compile's `_orig_mod`.

    Raises:
        ValueError: if a pattern matches nothing, with the names that come closest.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("Expected `fusion` to hold at least one name pattern, but got none.")
    modules = model.named_modules(remove_duplicate=False)
    named = {plain: module for name, module in modules if (plain := plain_name(name))}  # the inside of a compiled one
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in named if name_regex(plain_name(pattern)).fullmatch(name)}
        if not found:
            raise ValueError(
                f"Expected `fusion` to match a module of {type(model).__name__}, but {pattern!r} matches none of its "
                f"{len(named)} modules. {_closest(list(named), pattern)}"
            )
        matched |= found
    unique: dict[int, str] = {}
    for name, module in named.items():
        if name in matched:
            unique.setdefault(id(module), name)
    return {name: named[name] for name in unique.values()}


def plain_name(name: str) -> str:
    """A dotted name without what torch.compile puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def name_regex(pattern: str) -> re.Pattern[str]:
    """Compile a name pattern: `*` for a part of a dotted name or a piece of it, `**` for any number of parts."""
    tokens = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = re.split(r"(\*\*\.|\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in parts))


def _closest(names: Sequence[str], pattern: str) -> str:
    last = pattern.rsplit(".", 1)[-1].strip("*?")
    alike = [name for name in names if last and last in name.rsplit(".", 1)[-1]]
    attention = [name for name in names if "attn" in name.rsplit(".", 1)[-1].lower() or "attention" in name.lower()]
    shown = (alike or attention or list(names))[:8]
    return (
        f"Names like it: {', '.join(shown)}; lightning_abpem.inspect lists every attention."
        if shown
        else "The model has no submodules."
    )


def named_module(model: nn.Module, name: str, option: str) -> nn.Module:
    """The module of that name, which the user gave for `option`.

    Raises:
        ValueError: if there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise ValueError(
            f"Expected `{option}` to name a module of {type(model).__name__}, but got {name!r}. "
            f"Its children: {children}."
        ) from None
