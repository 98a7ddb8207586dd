"""Objects by their import paths."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_object"]


def import_object(path: str) -> Any:
    """Return what `my_package.Name` is.

    Raises:
        ValueError: no import path, or the module has no such name.
        ImportError: no such module, or one that it imports is missing; with the path.
    """
    module, _, name = path.rpartition(".")
    if not module or path.startswith("."):
        raise ValueError(f"Expected an import path such as my_package.MyModel, but got {path!r}.")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"Expected {path} to be importable, but: {error}") from error
    if not hasattr(found, name):
        raise ValueError(f"{module} has no {name}.")
    return getattr(found, name)
