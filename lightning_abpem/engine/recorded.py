"""One recorded call of a frozen module: what it got and gave, held by value, and the state that it ran with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_abpem.engine.outputs import find_odd
from lightning_abpem.modules.tensors import copy_as_it_lies, reading_waits, same_bits

__all__ = ["LEAF", "RecordedCall", "flat", "in_transform", "is_constant"]

LEAF = tree_flatten(0)[1]
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, slice)


class RecordedCall:
    """A call of a frozen module, from before it runs.

    Nobody but this class has its tensors, so that no edit of any kind reaches them, and nothing that is set on an
    output of one pass is on that of another. On other devices than the CPU the inputs are held by reference and
    version instead, for a comparison of values would wait for the device.

    Args:
        inputs: the leaves of its arguments, all constants.
        spec: their structure.
        modules: the module and all inside it.
        flags: `requires_grad` of its parameters.
    """

    def __init__(self, inputs: Sequence[Any], spec: TreeSpec, modules: Sequence[nn.Module], flags: list[bool]) -> None:
        self._inputs, self._input_spec = [_held(x) for x in inputs], spec
        self._versions = _versions(self._inputs)
        self._modules, self.flags = modules, flags
        self._state = _state_of(modules)
        self._outputs: list[Any] = []
        self._output_spec, self._precision = LEAF, _precision(inputs)

    def keep(self, output: Any, inputs: Sequence[Any]) -> bool:
        """Hold the output too; return False if another pass cannot be given a copy of it.

        That is so if the call edited its inputs, or if an output shares its memory with another or with an input: an
        edit of one would be an edit of both.
        """
        outputs, spec = _leaves(output)
        if not all(map(_is_copied, outputs)) or not _has_own_memory(outputs, inputs):
            return False
        if self._versions != _versions(self._inputs) or not all(map(_identical, inputs, self._inputs)):
            return False
        self._outputs, self._output_spec = [_copied(x) for x in outputs], spec
        self._precision = _precision(outputs)
        return True

    def matches(self, inputs: Sequence[Any], spec: TreeSpec) -> bool:
        """Return True if a call is this one, in the same precision, with its modules as they were.

        That their parameters are the same ones is seen before. On a GPU a comparison of values waits for the device.
        """
        if spec != self._input_spec or _precision(self._outputs) != self._precision:
            return False
        if not all(map(is_constant, inputs)) or not _is_same_state(_state_of(self._modules), self._state):
            return False
        if _versions(self._inputs) != self._versions:
            return False  # one that is held by reference was edited
        return all(_identical(x, y) for x, y in zip(inputs, self._inputs, strict=True))

    @property
    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The arguments and keyword arguments, as they were."""
        if self._input_spec == LEAF:
            return self._inputs, {}
        args, kwargs = tree_unflatten(self._inputs, self._input_spec)
        return args, kwargs

    @property
    def output(self) -> Any:
        """The output as it was: new tensors every time."""
        if self._output_spec == LEAF:
            return _copied(self._outputs[0])
        return tree_unflatten([_copied(x) for x in self._outputs], self._output_spec)

    def gave(self, output: Any) -> bool:
        """Return True if this is the output, to the last bit."""
        outputs, spec = _leaves(output)
        return spec == self._output_spec and all(map(_identical, outputs, self._outputs))


def flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Return the leaves and the structure of a call's arguments; that of a single tensor, the usual case, is known.

    Arguments whose containers say more than their leaves are one leaf, which is no constant.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return list(args), LEAF
    if find_odd((args, kwargs)) is not None:
        return [(args, kwargs)], LEAF
    return tree_flatten((args, kwargs))


def is_constant(x: Any) -> bool:
    """Return True if an argument says all by its values: no history, no attributes of somebody's own."""
    if isinstance(x, Tensor):
        return not (x.requires_grad or x.__dict__ or torch._C._functorch.is_functorch_wrapped_tensor(x))
    return isinstance(x, _PLAIN)


def in_transform() -> bool:
    """Return True in a trace, a transform of torch.func or forward-mode AD: tensors carry more than values there."""
    is_transform = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return is_transform or torch.jit.is_tracing()


def _leaves(output: Any) -> tuple[list[Any], TreeSpec]:
    return ([output], LEAF) if isinstance(output, Tensor) else tree_flatten(output)


def _held(x: Any) -> Any:
    return copy_as_it_lies(x) if _is_strided(x) and not reading_waits(x) else x


def _copied(x: Any) -> Any:
    return copy_as_it_lies(x) if isinstance(x, Tensor) else x


def _is_copied(x: Any) -> bool:
    """Return True if a copy of an output is as good as it."""
    return is_constant(x) and (_is_strided(x) or not isinstance(x, Tensor))


def _is_strided(x: Any) -> bool:
    is_plain = type(x) is Tensor and x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta)
    return is_plain and not (x.is_conj() or x.is_neg())


def _has_own_memory(outputs: Sequence[Any], inputs: Sequence[Any]) -> bool:
    """Return True if each output lies in a memory of its own."""
    places = [x.untyped_storage().data_ptr() for x in outputs if isinstance(x, Tensor)]
    others = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor) and x.layout == torch.strided}
    return len(set(places) - others) == len(places)


def _state_of(modules: Sequence[nn.Module]) -> tuple[list[Any], list[int | None]]:
    """Return attributes, submodules and buffers, and how often each buffer was edited in place."""
    tables = [module.__dict__ for module in modules]  # scripted modules have fewer in it
    inner, buffers = _items(tables, "_modules"), _items(tables, "_buffers")
    return [*chain.from_iterable(map(dict.values, tables)), *inner, *buffers], _versions(buffers)


def _items(tables: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [x for own in tables if (table := own.get(name)) for x in table.values()]


def _is_same_state(now: tuple[list[Any], list[int | None]], before: tuple[list[Any], list[int | None]]) -> bool:
    return len(now[0]) == len(before[0]) and now[1] == before[1] and not any(map(is_not, now[0], before[0]))


def _versions(leaves: Sequence[Any]) -> list[int | None]:
    """Return how often each tensor was edited in place; None for one that does not count, and for other leaves."""
    return [x._version if isinstance(x, Tensor) and not x.is_inference() else None for x in leaves]


def _precision(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return in which precision torch computes now, on the device of the first tensor."""
    device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return autocast, torch.get_default_dtype()


def _identical(x: Any, y: Any) -> bool:
    """Return True if two leaves are known to be the same."""
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
    return x.layout == torch.strided and same_bits(x, y)


def _is_same_view(x: Tensor, y: Tensor) -> bool:
    """Return True if two views show the same part of one tensor, so that they cannot differ."""
    return x._base is not None and x._base is y._base and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()
