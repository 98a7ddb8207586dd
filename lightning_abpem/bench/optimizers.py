"""Torch's optimizers by the names in a config, which can name no other callable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_abpem.engine.options import OptimizerFactory

__all__ = ["named_optimizer", "refuse_code"]

_PACKAGE = "torch.optim."
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
}


def named_optimizer(spec: Mapping[str, object], where: str) -> OptimizerFactory:
    """Return the optimizer that ``{class_path: torch.optim.NAME, init_args: {...}}`` names; try a step with it first.

    Raises:
        ValueError: it is none of torch's, or it cannot be made or take a step with these arguments. The message has
            the config's path `where`.
    """
    path, arguments = spec.get("class_path"), spec.get("init_args") or {}
    found = _OPTIMIZERS.get(path.removeprefix(_PACKAGE)) if isinstance(path, str) else None
    if found is None or not str(path).startswith(_PACKAGE):
        known = ", ".join(sorted(_OPTIMIZERS))
        raise ValueError(f"Expected `{where}.class_path` to be torch.optim. and one of {known}, but got {path!r}.")
    if odd := sorted(set(spec) - {"class_path", "init_args"}):
        raise ValueError(f"Expected `{where}` to have `class_path` and `init_args`, but got {odd} too.")
    allowed = set(inspect.signature(found).parameters) - {"params"}
    if not isinstance(arguments, Mapping) or not set(arguments) <= allowed:
        listed = ", ".join(sorted(allowed))
        raise ValueError(f"Expected `{where}.init_args` of {path} among {listed}, but got {arguments!r}.")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()
    }
    factory = partial(found, **values)
    try:
        _try_out(factory)
    except Exception as error:  # whatever its constructor or its step raises for these values
        words = " ".join(str(error).split())
        raise ValueError(f"Expected `{where}.init_args` to fit {path}, but got {arguments!r}: {words}") from error
    return factory


def refuse_code(value: object, where: str) -> None:
    """Refuse a mapping that names code, wherever it is in a value.

    Raises:
        ValueError: with the path and the value.
    """
    if not isinstance(value, (Mapping, list, tuple)):
        return
    for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if name in ("class_path", "init_args"):
            raise ValueError(f"Expected no code but an optimizer of torch, but got {item!r} in `{where}.{name}`.")
        refuse_code(item, f"{where}.{name}")


def _try_out(factory: OptimizerFactory) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = factory([parameter])
    parameter.grad = torch.zeros(1)
    optimizer.step()
