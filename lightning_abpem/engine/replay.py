"""Running the frozen part of a model once per batch.

The adapting pass and the prediction get the same arguments, and everything ahead of the fusion is frozen, so its
outputs are the same: they are recorded in the first pass and returned in the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_abpem.engine.late import LateBools, answers_late
from lightning_abpem.modules.compiled import compiled_entry, inside_compiled
from lightning_abpem.modules.footprints import call_hooks, kept_by, precision, versions
from lightning_abpem.modules.patches import Uncopied, substituted

__all__ = ["FrozenReplay"]

_LEAF = tree_flatten(0)[1]
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, slice)


@dataclass
class _Recorded:
    """One call of a frozen module: what went in and what came out."""

    inputs: list[Any]
    input_versions: list[int | None]
    input_spec: TreeSpec
    outputs: list[Any]
    output_versions: list[int | None]
    output_spec: TreeSpec
    precision: tuple[Any, ...]


class FrozenReplay(Uncopied):
    """Runs the frozen modules of a model once per batch, however many passes there are.

    Every outermost call of a module without adapted parameters, on inputs that carry no gradient, is recorded in the
    first pass. A later pass gets the recorded output if the same call comes with the same arguments (the same
    unchanged tensors, or equal ones); in any doubt the module simply runs. The first batches are audited: what would
    have been replayed is computed again and compared bit by bit, and a model that fails, because it draws random
    numbers in eval mode for instance, is not replayed any more, with a warning. So is the first replay of a call that
    comes later. After the audit the modules that ran in it and whose outputs no later pass could use are let alone:
    nothing is recorded of them.

    What leaves more behind than its output runs in every pass, and what it calls is replayed in its place: a module
    with hooks on others inside it, one that edits the containers that it gets, and one that was seen in the audit to
    change tensors, buffers or containers that it or a module inside it keeps.

    Args:
        model: the module whose submodules are replayed, itself excepted.
        adapted: the parameters that change between the passes.
        watched: modules whose hooks may change how torch computes them, or need other processes; what holds one runs
            in every pass.
        varying: modules that get other inputs in every pass; they and what is in them run in every pass.
        audited_batches: number of batches in which what is replayed is audited; 0 for no audit at all.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Collection[nn.Parameter],
        watched: Collection[nn.Module] = (),
        varying: Collection[nn.Module] = (),
        audited_batches: int = 2,
    ) -> None:
        moving = {id(p) for p in adapted}
        self.enabled = True
        hidden = {model} | inside_compiled(model)
        hidden |= {m for m in model.modules() if not set(watched).isdisjoint(m.modules())}
        hidden |= {inner for m in varying for inner in m.modules()}
        self._modules = [m for m in model.modules() if m not in hidden and _is_frozen(m, moving)]
        self._inner = {id(m): list(m.modules()) for m in self._modules}
        self._hooks = {
            id(m): [hooks for x in m.modules() if x is not m for hooks in call_hooks(x)] for m in self._modules
        }
        self._audited_batches = self._unaudited = audited_batches
        self._lasting: set[int] = set()  # modules that leave more behind than their output
        self._mode: str | None = None
        self._inside = False
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._doubts: list[Tensor] = []
        self._late: LateBools | None = None
        self._turn: dict[int, int] = {}
        self._recorders: dict[int, ExitStack] = {}
        self._called: set[int] = set()
        self._replayed: set[tuple[int, int]] = set()
        self._audits = False  # whether anything of this batch was audited

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the recorder in front of every frozen module's forward while the block lasts."""
        with ExitStack() as stack:
            stack.callback(self.end_batch)
            for module in self._modules:
                entry = compiled_entry(module) or "forward"
                recorder = partial(self._call, id(module), getattr(module, entry))
                own = self._recorders[id(module)] = stack.enter_context(ExitStack())
                own.enter_context(substituted(module, entry, recorder))
            yield

    def start_pass(self) -> None:
        """A pass over the batch begins: the first one records, those after it replay."""
        if self.enabled:
            self._mode = "record" if self._mode is None else "replay"
            self._turn.clear()

    def start_batch(self) -> None:
        """A batch begins; what was in doubt about the last one is known by now."""
        self.end_batch()
        late, self._late = self._late, None
        if late is not None and not all(late.read()):
            self._distrust(
                "A frozen module got other inputs in the last batch's prediction than in the pass before it, which it "
                "had not in earlier batches: that batch's logits may be wrong. From now on"
            )

    def end_batch(self) -> None:
        """Forget the batch."""
        if self._audits:
            self._unaudited -= 1
            if self._unaudited == 0:
                self._let_alone(self._called - {module for module, _ in self._replayed})
        if not self.enabled:
            self._let_alone(self._called)
        if self._doubts:
            self._late = LateBools(*self._doubts)
        self._mode, self._audits = None, False
        self._recorded.clear()
        self._doubts.clear()

    def _let_alone(self, modules: Collection[int]) -> None:
        for module in modules:
            self._recorders[module].close()

    def _call(self, module: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._mode is None:
            return forward(*args, **kwargs)
        self._called.add(module)
        if self._inside or module in self._lasting or any(self._hooks[module]):
            return forward(*args, **kwargs)
        turn = (module, self._turn.get(module, 0))
        self._turn[module] = turn[1] + 1
        self._inside = True
        try:
            if self._mode == "record":
                return self._record(turn, forward, args, kwargs)
            recorded = self._recorded.get(turn)
            is_known = turn in self._replayed
            if recorded is None or not self._matches(recorded, *_flat(args, kwargs), is_known):
                return forward(*args, **kwargs)
            self._replayed.add(turn)
            if self._unaudited > 0 or (self._audited_batches and not is_known):
                self._audit(recorded, forward)
            alone = recorded.output_spec == _LEAF
            return recorded.outputs[0] if alone else tree_unflatten(recorded.outputs, recorded.output_spec)
        finally:
            self._inside = False

    def _record(self, turn: tuple[int, int], forward: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(x, Tensor) and x.requires_grad for x in args):  # most modules after the fusion
            return forward(*args, **kwargs)
        inputs, spec = _flat(args, kwargs)
        replayable = all(isinstance(x, _PLAIN) or _is_constant(x) for x in inputs)
        before_call = versions(inputs)
        # In the first batch modules may make what they keep from then on.
        is_watched = 0 < self._unaudited < self._audited_batches
        before = kept_by(self._inner[turn[0]]) if is_watched else {}
        output = forward(*args, **kwargs)
        has_edited = spec != _LEAF and not _is_same_tree(inputs, spec, *_flat(args, kwargs))
        if has_edited or (is_watched and before != kept_by(self._inner[turn[0]])):
            self._lasting.add(turn[0])
            if self._unaudited > 0:  # what it calls is audited from the next batch on
                self._unaudited = self._audited_batches + 1
            return output
        outputs, output_spec = ([output], _LEAF) if isinstance(output, Tensor) else tree_flatten(output)
        # An output with a gradient depends on more than the arguments: on state that the fusion left in the module.
        replayable = replayable and all(isinstance(x, _PLAIN) or _is_constant(x) for x in outputs)
        if replayable and before_call == versions(inputs):
            self._recorded[turn] = _Recorded(
                inputs, before_call, spec, outputs, versions(outputs), output_spec, precision(outputs)
            )
        return output

    def _audit(self, recorded: _Recorded, forward: Callable[..., Any]) -> None:
        """Compute once more, on the recorded inputs: equal ones in another memory layout may differ in the last bit."""
        self._audits = True
        spec = recorded.input_spec
        args, kwargs = (recorded.inputs, {}) if spec == _LEAF else tree_unflatten(recorded.inputs, spec)
        outputs, spec = tree_flatten(forward(*args, **kwargs))
        if spec != recorded.output_spec or not all(map(_identical, outputs, recorded.outputs)):
            recorded.outputs, recorded.output_spec = outputs, spec
            self._distrust(
                "A frozen module gave another output for the same input (does the model draw random numbers in eval "
                "mode?):"
            )

    def _distrust(self, why: str) -> None:
        self.enabled, self._mode = False, None
        warnings.warn(f"{why} its outputs are not replayed, each prediction runs the whole model again.", stacklevel=2)

    def _matches(self, recorded: _Recorded, inputs: list[Any], spec: TreeSpec, is_known: bool) -> bool:
        if spec != recorded.input_spec or precision(recorded.outputs) != recorded.precision:
            return False
        before = recorded.input_versions, recorded.output_versions
        if (versions(recorded.inputs), versions(recorded.outputs)) != before:
            return False  # something edited them in place
        is_probable = is_known and self._unaudited <= 0
        return all(self._is_same(x, y, is_probable) for x, y in zip(inputs, recorded.inputs, strict=True))

    def _is_same(self, x: Any, y: Any, is_probable: bool) -> bool:
        """Whether an input is that of the recorded pass; on a device whose answer takes time, if it is probable.

        That is if the same call was replayed before, after the audit; `start_batch` gets the answer.
        """
        if x is y or not is_probable or not isinstance(x, Tensor) or not answers_late(x):
            return x is y or _identical(x, y)
        if not _alike(x, y):
            return False
        self._doubts.append(((x == y) | (x.isnan() & y.isnan())).all())
        return True


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """The leaves and the structure of a call's arguments; that of a single tensor, the usual case, is known."""
    return (
        (list(args), _LEAF)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        else tree_flatten((args, kwargs))
    )


def _is_same_tree(leaves: list[Any], spec: TreeSpec, others: list[Any], other_spec: TreeSpec) -> bool:
    return spec == other_spec and all(x is y for x, y in zip(leaves, others, strict=True))


def _is_frozen(module: nn.Module, moving: set[int]) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(id(p) in moving for p in parameters)


def _is_constant(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.requires_grad


def _identical(x: Any, y: Any) -> bool:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return type(x) is type(y) and bool(x == y)
    return _alike(x, y) and (torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))


def _alike(x: Any, y: Any) -> bool:
    """Whether two tensors may be equal, as far as can be told without their values."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.is_nested or y.is_nested or x.requires_grad:
        return False
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
