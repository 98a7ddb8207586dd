"""Lightning's own `log` and `log_dict`, which log nothing in a pass. What a user's class has in their place runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import nn

from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.stand_ins import log_nothing

__all__ = ["hush", "is_lightnings", "logging_class"]

_NAMES = ("log", "log_dict")
_PACKAGES = {"lightning", "pytorch_lightning"}
_QUIET: dict[type, set[int]] = {}  # by class of Lightning: ids of the modules under whose own `log` it logs nothing


def logging_class(kind: type) -> type | None:
    """Return the class of Lightning from which a class has `log`; None for one that is no LightningModule."""
    for own in kind.__mro__:
        if "log_dict" in own.__dict__ and str(own.__module__).partition(".")[0] in _PACKAGES:
            return own
    return None


def is_lightnings(method: MethodType) -> bool:
    """Return True if a bound method does nothing but log, by Lightning's code."""
    name, kind = getattr(method, "__name__", ""), type(method.__self__)
    base = logging_class(kind) if name in _NAMES else None
    if base is None or method.__func__ is not _plain(base.__dict__[name]):
        return False
    return name == "log" or not _has_own(kind, base, "log")  # `log_dict` calls `log`


def hush(changes: Changes, modules: Iterable[nn.Module]) -> None:
    """Have Lightning log nothing for modules until `changes` are undone."""
    for module in modules:
        kind, attributes = type(module), module.__dict__
        base = logging_class(kind)
        if base is None:
            continue
        own = [name for name in _NAMES if name in attributes or _has_own(kind, base, name)]
        if own:
            _hush_beneath(changes, base, id(module))
        for name in _NAMES:
            if name not in own and "log" not in own:
                changes.set(module, name, log_nothing)


def _has_own(kind: type, base: type, name: str) -> bool:
    """Return True if a class has a method of its own in the place of Lightning's."""
    return getattr(kind, name) is not getattr(base, name)


def _hush_beneath(changes: Changes, base: type, key: int) -> None:
    """Have Lightning log nothing where a module's own method calls Lightning's by `super()`."""
    changes.note(partial(_end, base, key))
    _QUIET.setdefault(base, set()).add(key)
    for name in _NAMES:
        if _plain(base.__dict__[name]) is base.__dict__[name]:
            setattr(base, name, _quiet(base, name))


def _end(base: type, key: int) -> None:
    _QUIET.get(base, set()).discard(key)
    if not _QUIET.get(base):  # no other module is in a pass
        for name in _NAMES:
            setattr(base, name, _plain(base.__dict__[name]))
        _QUIET.pop(base, None)


def _quiet(base: type, name: str) -> Callable[..., Any]:
    original = base.__dict__[name]

    @wraps(original)
    def log(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_last = name == "log" or self.fabric is not None  # else `log_dict` calls the module's own `log`
        return None if is_last and id(self) in _QUIET.get(base, ()) else original(self, *args, **kwargs)

    log.is_quiet = True  # type: ignore[attr-defined]
    return log


def _plain(method: Any) -> Any:
    """Return Lightning's method, also while it is quiet."""
    return method.__wrapped__ if hasattr(method, "is_quiet") else method
