"""State that a forward can reach: saved before a pass of the engine, put back by value after it.

`Snapshot` walks from the arguments and the modules of a model to every tensor, container and object. It follows
attributes, closures, bound methods and classes of the user's own. A pass works on the very same objects, so that
identities, aliases and memory layouts are those of a plain call. Two kinds of tensors have a stand-in during the
pass, because autograd refuses them: those made in inference mode and those with a history.

Out of reach are variables of Python modules and the inside of objects that are written in C.
"""

from __future__ import annotations

import copy
import functools
import io
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from operator import is_not
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import (
    Saved,
    SavedCell,
    SavedClass,
    SavedDict,
    SavedGenerator,
    SavedModule,
    SavedSequence,
    SavedSet,
    SavedSlots,
    SavedValues,
    slots_of,
)
from lightning_abpem.modules.patches import Uncopied
from lightning_abpem.modules.randomness import RandomState
from lightning_abpem.modules.tensors import SavedTensor, bit_sum, normal_tensor

__all__ = ["Snapshot", "reachable"]

_PLAIN = frozenset(
    {int, float, complex, bool, str, bytes, type(None), range, slice, type, torch.dtype, torch.device, torch.Size}
)
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
_LOGGERS = {"wandb", "mlflow", "comet_ml", "neptune", "clearml", "aim", "tensorboard"}
_OPAQUE = {*_LIBRARIES, *_LOGGERS, *sys.stdlib_module_names}  # their objects hold no state of a forward
_WALKED = {"types", "collections", "argparse"}  # of the standard library: SimpleNamespace, UserDict, Namespace
_STATELESS = {*_OPAQUE, "torchmetrics", "transformers", "timm", "torchvision", "torchaudio"}  # their classes
_STATELESS_KINDS: set[type] = set()
_STANDARD = nn.Module().__dict__.keys()  # attributes of every module


class Snapshot(Uncopied):
    """The state that a call can reach, as it is now.

    Args:
        target: the module that is called.
        args: its arguments.
        kwargs: its keyword arguments.
        is_sharded: True if FSDP2 replaces the modules' parameters in their calls.

    Attributes:
        args: the arguments for a pass: the same objects, but for tensors that autograd refuses.
        kwargs: the keyword arguments, likewise.
        ids: of all objects that can be reached.
        drew: True after `restore` if torch, Python or NumPy drew random numbers in between.

    Raises:
        ValueError: if an iterator that cannot be copied is among the state; it is named.
    """

    def __init__(
        self,
        target: nn.Module,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        is_sharded: bool = False,
    ) -> None:
        self._target, self._is_sharded = target, is_sharded
        self._own: dict[int, Any] = {}  # by id: the object itself, or what stands in for it
        self._alive: list[Any] = []
        self._places: dict[int, tuple[Any, Any]] = {}  # by id: the container that it was found in, and the key there
        self._todo: list[tuple[Callable[[Snapshot, Any], None], Any]] = []
        self._saved: list[Saved] = []
        self._tensors: list[SavedTensor] = []
        self._parameters: list[tuple[nn.Parameter, int]] = []
        self._sums: list[Tensor] = []
        self._random = RandomState(target)
        self.drew = False
        try:
            self._find(target, None, "the target")
            self.args = tuple(self._find(x, None, f"argument {i}") for i, x in enumerate(args))
            self.kwargs = {name: self._find(x, None, f"argument '{name}'") for name, x in (kwargs or {}).items()}
            while self._todo:
                save, x = self._todo.pop()
                save(self, x)
        except BaseException:
            self.restore()
            raise

    @property
    def ids(self) -> set[int]:
        return set(self._own)

    def restore(self) -> set[int]:
        """Put everything back by value; it can be called again.

        Returns:
            the ids of the containers, objects and tensors that had changed.

        Raises:
            ValueError: if a tensor that cannot be put back was edited in place; it is named.
        """
        changed = {id(saved.owner) for saved in self._saved if saved.restore()}
        self.drew = self._random.restore() or self.drew
        return changed | {saved.key for saved in self._tensors if saved.restore()}

    def sum_parameters(self) -> None:
        """Let `check_parameters` hold all their bits too, for edits that do not count a version up."""
        self._sums = [bit_sum(p) for p, _ in self._parameters]

    def check_parameters(self) -> None:
        """Hold the parameters against their versions: a forward that edits them would do so in every pass.

        Raises:
            ValueError: naming a parameter that was edited in place.
        """
        edited = [p for p, version in self._parameters if p._version != version]
        for (p, _), before in zip(self._parameters, self._sums, strict=False):
            if not torch.equal(bit_sum(p), before):
                edited.append(p)
        if edited:
            names = {id(p): name for name, p in self._target.named_parameters()}
            raise ValueError(
                f"Expected a forward that leaves its parameters alone, but it edited '{names.get(id(edited[0]))}' in "
                "place. The adapting passes would edit it once more for every batch. Keep such a value in a buffer."
            )

    # ------------------------------------------------------------------------------------------------------- finding

    def _find(self, x: Any, parent: Any, key: Any) -> Any:
        """Note an object for saving; return what the pass gets in its place, mostly itself."""
        kind = type(x)
        if kind in _PLAIN:
            return x
        handler = _HANDLERS.get(kind) or _handler(kind)
        if handler is None:
            return x
        own = self._own.get(id(x))
        if own is None:
            self._places[id(x)] = (parent, key)
            self._alive.append(x)
            own = self._own[id(x)] = handler(self, x)
        return own

    def _tensor(self, x: Tensor) -> Tensor:
        own = normal_tensor(x)
        if x.__dict__:
            self._save(SavedDict(x, x.__dict__))
            if own is not x:
                own.__dict__.update(x.__dict__)
        if not x.is_inference():  # else its clone is the pass's own
            self._tensors.append(SavedTensor(own, id(x), functools.partial(self._name, x)))
        return own

    def _tuple(self, x: tuple[Any, ...]) -> Any:
        own = [self._find(item, x, i) for i, item in enumerate(x)]
        if not any(map(is_not, own, x)):
            return x
        if type(x) is tuple:
            return tuple(own)
        return type(x)(own) if hasattr(x, "n_sequence_fields") else tuple.__new__(type(x), own)

    def _iterator(self, x: Any) -> Any:
        try:
            return copy.copy(x)
        except TypeError:
            raise ValueError(
                f"Expected state that can be copied, but {self._name(x)} is a {type(x).__name__}, which the adapting "
                "pass would use up. Pass a list or a tensor instead."
            ) from None

    def _name(self, x: Any) -> str:
        """Return where an object was found, in words."""
        steps: list[str] = []
        parent, key = self._places.get(id(x), (None, "an object"))
        while parent is not None and not isinstance(parent, nn.Module):
            steps.append(str(key))
            parent, key = self._places.get(id(parent), (None, ""))
        if isinstance(parent, nn.Module):
            names = {id(module): name for name, module in self._target.named_modules()}
            steps.append(f"attribute '{key}' of module '{names.get(id(parent)) or type(parent).__name__}'")
        else:
            steps.append(str(key))
        return ", ".join(reversed(steps))

    # -------------------------------------------------------------------------------------------------------- saving

    def _save(self, saved: Saved) -> None:
        """Save a container's items, find what they hold, and replace those that the pass cannot take."""
        self._saved.append(saved)
        if not _PLAIN.issuperset(map(type, saved.items.values())):
            self._find_items(saved, saved.items)

    def _find_items(self, saved: Saved, items: dict[Any, Any]) -> None:
        stand_ins = {}
        for key, value in items.items():
            if type(value) not in _PLAIN:
                own = self._find(value, saved.owner, key)
                if own is not value:
                    stand_ins[key] = own
        if stand_ins:
            saved.replace(stand_ins)

    def _save_module(self, x: nn.Module) -> None:
        saved = SavedModule(x, self._is_sharded)
        self._saved.append(saved)
        own = saved.items
        if len(own) > len(_STANDARD):
            self._find_items(saved, {key: own[key] for key in own.keys() - _STANDARD})
        for p in x._parameters.values():
            if p is not None and not p.is_inference():
                self._parameters.append((p, p._version))
        for name in ("_modules", "_forward_pre_hooks", "_forward_hooks"):
            for key, value in own[name].items():
                self._find(value, x, key)
        if x._buffers:
            self._save(SavedDict(x, x._buffers))
        if slots := slots_of(type(x)):
            self._save(SavedSlots(x, slots))
        self._find_classes(type(x))

    def _save_script(self, x: torch.jit.ScriptModule) -> None:
        for name, buffer in x.named_buffers():
            self._find(buffer, x, name)

    def _save_object(self, x: Any) -> None:
        """Save an object's attributes, and its items if it is a container besides."""
        if isinstance(x, dict):
            self._save(SavedDict(x, x))
        elif isinstance(x, list | deque):
            self._save(SavedSequence(x))
        elif isinstance(x, set):
            self._save(SavedSet(x))
        attributes = getattr(x, "__dict__", None)
        if attributes:
            self._save(SavedDict(x, attributes))
        if slots := slots_of(type(x)):
            self._save(SavedSlots(x, slots))
        self._find_classes(type(x))

    def _save_dict(self, x: dict[Any, Any]) -> None:
        self._save(SavedDict(x, x))

    def _save_list(self, x: list[Any]) -> None:
        self._save(SavedSequence(x))

    def _save_class(self, x: type) -> None:
        self._save(SavedClass(x))

    def _save_cell(self, x: CellType) -> None:
        self._save(SavedCell(x))

    def _save_values(self, x: Any) -> None:
        self._saved.append(SavedValues(x))

    def _save_generator(self, x: Any) -> None:
        self._saved.append(SavedGenerator(x))

    def _save_function(self, x: FunctionType) -> None:
        for cell in x.__closure__ or ():
            self._find(cell, x, "its closure")
        for default in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
            self._find(default, x, "its defaults")
        if x.__dict__:
            self._save(SavedDict(x, x.__dict__))

    def _save_method(self, x: MethodType) -> None:
        self._find(x.__self__, x, "its object")
        self._find(x.__func__, x, "its function")

    def _save_partial(self, x: functools.partial[Any]) -> None:
        for part in (x.func, *x.args, *x.keywords.values()):
            self._find(part, x, "its arguments")

    def _find_classes(self, kind: type) -> None:
        """Find the classes of an object, which may hold state, or functions that do."""
        if kind in _STATELESS_KINDS or id(kind) in self._own:
            return
        if kind.__module__.partition(".")[0] in _STATELESS:
            _STATELESS_KINDS.add(kind)
            return
        for own in kind.__mro__:
            if own.__module__.partition(".")[0] not in _STATELESS and id(own) not in self._own:
                self._own[id(own)] = own
                self._places[id(own)] = (None, f"class {own.__name__}")
                self._todo.append((Snapshot._save_class, own))


def reachable(module: nn.Module) -> set[int]:
    """Return the ids of all objects that a module's forward can reach without arguments."""
    snapshot = Snapshot(module)
    snapshot.restore()
    return snapshot.ids


# ------------------------------------------------------------------------------------------------- by kind of object

_Handler = Callable[[Snapshot, Any], Any]


def _queued(save: Callable[[Snapshot, Any], None]) -> _Handler:
    """Return a handler for objects that stay the same in a pass: they are saved, all in one loop."""

    def handle(snapshot: Snapshot, x: Any) -> Any:
        snapshot._todo.append((save, x))
        return x

    return handle


_HANDLERS: dict[type, _Handler | None] = {
    dict: _queued(Snapshot._save_dict),
    list: _queued(Snapshot._save_list),
    tuple: Snapshot._tuple,
    Tensor: Snapshot._tensor,
    FunctionType: _queued(Snapshot._save_function),
    MethodType: _queued(Snapshot._save_method),
    CellType: _queued(Snapshot._save_cell),
    bytearray: _queued(Snapshot._save_values),
    random.SystemRandom: None,
}
"""What is done with an object of a kind; None if it holds nothing that a forward could change."""


def _handler(kind: type) -> _Handler | None:
    """Return the handler of a kind of object, and remember it."""
    if kind not in _HANDLERS:
        _HANDLERS[kind] = _find_handler(kind)
    return _HANDLERS[kind]


def _find_handler(kind: type) -> _Handler | None:
    package = kind.__module__.partition(".")[0]
    if issubclass(kind, Uncopied | nn.Parameter | type | frozenset):
        return None
    bases: dict[type, _Handler] = {
        Tensor: Snapshot._tensor,
        torch.jit.ScriptModule: _queued(Snapshot._save_script),
        nn.Module: _queued(Snapshot._save_module),
        tuple: Snapshot._tuple,
        functools.partial: _queued(Snapshot._save_partial),
        array: _queued(Snapshot._save_values),
        torch.Generator: _queued(Snapshot._save_generator),
        random.Random: _queued(Snapshot._save_generator),
    }
    for base, handler in bases.items():
        if issubclass(kind, base):
            return handler
    if package == "numpy":
        if kind.__name__ in ("Generator", "RandomState"):
            return _queued(Snapshot._save_generator)
        return _queued(Snapshot._save_values) if hasattr(kind, "tobytes") and hasattr(kind, "__setitem__") else None
    if issubclass(kind, dict | list | set | deque):
        return _queued(Snapshot._save_object)
    if hasattr(kind, "__next__") and not issubclass(kind, io.IOBase):
        return Snapshot._iterator
    if package in _OPAQUE and package not in _WALKED:
        return None
    return _queued(Snapshot._save_object) if kind.__dictoffset__ or slots_of(kind) else None
