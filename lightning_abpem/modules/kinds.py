"""Kinds of objects: what of them a forward could change, and who saves it."""

from __future__ import annotations

import contextvars
import functools
import io
import os
import random
import sys
import threading
import weakref
from array import array
from collections import deque
from mmap import mmap
from pathlib import Path
from types import BuiltinMethodType, CellType, FunctionType, MappingProxyType, MethodType, MethodWrapperType, ModuleType

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import slots_of
from lightning_abpem.modules.iterators import ONE_SHOT_MANAGER
from lightning_abpem.modules.stand_ins import StandIn, StandInForOwn, Uncopied

__all__ = ["PLAIN", "is_stateless", "saver_of"]

PLAIN = frozenset(
    {int, float, complex, bool, str, bytes, type(None), range, slice, torch.dtype, torch.device, torch.Size, StandIn}
)
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
_LOGGERS = {"wandb", "mlflow", "comet_ml", "neptune", "clearml", "tensorboard"}
_OPAQUE = {*_LIBRARIES, *_LOGGERS, *sys.stdlib_module_names}  # their objects hold no state of a forward
_WALKED = {
    "types",
    "collections",
    "argparse",
    "functools",
    "weakref",
    "_weakrefset",
    "queue",
    "contextlib",
}  # UserDict, Queue, ...
_STATELESS = {*_OPAQUE, "torchmetrics", "transformers", "timm", "torchvision", "torchaudio"}  # their classes
_OWN = ("distributions.", "optim.", "quasirandom", "utils.data.", "utils.weak")
_WALKED_MODULES = (*(f"torch.{name}" for name in _OWN), "asyncio.queues", "configparser")  # of opaque packages
_IN_PYTHON = 1 << 9  # of a class's flags: a `class` statement made it
_STANDARD_LIBRARY = f"{Path(os.__file__).parent}{os.sep}"

_EXACT: dict[type, str] = {
    StandInForOwn: "_save_stand_in",
    FunctionType: "_save_function",
    MethodType: "_method",
    BuiltinMethodType: "_save_method",
    MethodWrapperType: "_save_method",
    property: "_save_descriptor",
    staticmethod: "_save_descriptor",
    classmethod: "_save_descriptor",
    CellType: "_save_cell",
    MappingProxyType: "_save_mapping",
    memoryview: "_save_view",
    weakref.ProxyType: "_save_proxy",
    contextvars.ContextVar: "_save_variable",
    type(functools.cache(len)): "_save_cache",
    **dict.fromkeys((type({}.keys()), type({}.values()), type({}.items())), "_save_frozen"),
    ONE_SHOT_MANAGER: "_iterator",
    threading.Event: "_save_object",
    threading.Semaphore: "_save_object",
}
_BY_BASE: dict[type, str] = {
    nn.Parameter: "_parameter",
    Tensor: "_tensor",
    torch.jit.ScriptModule: "_save_script",
    nn.Module: "_save_module",
    type: "_class",
    threading.local: "_save_object",
    BaseException: "_save_object",
    torch.optim.Optimizer: "_save_optimizer",
}
_BY_CONTENTS: dict[type, str] = {
    tuple: "_tuple",
    functools.partial: "_save_partial",
    io.BytesIO: "_save_stream",
    io.StringIO: "_save_stream",
    frozenset: "_save_frozen",
    weakref.ref: "_save_reference",
    array: "_save_values",
    bytearray: "_save_values",
    mmap: "_save_map",
    torch.Generator: "_save_generator",
    random.Random: "_save_generator",
}


def saver_of(kind: type) -> tuple[str | None, bool]:
    """Return the method of `Walk` for objects of a kind, and True if it leaves their attributes to `_save_object`.

    The method is None for those that hold nothing that a forward could change, or that nobody can see.
    """
    if kind in _EXACT:
        return _EXACT[kind], False
    if issubclass(kind, Uncopied | ModuleType | random.SystemRandom):
        return None, False
    for base, name in _BY_BASE.items():
        if issubclass(kind, base):
            return name, False
    for base, name in {**_BY_CONTENTS, **_of_numpy()}.items():
        if issubclass(kind, base):  # of a map in memory the values are the memory
            return name, bool(kind.__dictoffset__ or slots_of(kind)) and kind.__name__ != "memmap"
    return _saver_of_others(kind), False


def _saver_of_others(kind: type) -> str | None:
    package = _origin(kind)
    if kind is dict or kind is list:
        return f"_save_{kind.__name__}"
    if issubclass(kind, dict | list | set | deque):
        return "_save_object"
    if package == "numpy" and not kind.__flags__ & _IN_PYTHON:
        return None
    if hasattr(kind, "__next__") and (package in _OPAQUE or not kind.__flags__ & _IN_PYTHON):
        return None if issubclass(kind, io.IOBase) else "_iterator"
    if kind.__name__ == "Trainer" and package in _LIBRARIES:
        return "_save_trainer"
    if package in _OPAQUE and package not in _WALKED and not str(kind.__module__).startswith(_WALKED_MODULES):
        return None
    return "_save_object" if kind.__dictoffset__ or slots_of(kind) else None


def _of_numpy() -> dict[type, str]:
    numpy, numpy_random = sys.modules.get("numpy"), sys.modules.get("numpy.random")
    kinds = {}
    if numpy is not None:
        kinds = {numpy.ndarray: "_save_array", numpy.void: "_save_record"}
        kinds |= {numpy.flatiter: "_iterator", numpy.nditer: "_iterator", numpy.ndenumerate: "_save_object"}
    if numpy_random is not None:
        for name in ("Generator", "RandomState", "BitGenerator", "SeedSequence"):
            kinds[getattr(numpy_random, name)] = "_save_generator"
    return kinds


@functools.cache
def is_stateless(kind: type) -> bool:
    """Return True for a class of a library, with all its bases: their attributes are no state of a forward."""
    return all(_package(own) in _STATELESS for own in kind.__mro__)


def _origin(kind: type) -> str:
    """Return the package of the first base that is not of an opaque one; else that of the class itself."""
    packages = [_package(own) for own in kind.__mro__]
    if packages[0] in _LOGGERS:
        return packages[0]
    return next((own for own in packages if own not in _OPAQUE), packages[0])


def _package(kind: type) -> str:
    """Return the package that holds a class; nothing for the user's.

    A class that is made by a call, such as type(name, bases, {}), may bear the name of the module that calls.
    """
    module = str(kind.__module__)
    package = module.partition(".")[0]
    if package in _OPAQUE and kind.__flags__ & _IN_PYTHON and not _is_held(kind):
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is not None and package in _LOGGERS:
        return package if "-packages" in file else ""
    if package not in sys.stdlib_module_names or file is None:
        return package
    return package if file.startswith(_STANDARD_LIBRARY) and "-packages" not in file else ""


def _is_held(kind: type) -> bool:
    """Return True if the module that a class names has it under its name."""
    found: object = sys.modules.get(str(kind.__module__))
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind
