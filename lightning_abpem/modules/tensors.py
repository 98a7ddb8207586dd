"""Tensors as a pass of the engine needs them, and as they were before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_abpem.modules.refusals import ModelError

__all__ = ["SavedTensor", "bit_sum", "copy_as_it_lies", "normal_tensor", "reading_waits", "same_bits"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 15  # integers that are weighed at once, so that no copy of a large tensor is made
_LARGER = 4  # times as large as a tensor is its storage at most, to be saved with it
_LINE = 64  # bytes


def normal_tensor(x: Any) -> Any:
    """Return `x` as a constant that autograd accepts: out of inference mode, without history. Others as they are."""
    if not isinstance(x, Tensor):
        return x
    return copy_as_it_lies(x) if x.is_inference() else x.detach() if x.requires_grad else x


def reading_waits(x: Tensor) -> bool:
    """Return True if reading `x` on the host synchronises with its device."""
    return not x.is_cpu


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return True if two tensors of one shape, dtype and device hold the same bits; NaN equals itself."""
    if x.dtype == torch.int64:
        return torch.equal(x, y)
    if x.dtype.is_complex:  # whose bits of conjugation turn a sign over, and lose none
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    x, y = x.resolve_neg(), y.resolve_neg()
    if _is_wide(x) and _is_wide(y):
        return torch.equal(_words(x), _words(y))
    return torch.equal(_bits(x), _bits(y))


def _bits(x: Tensor) -> Tensor:
    """Return the memory of a real tensor as integers, so that NaN equals itself; others as they are."""
    return x.view(_BITS[x.element_size()]) if x.dtype.is_floating_point and not x.is_neg() else x


def _is_wide(x: Tensor) -> bool:
    """Return True if the memory of a tensor can be seen as integers of 8 bytes, which are compared fastest."""
    size = x.element_size()
    is_plain = x.is_contiguous() and not (x.is_neg() or x.is_conj())
    return is_plain and x.numel() * size % 8 == 0 and x.storage_offset() * size % 8 == 0


def _words(x: Tensor) -> Tensor:
    return x.flatten().view(torch.int64)


@torch.no_grad()
def bit_sum(x: Tensor) -> Tensor:
    """Return a number that changes if a bit of `x` does, or if values change places; 0 for what is not strided.

    It is the sum of the bits as integers, each times an odd number of its place. It lies on the device of `x`.
    """
    if x.layout != torch.strided or x.is_meta or x.is_quantized or hasattr(x, "full_tensor"):
        return torch.zeros(())
    x, size = x.detach(), x.element_size()
    if _is_wide(x):
        bits = _words(x)  # narrower integers would be copied into those
    else:
        bits = (torch.view_as_real(x) if x.is_complex() else x).view(_BITS[min(size, 8)]).flatten()
    odd = torch.arange(1, 2 * min(len(bits), _CHUNK), 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in bits.split(_CHUNK):
        total = 31 * total + (chunk * odd[: len(chunk)]).sum()
    return total


def copy_as_it_lies(x: Tensor) -> Tensor:
    """Return a copy without history that lies in memory as `x` does, so that kernels round alike.

    Gaps, repeats and the place within a cache line are the same.
    """
    x = x.detach()
    if type(x) is not Tensor or x.layout != torch.strided or x.is_nested or x.is_quantized:
        return x.clone()
    offset = x.data_ptr() % _LINE // x.element_size()
    if not offset and x.is_contiguous():
        return x.clone()
    if not offset:
        own = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    else:
        extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        whole = torch.empty(offset + extent, dtype=x.dtype, device=x.device)
        own = whole.as_strided(x.shape, x.stride(), offset).data  # no view: autograd refuses edits of one made here
    _without_repeats(own).copy_(_without_repeats(x))
    return own


class SavedTensor:
    """A tensor's values, shape and flags before a pass.

    The values of a part of a larger storage are those of all of it, if that is at most four times as large.

    On a CPU `restore` compares values, because not every edit counts a tensor's version up: those of batch
    normalisation and through `.data` do not. On other devices a comparison would wait for the device; there the values
    are always written back. Neither way counts the version up by itself.

    Args:
        tensor: what the pass works on.
        key: the id of the tensor that it stands for.
    """

    __slots__ = ("_alias", "_before", "_flags", "_is_told", "_layout", "_part", "_size", "_tensor", "_version", "key")

    def __init__(self, tensor: Tensor, key: int) -> None:
        self._tensor, self.key, self._version = tensor, key, tensor._version
        self._alias: Tensor | None = None
        self._is_told = False
        self._flags = (tensor.requires_grad, tensor.grad if tensor.is_leaf else None)
        if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
            with torch._C.DisableTorchFunctionSubclass():
                plain = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
                if plain.layout == torch.strided and not (plain.is_meta or plain.is_quantized or plain.is_nested):
                    self._alias = plain.data  # the same memory; the shape, the version and the history are its own
                    self._layout = _layout(tensor)
                    self._size = self._alias.untyped_storage().nbytes()
                    part = _memory(self._alias, self._size)
                    self._part = _words(part) if _is_wide(part) else _bits(part)
                    self._before = self._part.clone()

    def restore(self, name: Callable[[int], str], counts: bool = False) -> bool:
        """Put the values back, without gradients and functions of subclasses; return True if the pass had changed them.

        Args:
            name: from `key` to the tensor's name, for an error.
            counts: count that as an edit.

        Raises:
            ValueError: if another kind of tensor was edited in place: its values were not saved. If a view has a
                history now, which stays. Both are said once.
        """
        changed = self._restore(name)
        if changed and counts:
            torch.autograd.graph.increment_version(self._tensor)
        return changed

    def _restore(self, name: Callable[[int], str]) -> bool:
        x, alias = self._tensor, self._alias
        version, self._version = self._version, x._version
        if alias is None:
            if x._version != version:
                raise ModelError(
                    f"Expected a forward that leaves {name(self.key)} alone, but it edits it in place. It is a "
                    f"{'nested ' * x.is_nested}{type(x).__name__} with layout {x.layout}, which cannot be put back. "
                    "Edit a clone of it."
                )
            return False
        has_history = x.grad_fn is not None and x._is_view()
        if not has_history:
            self._restore_flags(x)
        moved = _layout(x) != self._layout
        if moved:
            _resize(alias, self._size)
            x.data = alias
            self._layout = _layout(x)  # memory that was freed comes back at another place
        part = self._part
        waits = reading_waits(alias)
        changed = x._version != version if waits else not same_bits(part, self._before)
        if waits or changed:
            part.copy_(self._before)
        if has_history:
            self._refuse_history(name)
        return moved or changed

    def _restore_flags(self, x: Tensor) -> None:
        requires_grad, gradient = self._flags
        if x.grad_fn is not None:
            x.detach_()
        if x.requires_grad is not requires_grad:
            x.requires_grad_(requires_grad)
        if x.is_leaf and x.grad is not gradient:
            x.grad = gradient

    def _refuse_history(self, name: Callable[[int], str]) -> None:
        if not self._is_told:
            self._is_told = True
            raise ModelError(
                f"Expected a forward that writes no values with a history into {name(self.key)}, but it did. It is a "
                "view, of which autograd keeps that. Write x.detach(), or into the tensor that it is a view of."
            )


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg()


def _resize(x: Tensor, size: int) -> None:
    """Give the storage of a tensor its size in bytes back, which a forward may have freed or made longer."""
    storage = x.untyped_storage()
    if storage.nbytes() != size:
        storage.resize_(size)


def _memory(x: Tensor, size: int) -> Tensor:
    """Return the bytes of a tensor's storage, which has this size, or the tensor's own part if that is far smaller."""
    own = x.numel() * x.element_size()
    if own < size <= _LARGER * own:
        return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    return _without_repeats(x)


def _without_repeats(x: Tensor) -> Tensor:
    """Return the part of a tensor that holds each place of memory once, where it was expanded."""
    strides = x.stride()
    if 0 in strides:
        for dim, (size, stride) in enumerate(zip(x.shape, strides, strict=True)):
            if stride == 0 and size > 1:
                x = x.narrow(dim, 0, 1)
    return x
