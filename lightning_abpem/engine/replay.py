"""Running the frozen part of a model once per batch: record, match, return.

The adapting pass and the prediction get the same arguments, and everything ahead of the fusion is frozen. So its
outputs are the same: they are recorded in the first pass and returned in the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from lightning_abpem.modules.compiled import compiled_entry, inside_compiled
from lightning_abpem.modules.parameters import GradientFlags
from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.stand_ins import Uncopied, hides_attribute
from lightning_abpem.modules.state import reachable
from lightning_abpem.modules.tensors import reading_waits, same_bits

__all__ = ["FrozenReplay"]

log = logging.getLogger(__name__)
_LEAF = tree_flatten(0)[1]
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, slice)


@dataclass
class _Recorded:
    """One call of a frozen module: its inputs, its outputs, and by which flags and precision torch computed."""

    inputs: list[Any]
    input_versions: list[int | None]
    input_spec: TreeSpec
    outputs: list[Any]
    output_versions: list[int | None]
    output_spec: TreeSpec
    precision: tuple[Any, ...]
    flags: list[bool]


class FrozenReplay(Uncopied):
    """Runs the frozen modules of a model once per batch, however many passes there are.

    Every outermost call of a module without adapted parameters, ahead of the first module with some, is recorded in the
    first pass. A later pass gets the recorded output if the same call comes with the same arguments: the same
    unchanged tensors, or equal ones, under the same flags of its parameters. In any doubt the module simply runs.

    A module that does more than to give an output runs in every pass, and what it calls is replayed in its place:
    one with hooks on others inside it, one that edits its arguments, one in training mode, one whose state a pass has
    changed, and one that reaches adapted parameters by a reference or a closure. A model that draws random numbers is
    not replayed at all. The first batches are audited: what would have been replayed is computed again and compared.

    Args:
        model: the module whose submodules are replayed, itself excepted.
        adapted: the parameters that change between the passes.
        watched: modules whose hooks may change how torch computes them, or need other processes; what holds one runs
            in every pass.
        varying: modules that get other inputs in every pass; they and what is in them run in every pass.
        audited_batches: number of batches in which what is replayed is audited, and so is the first replay of a call
            that comes later; 0 for no audit at all.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Collection[nn.Parameter],
        watched: Collection[nn.Module] = (),
        varying: Collection[nn.Module] = (),
        audited_batches: int = 2,
    ) -> None:
        self._moving = moving = {id(p) for p in adapted}
        self._model, self.enabled = model, True
        hidden = {model} | inside_compiled(model)
        owners = {m for m in model.modules() if not moving.isdisjoint(map(id, m.parameters(recurse=False)))}
        self._moved = [m for m in model.modules() if m in owners | set(watched) and m not in hidden]
        hidden |= {m for m in model.modules() if hides_attribute(m, "forward")}
        hidden |= {m for m in model.modules() if not set(watched).isdisjoint(m.modules())}
        hidden |= {inner for m in varying for inner in m.modules()}
        self._modules = {id(m): m for m in model.modules() if m not in hidden and _is_frozen(m, moving)}
        self._inner = {key: list(m.modules()) for key, m in self._modules.items()}
        self._recording = set(self._modules)  # those of which no side effect was seen
        self._heavy = {key for key, m in self._modules.items() if any(p.dim() > 1 for p in m.parameters())}
        self._audited_batches = self._unaudited = audited_batches
        self._mode: str | None = None
        self._inside = self._audits = self._is_behind = False
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._replayed: set[tuple[int, int]] = set()
        self._call_index: dict[int, int] = {}
        self._parameters = {key: list(m.parameters()) for key, m in self._modules.items()}
        self._flags = GradientFlags(nn.Module(), ())

    def attach(self, changes: Changes, flags: GradientFlags | None = None) -> None:
        """Put the recorder in front of every frozen module's forward.

        Args:
            changes: undo that.
            flags: the user's hold while a module is recorded, so that it rounds as in a prediction.
        """
        changes.note(self.end_batch)
        self._flags = self._flags if flags is None else flags
        self._leave_out_what_reaches_adapted()
        for module in self._moved:
            # Its plain forward is known by what stands there, or a property stands ahead of it.
            if compiled_entry(module) == "forward" or hides_attribute(module, "forward"):
                changes.hook(module, "register_forward_pre_hook", lambda *_: self._pass_fusion())
            else:
                changes.wrap(module, compiled_entry(module) or "forward", self._enter)
        for key, module in self._modules.items():
            changes.wrap(module, compiled_entry(module) or "forward", self._call, key)

    def _leave_out_what_reaches_adapted(self) -> None:
        """Record no module that could compute with what moves by way of a reference, a closure or the like."""
        clean: set[int] = set()
        for key, module in self._modules.items():  # the outer ones come first, and reach what the inner ones do
            if key in clean:
                continue
            if self._moving.isdisjoint(reachable(module)):
                clean.update(map(id, module.modules()))
            else:
                self._recording.discard(key)

    def start_pass(self) -> None:
        """Begin a pass over the batch: the first one records, those after it replay."""
        if self.enabled:
            self._mode = "record" if self._mode is None else "replay"
            self._call_index.clear()
            self._is_behind = False

    def end_batch(self) -> None:
        """Forget the batch."""
        self._unaudited -= self._audits
        self._mode, self._inside, self._audits = None, False, False
        self._recorded.clear()

    def forget(self, changed: set[int], drew: bool) -> None:
        """Stop recording what did more in a pass than to give an output.

        Args:
            changed: the ids of what the pass changed.
            drew: True if it drew random numbers.
        """
        if drew:
            self.disable("The forward draws random numbers in eval mode")
        if not changed:
            return
        for key in {key for key, _ in self._recorded}:
            if not changed.isdisjoint(reachable(self._modules[key])):
                self._recording.discard(key)
                log.info("'%s' changes its state in a call, so it runs in every pass.", self._name(key))
        self._recorded = {call: own for call, own in self._recorded.items() if call[0] in self._recording}

    def disable(self, why: str) -> None:
        """Replay nothing any more; said once."""
        if self.enabled:
            log.warning("%s, so nothing is replayed: each prediction runs the whole model again.", why)
        self.enabled, self._mode = False, None
        self._recorded.clear()

    def _enter(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._pass_fusion()
        return forward(*args, **kwargs)

    def _pass_fusion(self) -> None:
        """Note that from here on tensors, and the state of modules, may depend on what moves."""
        self._is_behind = True

    def _call(self, key: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._mode is None or self._inside or self._is_behind or key not in self._recording or self._is_watched(key):
            return forward(*args, **kwargs)
        call = (key, self._call_index.get(key, 0))
        self._call_index[key] = call[1] + 1
        self._inside = True
        try:
            if self._mode == "record":
                return self._record(call, forward, args, kwargs)
            recorded = self._recorded.get(call)
            if torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters[key]):
                return forward(*args, **kwargs)  # the user wants the gradients of a prediction
            if recorded is None or recorded.flags != self._flags_of(key):
                return forward(*args, **kwargs)
            if not self._matches(recorded, *_flat(args, kwargs), key in self._heavy):
                return forward(*args, **kwargs)
            if self._unaudited > 0 or (self._audited_batches and call not in self._replayed):
                self._audit(key, recorded, forward)
            self._replayed.add(call)
            alone = recorded.output_spec == _LEAF
            return recorded.outputs[0] if alone else tree_unflatten(recorded.outputs, recorded.output_spec)
        finally:
            self._inside = False

    def _is_watched(self, key: int) -> bool:
        """Return True if somebody's hooks are on modules inside, or one of them is in training mode."""
        module = self._modules[key]
        return any(
            inner.training or (inner is not module and (inner._forward_hooks or inner._forward_pre_hooks))
            for inner in self._inner[key]
        )

    def _record(self, call: tuple[int, int], forward: Any, args: Any, kwargs: Any) -> Any:
        inputs, spec = _flat(args, kwargs)
        if not all(map(_is_constant, inputs)):
            return forward(*args, **kwargs)
        before, flags = _versions(inputs), self._flags_of(call[0])
        output = self._run(call[0], forward, args, kwargs)
        if spec != _LEAF and not _is_same_tree(inputs, spec, *_flat(args, kwargs)):
            self._recording.discard(call[0])  # it edits the containers that it gets
            return output
        outputs, output_spec = ([output], _LEAF) if isinstance(output, Tensor) else tree_flatten(output)
        if all(map(_is_constant, outputs)) and before == _versions(inputs) and not _share_memory(outputs):
            self._recorded[call] = _Recorded(
                inputs, before, spec, outputs, _versions(outputs), output_spec, _precision(outputs), flags
            )
        return output

    def _run(self, key: int, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run a frozen module on constants as in a prediction: by the user's flags, without gradients."""
        frozen = [p for p in self._parameters[key] if id(p) in self._flags.frozen and not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            with torch.no_grad():
                output = forward(*args, **kwargs)
        finally:
            for p in frozen:
                p.requires_grad_(False)
        if isinstance(output, Tensor):
            return _editable(output)
        return tree_map_only(Tensor, _editable, output)

    def _flags_of(self, key: int) -> list[bool]:
        """Return the flags by which `_run` would run a module now."""
        return [p.requires_grad or id(p) in self._flags.frozen for p in self._parameters[key]]

    def _audit(self, key: int, recorded: _Recorded, forward: Callable[..., Any]) -> None:
        """Compute once more, on the recorded inputs: equal ones in another memory layout may differ in the last bit."""
        self._audits = True
        spec = recorded.input_spec
        args, kwargs = (recorded.inputs, {}) if spec == _LEAF else tree_unflatten(recorded.inputs, spec)
        outputs, spec = tree_flatten(self._run(key, forward, args, kwargs))
        if spec != recorded.output_spec or not all(map(_identical, outputs, recorded.outputs)):
            recorded.outputs, recorded.output_spec = outputs, spec
            self.disable("A frozen module gave another output for the same input")

    def _matches(self, recorded: _Recorded, inputs: list[Any], spec: TreeSpec, may_wait: bool) -> bool:
        """Return True if a call is the recorded one.

        On a GPU a comparison of values waits for the device. That pays for a module with a matrix, not for a norm.
        """
        if spec != recorded.input_spec or _precision(recorded.outputs) != recorded.precision:
            return False
        if _versions(recorded.outputs) != recorded.output_versions:
            return False  # something edited them in place
        if _versions(recorded.inputs) != recorded.input_versions:
            return False
        return all(_identical(x, y, may_wait) for x, y in zip(inputs, recorded.inputs, strict=True))

    def _name(self, key: int) -> str:
        return next(name for name, module in self._model.named_modules() if id(module) == key)


def _editable(x: Tensor) -> Tensor:
    """Return a tensor that may be edited under autograd, which refuses that for a view made without it."""
    return x.data if x._is_view() and not x.is_nested else x


def _share_memory(leaves: list[Any]) -> bool:
    """Return True if two tensors lie in the same memory: an edit of one would be an edit of the other."""
    places = [x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]
    return len(set(places)) < len(places)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Return the leaves and the structure of a call's arguments; that of a single tensor, the usual case, is known."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return list(args), _LEAF
    return tree_flatten((args, kwargs))


def _is_same_tree(leaves: list[Any], spec: TreeSpec, others: list[Any], other_spec: TreeSpec) -> bool:
    return spec == other_spec and all(x is y for x, y in zip(leaves, others, strict=True))


def _is_frozen(module: nn.Module, moving: set[int]) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(id(p) in moving for p in parameters)


def _is_constant(x: Any) -> bool:
    if isinstance(x, Tensor):
        return not x.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return isinstance(x, _PLAIN)


def _versions(leaves: list[Any]) -> list[int | None]:
    """Return how often each tensor was edited in place; None for one that does not count, and for other leaves."""
    return [x._version if isinstance(x, Tensor) and not x.is_inference() else None for x in leaves]


def _precision(leaves: list[Any]) -> tuple[Any, ...]:
    """Return in which precision torch computes now, on the device of the first tensor."""
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, torch.get_default_dtype()


def _identical(x: Any, y: Any, may_wait: bool = True) -> bool:
    """Return True if two leaves are known to be the same.

    Values are compared only if that takes no waiting for a device, or `may_wait` says that it may.
    """
    if x is y:
        return True
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return type(x) is type(y) and bool(x == y)
    if x.is_nested or y.is_nested or x.requires_grad or x.layout != y.layout:
        return False
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    if _is_same_view(x, y):
        return True
    return x.layout == torch.strided and (may_wait or not reading_waits(x)) and same_bits(x, y)


def _is_same_view(x: Tensor, y: Tensor) -> bool:
    """Return True if two views show the same part of one tensor, so that they cannot differ."""
    return x._base is not None and x._base is y._base and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()
