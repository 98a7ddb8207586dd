"""Copies that stand in for tensors which an earlier run in inference mode left in a model: autograd refuses those."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.refusals import add_note
from lightning_abpem.modules.tensors import normal_tensor, same_bits

__all__ = ["explain_gradients", "without_inference_tensors"]


_WITHOUT_GRADIENTS = (
    "on Tensor that requires grad",  # .numpy()
    "support the deepcopy protocol",
    "out=... arguments don't support automatic differentiation",
)


class _Place(NamedTuple):
    """A tensor of inference mode, where it stands, and what stands in for it.

    Args:
        owner: the dict or list.
        key: the key or index there.
        tensor: the tensor.
        stand_in: its copy.
        version: the copy's, as it was made.
    """

    owner: dict[Any, Any] | list[Any]
    key: Any
    tensor: Tensor
    stand_in: Tensor
    version: int

    @property
    def is_there(self) -> bool:
        return dict(_entries(self.owner)).get(self.key) is self.stand_in

    @property
    def is_written(self) -> bool:
        """True if the run wrote something newer into the copy; not every edit counts the version up."""
        own, before = self.stand_in, self.tensor
        if own._version != self.version or own.shape != before.shape or own.stride() != before.stride():
            return True
        return own.layout == torch.strided and not own.is_nested and not same_bits(own.detach(), before)


def without_inference_tensors(changes: Changes, model: nn.Module) -> None:
    """Stand in normal copies for parameters, buffers, and tensors cached in modules, or in lists and dicts there.

    Tensors that share memory have copies that share theirs. They come back together, unless the run wrote into one.
    """
    owners: list[Any] = [module.__dict__ for module in model.modules()]
    owners += [value for owner in list(owners) for value in owner.values() if isinstance(value, dict | list)]
    copies: dict[int, Tensor] = {}  # by the id of the tensor
    memories: dict[int, Any] = {}  # copies by the address of the memory
    groups: dict[int, list[_Place]] = {}
    for owner in owners:
        for key, value in _entries(owner):
            if isinstance(value, Tensor) and value.is_inference():
                if id(value) not in copies:
                    copies[id(value)] = _copy(value, memories)
                own = copies[id(value)]
                groups.setdefault(_memory(value), []).append(_Place(owner, key, value, own, own._version))
    for group in groups.values():
        changes.note(partial(_put_back, group))
        for place in group:
            place.owner[place.key] = place.stand_in


def _copy(x: Tensor, memories: dict[int, Any]) -> Tensor:
    """Return a copy of a tensor of inference mode, in a copy of its memory that others share."""
    is_plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    if is_plain and not (x.is_quantized or x.is_nested or x.is_meta or x.is_conj() or x.is_neg()):
        if _memory(x) not in memories:
            memories[_memory(x)] = x.untyped_storage().clone()
        own = torch.empty(0, dtype=x.dtype, device=x.device)
        own.set_(memories[_memory(x)], x.storage_offset(), x.shape, x.stride())
    else:
        own = normal_tensor(x)
    return nn.Parameter(own, x.requires_grad) if isinstance(x, nn.Parameter) else own


def _memory(x: Tensor) -> int:
    """Return the address of a tensor's memory; its id if it has none of one piece."""
    return (x.untyped_storage().data_ptr() or id(x)) if x.layout == torch.strided and not x.is_nested else id(x)


def _put_back(group: list[_Place]) -> None:
    there = [place for place in group if place.is_there]
    if not any(place.is_written for place in there):
        for place in there:
            place.owner[place.key] = place.tensor


def _entries(owner: dict[Any, Any] | list[Any]) -> list[tuple[Any, Any]]:
    return list(owner.items() if isinstance(owner, dict) else enumerate(owner))


def explain_gradients(error: Exception) -> None:
    """Add a note to torch's error about what a forward cannot do where gradients are on, as in a pass."""
    words = str(error)
    if "Inference tensors cannot be saved for backward" in words:
        add_note(
            error,
            "An earlier run under torch.inference_mode(), such as a Trainer's, has left a tensor where ABPEM cannot "
            "reach it: in a functools.lru_cache with a maxsize, a variable of a Python module, or an object in C. "
            "Empty it before you adapt (cache_clear()), or make that run with Trainer(inference_mode=False).",
        )
    elif any(known in words for known in _WITHOUT_GRADIENTS):
        add_note(
            error,
            "ABPEM's pass over a batch has gradients on, where a prediction may have none. Detach the tensor first "
            "(x.detach().cpu().numpy()), or leave this out while torch.is_grad_enabled().",
        )
