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

from lightning_abpem.compiled import compiled_entry, inside_compiled, substituted

__all__ = ["FrozenReplay"]

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


class FrozenReplay:
    """Runs the frozen modules of a model once per batch, however many passes there are.

    Every outermost call of a module without adapted parameters, on inputs that carry no gradient, is recorded in the
    first pass. A later pass gets the recorded output if the same call comes with the same arguments (the same
    unchanged tensors, or equal ones); in any doubt the module simply runs. The first batches are audited: what would
    have been replayed is computed again and compared bit by bit, and a model that fails, because it draws random
    numbers in eval mode for instance, is not replayed any more, with a warning.

    Args:
        model: the module whose submodules are replayed, itself excepted.
        adapted: the parameters that change between the passes.
        watched: modules whose hooks may change how torch computes them; what holds one runs in every pass.
        audited_batches: number of batches that are audited.
    """

    def __init__(
        self,
        model: nn.Module,
        adapted: Collection[nn.Parameter],
        watched: Collection[nn.Module] = (),
        audited_batches: int = 2,
    ) -> None:
        moving = {id(p) for p in adapted}
        self.enabled = True
        hidden = {model} | inside_compiled(model)
        hidden |= {m for m in model.modules() if not set(watched).isdisjoint(m.modules())}
        self._modules = [m for m in model.modules() if m not in hidden and _is_frozen(m, moving)]
        self._unaudited = audited_batches
        self._mode: str | None = None
        self._inside = False
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._turn: dict[int, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the recorder in front of every frozen module's forward while the block lasts."""
        with ExitStack() as stack:
            stack.callback(self.end_batch)
            for module in self._modules:
                entry = compiled_entry(module) or "forward"
                recorder = partial(self._call, id(module), getattr(module, entry))
                stack.enter_context(substituted(module, entry, recorder))
            yield

    def start_pass(self) -> None:
        """A pass over the batch begins: the first one records, those after it replay."""
        if self.enabled:
            self._mode = "record" if self._mode is None else "replay"
            self._turn.clear()

    def end_batch(self) -> None:
        """Forget the batch."""
        if self._recorded:
            self._unaudited -= 1
        self._mode = None
        self._recorded.clear()

    def _call(self, module: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._mode is None or self._inside:
            return forward(*args, **kwargs)
        inputs, spec = tree_flatten((args, kwargs))
        turn = (module, self._turn.get(module, 0))
        self._turn[module] = turn[1] + 1
        self._inside = True
        try:
            if self._mode == "record":
                return self._record(turn, forward, args, kwargs, inputs, spec)
            recorded = self._recorded.get(turn)
            if recorded is None or not _matches(recorded, inputs, spec):
                return forward(*args, **kwargs)
            if self._unaudited > 0:
                self._audit(recorded, forward)
            return tree_unflatten(recorded.outputs, recorded.output_spec)
        finally:
            self._inside = False

    def _record(
        self, turn: tuple[int, int], forward: Any, args: Any, kwargs: Any, inputs: list[Any], spec: TreeSpec
    ) -> Any:
        replayable = all(isinstance(x, _PLAIN) or _is_constant(x) for x in inputs)
        versions = _versions(inputs)
        output = forward(*args, **kwargs)
        outputs, output_spec = tree_flatten(output)
        # An output with a gradient depends on more than the arguments: on state that the fusion left in the module.
        replayable = replayable and all(isinstance(x, _PLAIN) or _is_constant(x) for x in outputs)
        if replayable and versions == _versions(inputs):
            self._recorded[turn] = _Recorded(
                inputs, versions, spec, outputs, _versions(outputs), output_spec, _precision(outputs)
            )
        return output

    def _audit(self, recorded: _Recorded, forward: Callable[..., Any]) -> None:
        """Compute once more, on the recorded inputs: equal ones in another memory layout may differ in the last bit."""
        args, kwargs = tree_unflatten(recorded.inputs, recorded.input_spec)
        outputs, spec = tree_flatten(forward(*args, **kwargs))
        if spec != recorded.output_spec or not all(map(_identical, outputs, recorded.outputs)):
            self.enabled, self._mode = False, None
            recorded.outputs, recorded.output_spec = outputs, spec
            warnings.warn(
                "A frozen module gave another output for the same input (does the model draw random numbers in eval "
                "mode?): its outputs are not replayed, each prediction runs the whole model again.",
                stacklevel=2,
            )


def _is_frozen(module: nn.Module, moving: set[int]) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(id(p) in moving for p in parameters)


def _is_constant(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.requires_grad


def _versions(leaves: list[Any]) -> list[int | None]:
    return [x._version if isinstance(x, Tensor) and not x.is_inference() else None for x in leaves]


def _precision(leaves: list[Any]) -> tuple[Any, ...]:
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return (autocast, torch.get_default_dtype())


def _matches(recorded: _Recorded, inputs: list[Any], spec: TreeSpec) -> bool:
    if spec != recorded.input_spec or _precision(recorded.outputs) != recorded.precision:
        return False
    if _versions(recorded.inputs) != recorded.input_versions or _versions(recorded.outputs) != recorded.output_versions:
        return False  # something edited them in place
    return all(x is y or _identical(x, y) for x, y in zip(inputs, recorded.inputs, strict=True))


def _identical(x: Any, y: Any) -> bool:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return type(x) is type(y) and bool(x == y)
    if x.is_nested or y.is_nested or x.requires_grad:
        return False
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
