"""Running the frozen part of a model once per batch: record, match, return.

The adapting pass and the prediction get the same arguments, and everything ahead of the fusion is frozen. So its
outputs are the same: they are recorded in the first pass, and the others get copies of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from operator import is_not
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn

from lightning_abpem.engine.outputs import editable, find_odd, gives_state
from lightning_abpem.engine.recorded import RecordedCall, flat, in_transform, is_constant
from lightning_abpem.modules.compiled import compiled_entry, inside_compiled
from lightning_abpem.modules.parameters import GradientFlags, parameters_of
from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.stand_ins import StandIn, Uncopied, hides_attribute
from lightning_abpem.modules.state import Snapshot, reachable

__all__ = ["FrozenReplay"]

log = logging.getLogger(__name__)


class FrozenReplay(Uncopied):
    """Runs the frozen modules of a model once per batch, however many passes there are.

    Every outermost call of a module with a matrix and without adapted parameters, ahead of the first module with some,
    is recorded in the first pass. A later pass gets a copy of its output if the same call comes with equal arguments,
    under the same flags of its parameters, to modules whose state is the same. In any doubt the module simply runs, and
    so it does inside traces and transforms of torch.func.

    A module that does more than to give an output runs in every pass, and what it calls is replayed in its place. Such
    is one with hooks on others inside it, one that edits its arguments, one in training mode, one whose state a pass
    has changed, and one that reaches adapted parameters by a reference or a closure. A model that draws random numbers
    is not replayed at all. The first batches are audited: what would have been replayed is computed again and compared.

    Args:
        model: the module whose submodules are replayed, itself excepted.
        adapted: the parameters that change between the passes.
        watched: modules whose hooks may change how torch computes them, or need other processes; what holds one runs
            in every pass.
        varying: modules that get other inputs in every pass; they and what is in them run in every pass.
        audited_batches: number of batches in which what is replayed is audited, and so is the first replay of a call
            that comes later, in every mode of autograd; 0 for no audit at all.
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
        owners = {m for m in model.modules() if not moving.isdisjoint(map(id, m._parameters.values()))}
        self._moved = [m for m in model.modules() if m in owners | set(watched) and m not in hidden]
        hidden |= {m for m in model.modules() if hides_attribute(m, "forward")}
        hidden |= {m for m in model.modules() if not set(watched).isdisjoint(m.modules())}
        hidden |= {inner for m in varying for inner in m.modules()}
        self._modules = {id(m): m for m in model.modules() if m not in hidden and _pays(m, moving)}
        self._inner = {key: list(m.modules()) for key, m in self._modules.items()}
        self._recording = set(self._modules)  # those of which no side effect was seen
        self._audited_batches = self._unaudited = audited_batches
        self._mode: str | None = None
        self._inside = self._audits = self._is_behind = False
        self._recorded: dict[tuple[int, int], RecordedCall] = {}
        self._replayed: set[tuple[tuple[int, int], bool, bool]] = set()  # calls, with autograd's modes
        self._call_index: dict[int, int] = {}
        self._parameters: dict[int, list[nn.Parameter]] = {}
        self._flags = GradientFlags(nn.Module(), ())

    def attach(self, changes: Changes, flags: GradientFlags | None = None) -> None:
        """Put the recorder in front of every frozen module's forward.

        Args:
            changes: undo that.
            flags: the user's hold while a module is recorded, so that it rounds as in a prediction.
        """
        changes.note(self.end_batch)
        self._flags = self._flags if flags is None else flags
        self._parameters = {key: parameters_of(inner) for key, inner in self._inner.items()}
        self._leave_out_what_reaches_adapted()
        for module in self._moved:
            # Its plain forward is known by what stands there, or a property stands ahead of it.
            if compiled_entry(module) == "forward" or hides_attribute(module, "forward"):
                changes.hook(module, "register_forward_pre_hook", lambda *_: self._pass_fusion())
            else:
                changes.wrap_call(module, compiled_entry(module) or "forward", self._enter)
        for key, module in self._modules.items():
            changes.wrap_call(module, compiled_entry(module) or "forward", self._call, key)

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

    def _enter(self, forward: Callable[..., object], /, *args: object, **kwargs: object) -> Any:
        self._pass_fusion()
        return forward(*args, **kwargs)

    def _pass_fusion(self) -> None:
        """Note that from here on tensors, and the state of modules, may depend on what moves."""
        self._is_behind = True

    def _call(self, key: int, forward: Callable[..., object], /, *args: object, **kwargs: object) -> Any:
        if self._mode is None or self._inside or self._is_behind or key not in self._recording:
            return forward(*args, **kwargs)
        if in_transform() or self._is_watched(key) or self._has_other_parameters(key):
            return forward(*args, **kwargs)
        call = (key, self._call_index.get(key, 0))
        self._call_index[key] = call[1] + 1
        self._inside = True
        try:
            if self._mode == "record":
                return self._record(call, forward, args, kwargs)
            return self._replay(call, forward, args, kwargs)
        finally:
            self._inside = False

    def _has_other_parameters(self, key: int) -> bool:
        """Return True if others stand in the place of the module's parameters, as in `functional_call`."""
        now, before = parameters_of(self._inner[key]), self._parameters[key]
        return len(now) != len(before) or any(map(is_not, now, before))

    def _is_watched(self, key: int) -> bool:
        """Return True if somebody's hooks are on modules inside, or one of them is in training mode."""
        module = self._modules[key]
        return any(
            inner.training or (inner is not module and (inner._forward_hooks or inner._forward_pre_hooks))
            for inner in self._inner[key]
        )

    def _record(self, call: tuple[int, int], forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module and hold its output, if the call did nothing but give it; else run it as if it came first.

        What a call has changed is looked for at once. At the end of the pass the forward may have taken it back.
        """
        inputs, spec = flat(args, kwargs)
        if not all(map(is_constant, inputs)):
            return forward(*args, **kwargs)
        key = call[0]
        recorded = RecordedCall(inputs, spec, self._inner[key], self._flags_of(key))
        if all(map(_is_of_torch, self._inner[key])):
            output = self._run(key, forward, args, kwargs)
        else:
            snapshot = Snapshot(self._modules[key], args, kwargs, torchs_generators_alone=True)
            try:
                output = snapshot.call(lambda *own, **named: self._run(key, forward, own, named))
            finally:
                changed = snapshot.restore()
            is_new = find_odd(output) is None and not gives_state(output, snapshot)
            if changed or snapshot.drew or not is_new:
                self._recording.discard(key)
                log.info("'%s' gives more than new tensors, so it runs in every pass.", self._name(key))
                return forward(*args, **kwargs)
        output = editable(output)
        if recorded.keep(output, inputs):
            self._recorded[call] = recorded
        return output

    def _replay(self, call: tuple[int, int], forward: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        key, recorded = call[0], self._recorded.get(call)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters[key]):
            return forward(*args, **kwargs)  # the user wants the gradients of a prediction
        if recorded is None or recorded.flags != self._flags_of(key):
            return forward(*args, **kwargs)
        if not recorded.matches(*flat(args, kwargs)):
            return forward(*args, **kwargs)
        moded = (call, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if self._unaudited > 0 or (self._audited_batches and moded not in self._replayed):
            output = self._audited(key, recorded, forward)
        else:
            output = recorded.output
        self._replayed.add(moded)
        return output

    def _run(
        self, key: int, forward: Any, args: tuple[object, ...], kwargs: dict[str, object], is_audit: bool = False
    ) -> Any:
        """Run a frozen module on constants as in a prediction: by the user's flags, without gradients.

        An audit in the prediction itself has its mode, for a module may ask for that.
        """
        frozen = [p for p in self._parameters[key] if id(p) in self._flags.frozen and not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad = True
            with torch.set_grad_enabled(is_audit and not frozen and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
        finally:
            for p in frozen:
                p.requires_grad = False

    def _flags_of(self, key: int) -> list[bool]:
        """Return the flags by which `_run` would run a module now."""
        return [p.requires_grad or id(p) in self._flags.frozen for p in self._parameters[key]]

    def _audited(self, key: int, recorded: RecordedCall, forward: Callable[..., Any]) -> Any:
        """Compute once more, on the recorded inputs: equal ones in another memory layout may differ in the last bit."""
        self._audits = True
        args, kwargs = recorded.arguments
        output = editable(self._run(key, forward, args, kwargs, is_audit=True))
        if not recorded.gave(output):
            self.disable("A frozen module gave another output for the same input")
            return output
        return recorded.output

    def _name(self, key: int) -> str:
        return next(name for name, module in self._model.named_modules() if id(module) == key)


def _pays(module: nn.Module, moving: set[int]) -> bool:
    """Return True for a frozen module with a matrix. A norm alone takes no longer than to hold and compare it does."""
    parameters = parameters_of(module.modules())
    return any(p.dim() > 1 for p in parameters) and not any(id(p) in moving for p in parameters)


def _is_of_torch(module: nn.Module) -> bool:
    """Return True for a layer of torch's own, without a function of the user's: it gives an output alone."""
    if not type(module).__module__.startswith("torch.nn.modules."):
        return False
    called = [x for x in module.__dict__.values() if callable(x)]
    return all(type(x) is StandIn or isinstance(x, BuiltinFunctionType) for x in called)
