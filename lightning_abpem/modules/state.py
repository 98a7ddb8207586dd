"""State that a forward can reach: saved before a pass of the engine, put back by value after it.

`Snapshot` walks from the arguments and the modules of a model to every tensor, container and object. It follows
attributes, closures, bound methods and classes of the user's own. A pass works on the very same objects, so that
identities, aliases and memory layouts are those of a plain call. Two kinds of tensors have a stand-in during the
pass, because autograd refuses them: those made in inference mode and those with a history.

Out of reach are variables of Python modules and the inside of objects that are written in C.
"""

from __future__ import annotations

import contextvars
import functools
import io
import random
import sys
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from operator import is_not
from types import BuiltinMethodType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import (
    Saved,
    SavedAttributes,
    SavedCache,
    SavedCell,
    SavedClass,
    SavedDict,
    SavedGenerator,
    SavedModule,
    SavedScript,
    SavedSequence,
    SavedSet,
    SavedSlots,
    SavedStream,
    SavedValues,
    slots_of,
)
from lightning_abpem.modules.iterators import Refusing, copied
from lightning_abpem.modules.patches import Uncopied
from lightning_abpem.modules.randomness import RandomState
from lightning_abpem.modules.tensors import SavedTensor, bit_sum, normal_tensor

__all__ = ["Snapshot", "reachable"]

_PLAIN = frozenset(
    {int, float, complex, bool, str, bytes, type(None), range, slice, torch.dtype, torch.device, torch.Size}
)
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
_LOGGERS = {"wandb", "mlflow", "comet_ml", "neptune", "clearml", "aim", "tensorboard"}
_OPAQUE = {*_LIBRARIES, *_LOGGERS, *sys.stdlib_module_names}  # their objects hold no state of a forward
_WALKED = {"types", "collections", "argparse", "functools", "weakref", "queue"}  # UserDict, Queue, ...
_STATELESS = {*_OPAQUE, "torchmetrics", "transformers", "timm", "torchvision", "torchaudio"}  # their classes
_IN_PYTHON = 1 << 9  # of a class's flags: a `class` statement made it
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
        self._gradients: list[Tensor | None] = []  # of the parameters
        self._bare: list[nn.Parameter] = []  # those without attributes
        self._sums: list[Tensor] = []
        self._used: set[int] = set()
        self._is_compiled = False
        self._random, self._dtype = RandomState(target), torch.get_default_dtype()
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
        for (p, _), gradient in zip(self._parameters, self._gradients, strict=False):
            if p.grad is not gradient:
                p.grad = gradient
                changed.add(id(p))
        changed.update(id(p) for p in self._bare if p.__dict__ and SavedAttributes(p, {}).restore())
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
            changed.update(self._own)
        self.drew = self._random.restore() or self.drew
        return changed | self._used | {saved.key for saved in self._tensors if saved.restore()}

    def call(self, function: Callable[..., Any]) -> Any:
        """Call with the arguments of a pass, in a copy of the context, so that context variables keep their values."""
        before = contextvars.copy_context()
        own = before.copy()
        try:
            return own.run(function, *self.args, **self.kwargs)
        finally:
            moved = len(own) != len(before) or any(own[variable] is not before[variable] for variable in before)
            if moved and not self._is_compiled:  # the compiler sets variables of its own
                self._used.update(self._own)  # any module may have set them

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
                "place. The adapting passes would edit it once more for every batch. Keep such a value in a buffer, "
                "and load the parameter again: this pass moved it."
            )

    # ------------------------------------------------------------------------------------------------------- finding

    def _find(self, x: Any, parent: Any, key: Any) -> Any:
        """Note an object for saving; return what the pass gets in its place, mostly itself."""
        kind = type(x)
        if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, x))):
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

    def _find_fixed(self, x: Any, parent: Any, key: Any) -> None:
        """Note an object in a place where nothing can stand in for it."""
        if isinstance(own := self._find(x, parent, key), Refusing):
            next(own)

    def _tensor(self, x: Tensor) -> Tensor:
        own = normal_tensor(x)
        self._save(SavedAttributes(x))
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
        own = copied(x)
        if own is None:
            return Refusing(self._name(x), type(x))
        self._used.add(id(x))  # nobody can tell whether the copy was
        for part in x.__reduce__()[1]:
            self._find(part, x, "its items")
        return own

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
                self._gradients.append(p.grad)
                self._own[id(p)] = p
                if p.__dict__:
                    self._save(SavedAttributes(p))
                else:
                    self._bare.append(p)
        for name in ("_modules", "_forward_pre_hooks", "_forward_hooks"):
            for key, value in own[name].items():
                self._find(value, x, key)
        if x._buffers:
            self._save(SavedDict(x, x._buffers))
        if slots := slots_of(type(x)):
            self._save(SavedSlots(x, slots))
        self._find_classes(type(x))

    def _save_script(self, x: torch.jit.ScriptModule) -> None:
        for own in x.modules():
            self._own[id(own)] = own
            self._save(SavedScript(own))

    def _save_object(self, x: Any) -> None:
        """Save an object's attributes, and its items if it is a container besides."""
        if isinstance(x, dict):
            self._save_dict(x)
        elif isinstance(x, list | deque):
            self._save(SavedSequence(x))
        elif isinstance(x, set):
            self._save(SavedSet(x))
        if type(x).__dictoffset__ or isinstance(x, threading.local):
            self._save(SavedDict(x, x.__dict__))
        if slots := slots_of(type(x)):
            self._save(SavedSlots(x, slots))
        self._find_classes(type(x))

    def _save_dict(self, x: dict[Any, Any]) -> None:
        self._save(SavedDict(x, x))
        if not _PLAIN.issuperset(map(type, x)):
            self._save_parts(x)

    def _save_parts(self, x: Iterable[Any]) -> None:
        for part in x:
            self._find_fixed(part, x, "one of its keys")

    def _save_list(self, x: list[Any]) -> None:
        self._save(SavedSequence(x))

    def _class(self, x: type) -> type:
        self._find_classes(x)
        return x

    def _save_class(self, x: type) -> None:
        self._save(SavedClass(x))

    def _save_cell(self, x: CellType) -> None:
        self._save(SavedCell(x))

    def _save_values(self, x: Any) -> None:
        self._saved.append(SavedValues(x))
        if getattr(getattr(x, "dtype", None), "hasobject", False):
            for item in x.flat:
                self._find_fixed(item, x, "one of its items")

    def _save_stream(self, x: io.BytesIO | io.StringIO) -> None:
        if not x.closed:
            self._saved.append(SavedStream(x))

    def _save_generator(self, x: Any) -> None:
        self._saved.append(SavedGenerator(x))

    def _save_function(self, x: FunctionType) -> None:
        if x.__globals__.get("__name__", "").startswith("torch._dynamo"):  # the compiler's state is its own
            self._is_compiled = True
            self._find(getattr(x, "_torchdynamo_orig_callable", None), x, "its function")
            return
        for cell in x.__closure__ or ():
            self._find(cell, x, "its closure")
        for default in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
            self._find_fixed(default, x, "its defaults")
        self._save(SavedDict(x, x.__dict__))

    def _save_method(self, x: Any) -> None:
        self._find_fixed(x.__self__, x, "its object")
        self._find(getattr(x, "__func__", None), x, "its function")

    def _save_descriptor(self, x: Any) -> None:
        for name in ("fget", "fset", "fdel", "__func__"):
            self._find(getattr(x, name, None), x, "its function")

    def _save_partial(self, x: functools.partial[Any]) -> None:
        if isinstance(getattr(x.func, "__self__", None), Uncopied):  # ours, in front of a forward
            if type(x.args[-1]) is not MethodType:
                self._find_fixed(x.args[-1], x, "its function")
            return
        for part in (x.func, *x.args, *x.keywords.values()):
            self._find_fixed(part, x, "its arguments")

    def _save_cache(self, x: Any) -> None:
        self._saved.append(SavedCache(x))
        self._find(x.__wrapped__, x, "its function")

    def _save_reference(self, x: Any) -> None:
        self._find(x(), x, "what it refers to")

    def _save_proxy(self, x: Any) -> None:
        try:
            self._find(x.__init__.__self__, x, "what it refers to")
        except ReferenceError:
            return

    def _save_variable(self, x: contextvars.ContextVar[Any]) -> None:
        self._find_fixed(x.get(None), x, "its value")

    def _find_classes(self, kind: type) -> None:
        """Find the classes of an object, which may hold state, or functions that do."""
        if kind in _STATELESS_KINDS or id(kind) in self._own:
            return
        if kind.__module__.partition(".")[0] in _STATELESS:
            _STATELESS_KINDS.add(kind)
            return
        for own in {*type.mro(kind), *type.mro(type(kind))}:
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
    BuiltinMethodType: _queued(Snapshot._save_method),
    MethodWrapperType: _queued(Snapshot._save_method),
    property: _queued(Snapshot._save_descriptor),
    staticmethod: _queued(Snapshot._save_descriptor),
    classmethod: _queued(Snapshot._save_descriptor),
    CellType: _queued(Snapshot._save_cell),
    bytearray: _queued(Snapshot._save_values),
    weakref.ProxyType: _queued(Snapshot._save_proxy),
    contextvars.ContextVar: _queued(Snapshot._save_variable),
    type(functools.cache(len)): _queued(Snapshot._save_cache),
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
    if issubclass(kind, Uncopied | nn.Parameter | ModuleType):
        return None
    bases: dict[type, _Handler] = {
        Tensor: Snapshot._tensor,
        torch.jit.ScriptModule: _queued(Snapshot._save_script),
        nn.Module: _queued(Snapshot._save_module),
        tuple: Snapshot._tuple,
        functools.partial: _queued(Snapshot._save_partial),
        type: Snapshot._class,
        io.BytesIO: _queued(Snapshot._save_stream),
        io.StringIO: _queued(Snapshot._save_stream),
        threading.local: _queued(Snapshot._save_object),
        frozenset: _queued(Snapshot._save_parts),
        weakref.ref: _queued(Snapshot._save_reference),
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
    if hasattr(kind, "__next__") and (package in _OPAQUE or not kind.__flags__ & _IN_PYTHON):
        return None if issubclass(kind, io.IOBase) else Snapshot._iterator
    if package in _OPAQUE and package not in _WALKED:
        return None
    return _queued(Snapshot._save_object) if kind.__dictoffset__ or slots_of(kind) else None
