"""Objects by their import paths."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_object"]


def import_object(path: str) -> Any:
    """What `my_package.Name` is.

    Raises:
        ValueError: no import path, or the module has no such name.
        ImportError: no such module.
    """
    module, _, name = path.rpartition(".")
    if not module or path.startswith("."):
        raise ValueError(f"Expected an import path such as my_package.MyModel, but got {path!r}.")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ValueError(f"{module} has no {name}.")
    return getattr(found, name)
