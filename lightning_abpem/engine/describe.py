"""An adaptation in words: its options by name, and the few lines that a run begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_abpem.engine.settings import Settings
from lightning_abpem.modules.names import plain_name

__all__ = ["changed_options", "describe_run", "list_tensors", "options_of", "package_version"]

Shown = str | int | float | bool | None
_KNOWN = {field.name: field.default for field in dataclasses.fields(Settings) if field.init}


def options_of(settings: Settings) -> dict[str, Shown]:
    """Return all options by name, those of the method first: numbers and strings, as a logger takes them.

    `learning_rate` is the one in use, as far as the options tell it.
    """
    own = {name: _shown(value) for name, value, _ in _fields(settings.method)}
    shared = {name: _shown(getattr(settings, name)) for name in _KNOWN if name != "method"}
    factory = settings.optimizer_factory
    keywords = factory.keywords if isinstance(factory, partial) else {}
    rate = keywords.get("lr") if settings.learning_rate is None else settings.learning_rate
    return {
        "method": settings.method.name,
        **own,
        **shared,
        "optimizer": _shown(factory),
        "learning_rate": _shown(rate),
    }


def changed_options(settings: Settings) -> str:
    """Return the options that are not the defaults, as in a call: ``fusion='fusion.*.attn', k=2``."""
    changed = {name: getattr(settings, name) for name, default in _KNOWN.items() if getattr(settings, name) != default}
    if settings.predicts == settings.method.predicts:
        changed.pop("predicts", None)
    changed.pop("method")
    first = {name: changed.pop(name) for name in ("fusion", "modalities") if name in changed}
    own: dict[str, Any] = {name: value for name, value, default in _fields(settings.method) if value != default}
    pairs = [*first.items(), *own.items(), *changed.items()]
    return ", ".join(
        f"{name}={value!r}" if isinstance(value, str) else f"{name}={_shown(value)}" for name, value in pairs
    )


def package_version(name: str) -> str:
    """Return the version of an installed package; "not installed" for sources that never were."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe_run(
    settings: Settings, model: nn.Module, params: Mapping[str, nn.Parameter], memory_at: str | None
) -> str:
    """Return a few lines: what adapts, at which rate, what is remembered, and what is tied to it and moves as well."""
    options = options_of(settings)
    method = settings.method.name
    if settings.steps == 0:
        return f"{method} observes, with steps=0: no weight moves."
    count = sum(p.numel() for p in params.values())
    share = count / max(sum(p.numel() for p in model.parameters()), 1)
    first = next(iter(params), "")
    more = f" and {len(params) - 1} more" if len(params) > 1 else ""
    rate = "the optimizer's own" if options["learning_rate"] is None else options["learning_rate"]
    if len(settings.learning_rates) > 1:
        rate = f"{', '.join(map(str, settings.learning_rates))} side by side"
    own = ", ".join(f"{name} {_shown(value)}" for name, value, _ in _fields(settings.method))
    stored = f" (at '{memory_at}')" if memory_at is not None else ""
    memory = f"memory {settings.memory_batches}{stored}, " if settings.method.needs_attention else ""
    bounds = "".join(f", {name} {value}" for name, value, default in _fields(settings.limits) if value != default)
    spans = "" if settings.spans is None else f", modalities {', '.join(settings.spans)}"
    fate = "return" if settings.restore else "do not return (restore=False)"
    tied = [f"{name} is the same tensor, so it moves as well." for name in _tied(model, params)]
    lines = [
        f"{method} adapts {count:,} values in {len(params)} tensors, {share:.2%} of {type(model).__name__}: "
        f"{first}{more}.",
        f"Learning rate {rate}, {settings.steps} step{'s' * (settings.steps > 1)} for each batch{own and ', '}{own}.",
        f"{memory[:1].upper()}{memory[1:]}{'reset' if memory else 'Reset'} {settings.reset}, guard {settings.guard}"
        f"{bounds}{spans}.",
        *tied,
        f"The source's values {fate} after the run.",
    ]
    return "\n".join(lines)


def list_tensors(params: Mapping[str, nn.Parameter]) -> str:
    """Return a line for each tensor that adapts, with its shape."""
    return "\n".join(["What adapts:", *(f"  {name} {tuple(p.shape)}" for name, p in params.items())])


def _tied(model: nn.Module, params: Mapping[str, nn.Parameter]) -> list[str]:
    adapted = {id(p) for p in params.values()}
    modules = nn.Module.named_modules(model, remove_duplicate=False)
    everywhere = ((f"{name}.{own}".lstrip("."), p) for name, m in modules for own, p in m._parameters.items())
    named = {plain_name(name) for name in params}  # torch.compile puts in other ones
    return [name for name, p in everywhere if id(p) in adapted and plain_name(name) not in named]


def _fields(value: object) -> Iterator[tuple[str, Any, Any]]:
    """Names, values and defaults of a dataclass's fields; those of a dataclass inside it in its place."""
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        own = getattr(value, field.name)
        if dataclasses.is_dataclass(own) and not isinstance(own, type):
            yield from _fields(own)
        else:
            yield field.name, own, field.default


def _shown(value: object) -> Shown:
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, partial):
        return f"{_shown(value.func)}({', '.join(f'{name}={_shown(x)}' for name, x in value.keywords.items())})"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_shown(key)}: {_shown(own)}" for key, own in value.items()) + "}"
    if isinstance(value, Sequence):
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return f"{len(value)} items"
        return "[" + ", ".join(str(_shown(own)) for own in value) + "]"
    return str(value)
