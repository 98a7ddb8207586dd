"""What the frozen part of a model computed once per batch: replayed to the prediction, remembered for later batches.

The adapting pass and the prediction get the same arguments, and everything ahead of the fusion is frozen, so its
outputs are the same: `FrozenReplay` records them in the first pass and returns them in the others. `TokenMemory` keeps
the tokens that entered the fusion block in the last batches and puts them in front of the current ones.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["FrozenReplay", "TokenMemory"]

_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, slice)
_MEMORY_ADVICE = "Name the fusion block with `memory_at`, or set memory_batches=1."


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
        audited_batches: number of batches that are audited.
    """

    def __init__(self, model: nn.Module, adapted: Collection[nn.Parameter], audited_batches: int = 2) -> None:
        moving = {id(p) for p in adapted}
        self.enabled = True
        self._modules = [m for m in model.modules() if m is not model and _is_frozen(m, moving)]
        self._unaudited = audited_batches
        self._mode: str | None = None
        self._inside = False
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._turn: dict[int, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the recorder in front of every frozen module's forward while the block lasts."""
        originals = [(m, m.__dict__.get("forward")) for m in self._modules]
        try:
            for module, _ in originals:
                module.__dict__["forward"] = partial(self._call, id(module), module.forward)
            yield
        finally:
            for module, own in originals:
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = own
            self.end_batch()

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
                self._audit(recorded, forward, args, kwargs)
            return tree_unflatten(recorded.outputs, recorded.output_spec)
        finally:
            self._inside = False

    def _record(
        self, turn: tuple[int, int], forward: Any, args: Any, kwargs: Any, inputs: list[Any], spec: TreeSpec
    ) -> Any:
        replayable = all(isinstance(x, _PLAIN) or (isinstance(x, Tensor) and not x.requires_grad) for x in inputs)
        versions = _versions(inputs)
        output = forward(*args, **kwargs)
        outputs, output_spec = tree_flatten(output)
        replayable = replayable and all(isinstance(x, (Tensor, *_PLAIN)) for x in outputs)
        if replayable and versions == _versions(inputs):
            self._recorded[turn] = _Recorded(
                inputs, versions, spec, outputs, _versions(outputs), output_spec, _precision(outputs)
            )
        return output

    def _audit(self, recorded: _Recorded, forward: Any, args: Any, kwargs: Any) -> None:
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
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device or x.requires_grad:
        return False
    return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


class TokenMemory:
    """First in, first out store of the tokens that entered the fusion block, the current batch included.

    Args:
        block: the fusion block. Everything after it must depend on the batch through its input alone.
        name: its name, for messages.
        batches: batches held, the current one included; at least 2.
    """

    def __init__(self, block: nn.Module, name: str, batches: int) -> None:
        self.block, self.name = block, name
        self._stored: deque[list[Tensor]] = deque(maxlen=batches - 1)
        self._current: list[Tensor] | None = None
        self._predicted: Tensor | None = None
        self._awaits_prediction = self._verified = False

    @contextmanager
    def extend(self) -> Iterator[None]:
        """While the block lasts, the fusion block gets the stored tokens, oldest first, and the current ones after them."""
        self._current = None
        handle = self.block.register_forward_pre_hook(self._extend_input, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def push(self) -> None:
        """Store the current batch's tokens; the oldest batch goes if the memory is full."""
        if self._current is not None:
            self._stored.append(self._current)
            self._predicted, self._awaits_prediction = None, not self._verified

    def clear(self) -> None:
        """Forget all tokens."""
        self._stored.clear()
        self._current = self._predicted = None
        self._awaits_prediction = False

    def expect(self, prediction: Tensor) -> None:
        """The logits that the model gave for the newest stored batch, to be found again by `verify`."""
        if self._awaits_prediction:
            self._predicted, self._awaits_prediction = prediction.detach(), False

    def verify(self, logits: Tensor) -> int:
        """Hold the logits of memory and batch against the sizes and, once, against `expect`; the samples stored.

        Raises:
            ValueError: if what enters the block does not determine the logits, or the block was not called.
        """
        if self._current is None:
            raise ValueError(f"Expected `memory_at` to name a module that the target calls, but got '{self.name}'.")
        counts = [batch[0].shape[0] for batch in self._stored]
        stored, size = sum(counts), self._current[0].shape[0]
        if logits.shape[0] != stored + size:
            raise ValueError(
                f"Expected {stored} stored and {size} current samples to give as many logits, but got "
                f"{logits.shape[0]}: '{self.name}' is not where the joint tokens enter batch-first. {_MEMORY_ADVICE}"
            )
        if self._predicted is not None:
            again = logits[stored - counts[-1] : stored].detach()
            bound = (5e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3) * self._predicted.abs().max()
            if not bool(torch.allclose(again, self._predicted.to(again), rtol=0, atol=bound.item(), equal_nan=True)):
                raise ValueError(
                    f"Expected the tokens that entered '{self.name}' to give the same logits again, but they differ: "
                    f"something bypasses it. {_MEMORY_ADVICE}"
                )
            self._predicted, self._verified = None, True
        return stored

    def _extend_input(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, spec = tree_flatten((args, kwargs))
        size = next(x.shape[0] for x in leaves if isinstance(x, Tensor))
        batched = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and x.shape[0] == size]
        self._current = [leaves[i].detach().clone() for i in batched]  # a block may edit its input in place
        for position, i in enumerate(batched):
            past = [batch[position] for batch in self._stored]
            if any(p.shape[1:] != leaves[i].shape[1:] for p in past):
                raise ValueError(
                    f"Expected every batch to enter '{self.name}' with the same number of tokens, but the memory holds "
                    f"{[tuple(p.shape[1:]) for p in past]} and the batch has {tuple(leaves[i].shape[1:])}. Pad the "
                    "batches alike, or set memory_batches=1."
                )
            leaves[i] = torch.cat([*past, leaves[i]])
        new_args, new_kwargs = tree_unflatten(leaves, spec)
        return new_args, new_kwargs
