"""The walk from a module and its arguments to all that a call of it can reach, by kind of object.

It follows attributes, closures, bound methods, references and classes of the user's own. Out of reach are variables of
Python modules and the inside of objects that are written in C.
"""

from __future__ import annotations

import contextvars
import functools
import io
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import chain, islice
from mmap import mmap
from operator import attrgetter, is_not, itemgetter
from types import CellType, FunctionType, MappingProxyType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import (
    Saved,
    SavedAttributes,
    SavedCell,
    SavedClass,
    SavedDict,
    SavedObject,
    SavedPartial,
    SavedSequence,
    SavedSet,
    SavedSlots,
    slots_of,
)
from lightning_abpem.modules.contents import (
    SavedArray,
    SavedCache,
    SavedGenerator,
    SavedMap,
    SavedScript,
    SavedStream,
    SavedValues,
    is_locked,
    unbounded_items,
)
from lightning_abpem.modules.iterators import Refusing, copied, parts
from lightning_abpem.modules.kinds import PLAIN, is_stateless, saver_of
from lightning_abpem.modules.quiet import is_lightnings
from lightning_abpem.modules.saved_modules import SavedModules
from lightning_abpem.modules.stand_ins import StandInForOwn, Uncopied, log_nothing
from lightning_abpem.modules.tensors import SavedTensor, normal_tensor

__all__ = ["Walk"]

_STANDARD = list(nn.Module().__dict__)  # attributes of every module, most often its first
_COUNT = len(_STANDARD)
_DEFAULTS = {name: FunctionType.__dict__[name] for name in ("__defaults__", "__kwdefaults__")}
_attributes = attrgetter("__dict__")
_hooks_of = itemgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ScriptModule: type = torch.jit.ScriptModule


class Walk(Uncopied):
    """Saves what can be reached, as it is now; see its subclasses, which have a table of handlers each.

    Args:
        target: the module that is called.
        is_sharded: True if FSDP2 replaces the modules' parameters in their calls.
    """

    _handlers: ClassVar[dict[type, _Handler | None]]  # None for what holds nothing that a forward could change

    def __init_subclass__(cls) -> None:
        cls._handlers = {}

    def __init__(self, target: nn.Module, is_sharded: bool) -> None:
        self._target = target
        self._own: dict[int, Any] = {}  # by id: the object itself, or what stands in for it
        self._alive: list[Any] = []
        self._places: dict[int, tuple[Any, Any]] = {}  # by id: the container that it was found in, and the key there
        self._todo: list[tuple[Callable[[Walk, Any], None], Any]] = []
        self._saved: list[Saved] = []
        self._modules = SavedModules(is_sharded)
        self._tensors: list[SavedTensor] = []
        self._parameters: list[nn.Parameter] = []
        self._loose: list[nn.Parameter] = []  # parameters that are in no module's table
        self._used: set[int] = set()  # ids of what may have changed without a trace
        self._is_compiled = False

    def _save_all(self) -> None:
        """Save all that was found, and what is found in it."""
        while self._todo:
            save, x = self._todo.pop()
            save(self, x)
        if self._loose:
            known = set(map(id, self._parameters))
            self._parameters += [p for p in self._loose if id(p) not in known]
            self._loose.clear()
        for p in filter(_attributes, self._parameters):
            self._save(SavedAttributes(p))
        for p in self._parameters:
            if hooks := p._backward_hooks:
                self._save(SavedDict(p, hooks))
        if self._todo:
            self._save_all()

    def _find(self, x: Any, parent: Any, key: Any) -> Any:
        """Note an object for saving; return what the pass gets in its place, mostly itself."""
        kind = type(x)
        if kind in PLAIN or (kind is tuple and PLAIN.issuperset(map(type, x))):
            return x
        handler = self._handlers.get(kind) or self._handler(kind)
        if handler is None:
            return x
        own = self._own.get(id(x))
        if own is None:
            self._places[id(x)] = (parent, key)
            self._alive.append(x)
            own = self._own[id(x)] = handler(self, x)
        return own

    @classmethod
    def _handler(cls, kind: type) -> _Handler | None:
        """Return what is done with an object of a kind, and remember it."""
        if kind not in cls._handlers:
            name, has_attributes = saver_of(kind)
            cls._handlers[kind] = None if name is None else _made(cls, name, has_attributes)
        return cls._handlers[kind]

    def _find_fixed(self, x: Any, parent: Any, key: Any) -> None:
        """Note an object in a place where nothing can stand in for it."""
        if isinstance(own := self._find(x, parent, key), Refusing):
            next(own)

    def _tensor(self, x: Tensor) -> Tensor:
        own = x if x.is_leaf and not x.is_inference() else normal_tensor(x)
        if type(x) is not Tensor:
            self._todo.append((Walk._save_kind, x))
        self._save(SavedAttributes(x))
        if x.is_leaf and x.grad is not None:
            self._find_fixed(x.grad, x, "its gradient")
        if own is not x:
            own.__dict__.update(x.__dict__)
        if not x.is_inference():  # else its clone is the pass's own
            self._tensors.append(SavedTensor(own, id(x)))
        return own

    def _parameter(self, x: nn.Parameter) -> nn.Parameter:
        if not x.is_inference():
            self._loose.append(x)
        return x

    def _tuple(self, x: tuple[Any, ...]) -> Any:
        items, kind = tuple.__iter__(x), type(x)
        self._find_classes(kind)
        own = tuple([self._find(item, x, i) for i, item in enumerate(items)])
        if not any(map(is_not, own, tuple.__iter__(x))):
            return x
        if kind is tuple:
            return own
        made = kind(own) if hasattr(x, "n_sequence_fields") else tuple.__new__(kind, own)
        if kind.__dictoffset__:
            made.__dict__.update(x.__dict__)
        return made

    def _method(self, x: MethodType) -> Any:
        """Find what a method is of. Lightning's `log`, which somebody keeps, logs nothing in a pass."""
        self._todo.append((Walk._save_method, x))
        return log_nothing if is_lightnings(x) else x

    def _iterator(self, x: Any) -> Any:
        own = copied(x)
        if own is None:
            return Refusing(self._name(id(x)), type(x))
        self._used.add(id(x))  # nobody can tell whether the copy was
        for part in parts(x):
            self._find(part, x, "its items")
        return own

    def _name(self, key: int) -> str:
        """Return where the object with an id was found, in words."""
        steps: list[str] = []
        parent, place = self._places.get(key, (None, "an object"))
        while parent is not None and not isinstance(parent, nn.Module):
            steps.append(str(place))
            parent, place = self._places.get(id(parent), (None, ""))
        if isinstance(parent, nn.Module):
            names = {id(module): name for name, module in self._target.named_modules()}
            steps.append(f"attribute '{place}' of module '{names.get(id(parent)) or type(parent).__name__}'")
        else:
            steps.append(str(place))
        return ", ".join(reversed(steps))

    # -------------------------------------------------------------------------------------------------------- saving

    def _save(self, saved: Saved) -> None:
        """Save a container's items, find what they hold, and replace those that the pass cannot take."""
        self._saved.append(saved)
        if not PLAIN.issuperset(map(type, saved.items.values())):
            self._find_items(saved, saved.items)

    def _find_items(self, saved: Saved, items: dict[Any, Any]) -> None:
        stand_ins = {}
        for key, value in items.items():
            if type(value) not in PLAIN:
                own = self._find(value, saved.owner, key)
                if own is not value:
                    stand_ins[key] = own
        if stand_ins:
            self._replace(saved, stand_ins)

    def _replace(self, saved: Saved, stand_ins: dict[Any, Any]) -> None:
        saved.replace(stand_ins)

    def _save_module(self, x: nn.Module) -> None:
        """Save a module and all in it, those that are known already excepted."""
        modules, known = [x], self._own
        for own in modules:
            for child in own._modules.values():
                if id(child) not in known and isinstance(child, nn.Module):
                    if isinstance(child, _ScriptModule):
                        self._find(child, own, "its modules")
                    else:
                        known[id(child)] = child
                        modules.append(child)
        first = len(self._modules.owners)
        self._modules.add(modules)
        for place, own in enumerate(modules, first):
            attributes = own.__dict__
            is_usual = list(islice(attributes, _COUNT)) == _STANDARD
            if not (is_usual and PLAIN.issuperset(map(type, islice(attributes.values(), _COUNT, None)))):
                self._find_attributes(own, place, _COUNT if is_usual else 0)
            if table := attributes["_parameters"]:
                self._parameters += [p for p in table.values() if p is not None and not p.is_inference()]
            if any(hooks := _hooks_of(attributes)):
                for value in chain.from_iterable(map(dict.values, hooks)):
                    self._find(value, own, "one of its hooks")
            if table := attributes["_buffers"]:
                self._save(SavedDict(own, table))
        for kind in set(map(type, modules)):
            if slots := slots_of(kind):
                for own in modules:
                    if type(own) is kind:
                        self._save(SavedSlots(own, slots))
            self._find_classes(kind)

    def _find_attributes(self, x: nn.Module, place: int, first: int) -> None:
        stand_ins = {}
        for name, value in list(islice(x.__dict__.items(), first, None)):
            if type(value) not in PLAIN and (first or name not in _STANDARD):
                own = self._find(value, x, name)
                if own is not value:
                    stand_ins[name] = own
        if stand_ins:
            self._modules.replace(place, stand_ins)

    def _save_script(self, x: torch.jit.ScriptModule) -> None:
        for own in x.modules():
            self._own[id(own)] = own
            self._save(SavedScript(own))
        self._parameters += [p for p in x.parameters() if not p.is_inference()]

    def _save_object(self, x: Any) -> None:
        """Save an object's attributes, and its items if it is a container besides."""
        if isinstance(x, dict):
            self._save_dict(x)
            if isinstance(x, defaultdict):
                self._find_fixed(x.default_factory, x, "its factory")
        elif isinstance(x, list | deque):
            self._save(SavedSequence(x))
        elif isinstance(x, set):
            self._save(SavedSet(x))
        if type(x).__dictoffset__ or isinstance(x, threading.local):
            self._save(SavedObject(x))
        self._save_kind(x)

    def _save_kind(self, x: Any) -> None:
        if slots := slots_of(type(x)):
            self._save(SavedSlots(x, slots))
        self._find_classes(type(x))

    def _save_dict(self, x: dict[Any, Any]) -> None:
        saved = SavedDict(x, x)
        self._save(saved)
        if not PLAIN.issuperset(map(type, saved.items)):
            self._find_parts(x, saved.items)

    def _find_parts(self, x: Any, parts: Iterable[Any]) -> None:
        for part in parts:
            self._find_fixed(part, x, "one of its keys")

    def _save_frozen(self, x: Iterable[Any]) -> None:
        self._find_parts(x, frozenset.__iter__(x) if isinstance(x, frozenset) else x)

    def _save_mapping(self, x: MappingProxyType[Any, Any]) -> None:
        self._find_parts(x, x.values())

    def _save_optimizer(self, x: torch.optim.Optimizer) -> None:
        """Save an optimizer; of that of parameters, which no forward may move, options alone: it is as large."""
        if all(isinstance(p, nn.Parameter) for group in x.param_groups for p in group["params"]):
            self._saved += [SavedDict(x, group) for group in x.param_groups]
        else:
            self._save_object(x)

    def _save_trainer(self, x: Any) -> None:
        """Save the attributes of a user's data module, and nothing in them: they hold whole sets of data."""
        data: Any = getattr(x, "datamodule", None)
        kind: type = type(data)
        if data is not None and not is_stateless(kind):
            self._own[id(data)] = data
            self._saved.append(SavedObject(data))

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

    def _save_array(self, x: Any) -> None:
        if not is_locked(x):
            self._saved.append(SavedArray(x))
        for name in (x.dtype.names or ()) if x.dtype.hasobject else ():
            self._find_fixed(x[name], x, f"its field '{name}'")
        if x.dtype == object:
            for item in x.flat:
                self._find_fixed(item, x, "one of its items")

    def _save_record(self, x: Any) -> None:
        self._find_fixed(x.base, x, "its array")

    def _save_map(self, x: mmap) -> None:
        if not x.closed and not memoryview(x).readonly:
            self._saved.append(SavedMap(x))

    def _save_view(self, x: memoryview) -> None:
        self._find_fixed(x.obj, x, "its memory")

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
        if x.__defaults__ or x.__kwdefaults__:
            self._save(SavedSlots(x, _DEFAULTS))
        self._save(SavedDict(x, x.__dict__))

    def _save_method(self, x: Any) -> None:
        self._find_fixed(x.__self__, x, "its object")
        self._find(getattr(x, "__func__", None), x, "its function")

    def _save_descriptor(self, x: Any) -> None:
        for name in ("fget", "fset", "fdel", "__func__"):
            self._find(getattr(x, name, None), x, "its function")

    def _save_stand_in(self, x: StandInForOwn) -> None:
        self._find_fixed(x.original.own, x, "its function")

    def _save_partial(self, x: functools.partial[Any]) -> None:
        self._save(SavedPartial(x))

    def _save_cache(self, x: Any) -> None:
        if (items := unbounded_items(x)) is None:
            self._saved.append(SavedCache(x))
        else:
            self._find_fixed(items, x, "its results")
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
        if is_stateless(kind) or id(kind) in self._own:
            return
        for own in {*kind.__mro__, *type.mro(type(kind))}:
            if id(own) not in self._own and not is_stateless(own):
                self._own[id(own)] = own
                self._places[id(own)] = (None, f"class {own.__name__}")
                self._todo.append((Walk._save_class, own))


_Handler = Callable[[Walk, Any], Any]


def _made(cls: type[Walk], name: str, has_attributes: bool) -> _Handler:
    """Return a handler by a method; objects that stay the same in a pass are saved later, all in one loop."""
    method: _Handler = getattr(cls, name)

    def queue(walk: Walk, x: Any) -> Any:
        walk._todo.append((method, x))
        return x

    find = queue if name.startswith("_save_") else method

    def find_and_queue(walk: Walk, x: Any) -> Any:
        walk._todo.append((Walk._save_object, x))
        return find(walk, x)

    return find_and_queue if has_attributes else find
