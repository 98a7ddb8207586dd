"""Parameters before a pass, besides their values, which no forward may edit: flags, gradients, attributes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter, is_not

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import SavedAttributes
from lightning_abpem.modules.tensors import bit_sum, reading_waits, same_bits

__all__ = ["GradientFlags", "ParameterValues", "SavedParameters", "WrittenParameters", "device_of", "parameters_of"]

_flag, _gradient, _version, _attributes = map(attrgetter, ("requires_grad", "grad", "_version", "__dict__"))
_hooks, _dtype, _size = attrgetter("_backward_hooks"), attrgetter("dtype"), Tensor.numel
_SMALL = 1024  # values of a parameter that is compared in every pass: a bias, a norm


def device_of(parameters: Iterable[Tensor]) -> torch.device:
    """Return the device of the first parameter; the CPU if there is none."""
    return next((p.device for p in parameters), torch.device("cpu"))


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return what stands in the parameter tables of modules now, whatever their own `parameters()` gives."""
    return [p for module in modules for p in module._parameters.values() if p is not None]


class GradientFlags:
    """`requires_grad` and gradients of a model's parameters: the user's of the moment, or those of an adapting pass.

    The user's hold in every prediction, for torch's kernels round by the flags: a linear layer takes another path if
    its weight asks for a gradient, even under torch.no_grad(). In a pass no parameter has a gradient.

    Args:
        model: the model.
        trainable: the parameters that gradients reach in a pass.

    Attributes:
        frozen: ids of the parameters that are frozen in the pass that is under way, and not for the user.
    """

    def __init__(self, model: nn.Module, trainable: Collection[nn.Parameter]) -> None:
        self._all, self._moving = list(dict.fromkeys(parameters_of(model.modules()))), {id(p) for p in trainable}
        self._before: list[tuple[nn.Parameter, bool]] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.frozen: set[int] = set()

    def freeze(self) -> None:
        """Let gradients reach the trainable parameters alone, and hide those that are there."""
        self.thaw()  # if a call was broken off
        self._gradients = [(p, p.grad) for p in self._all if p.grad is not None]
        self._before = [(p, p.requires_grad) for p in self._all if p.requires_grad is (id(p) not in self._moving)]
        self.frozen = {id(p) for p, flag in self._before if flag}
        for p, flag in self._before:
            p.requires_grad = not flag  # a third of the time of `requires_grad_`
        for p, _ in self._gradients:
            p.grad = None

    def thaw(self) -> None:
        """Put the user's back; it can be called again."""
        for p, flag in self._before:
            p.requires_grad = flag
        for p, gradient in self._gradients:
            p.grad = gradient
        self._before, self._gradients, self.frozen = [], [], set()


class SavedParameters:
    """Flags and gradients of parameters, and the first attributes and hooks of those that have none.

    Args:
        parameters: all of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._all = parameters
        self._flags, self._gradients = list(map(_flag, parameters)), list(map(_gradient, parameters))
        self._hooks = list(map(_hooks, parameters))
        self._named = {id(p) for p in filter(_attributes, parameters)}

    def restore(self) -> set[int]:
        """Put flags, gradients, hooks and attributes back, but not values; return the ids of what had changed."""
        changed: set[int] = set()
        if any(map(is_not, map(_flag, self._all), self._flags)):
            for p, flag in zip(self._all, self._flags, strict=True):
                if p.requires_grad is not flag:
                    p.requires_grad = flag
                    changed.add(id(p))
        if any(map(is_not, map(_gradient, self._all), self._gradients)):
            for p, gradient in zip(self._all, self._gradients, strict=True):
                if p.grad is not gradient:
                    p.grad = gradient
                    changed.add(id(p))
        if any(map(is_not, map(_hooks, self._all), self._hooks)):
            for p, hooks in zip(self._all, self._hooks, strict=True):
                if p._backward_hooks is not hooks:
                    p._backward_hooks = hooks
        for p in filter(_attributes, self._all):
            if id(p) not in self._named and SavedAttributes(p, {}).restore():
                changed.add(id(p))
        return changed


class ParameterValues:
    """Values of parameters, so that edits in place are seen.

    Of small parameters on a CPU the values are compared every time, and they alone decide. In others an edit is seen by
    the version that it counts up, and by the bits if these are summed.

    Args:
        parameters: all of them; those made in inference mode have no version.
        sums: sum the bits of all, for edits that do not count a version up.
        may_wait: also of parameters on a device for which the host would have to wait.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sums: bool = False, may_wait: bool = False) -> None:
        self._all, self._versions = parameters, list(map(_version, parameters))
        small = [p for p in parameters if type(p) is nn.Parameter and p.numel() <= _SMALL and not reading_waits(p)]
        self._small = {dtype: [p for p in small if p.dtype == dtype] for dtype in set(map(_dtype, small))}
        self._sizes = {dtype: list(map(_size, own)) for dtype, own in self._small.items()}
        self._copies = {dtype: _joined(own) for dtype, own in self._small.items()}
        self._sums = [(p, bit_sum(p)) for p in parameters if sums and (may_wait or not reading_waits(p))]

    def edited(self) -> list[nn.Parameter]:
        """Return the parameters that were edited in place."""
        edited = [] if list(map(_version, self._all)) == self._versions else self._counted()
        for dtype, own in self._small.items():
            before, sizes = self._copies[dtype], self._sizes[dtype]
            if list(map(_size, own)) != sizes or set(map(_dtype, own)) != {dtype}:
                edited += [p for p, size in zip(own, sizes, strict=True) if p.dtype != dtype or p.numel() != size]
                continue
            now = _joined(own)
            if not same_bits(now, before):
                parts = zip(own, now.split(sizes), before.split(sizes), strict=True)
                edited += [p for p, x, y in parts if not same_bits(x, y)]
        return edited + [p for p, before in self._sums if not torch.equal(bit_sum(p), before)]

    def _counted(self) -> list[nn.Parameter]:
        """Return the parameters, those that are compared excepted, of which an edit was counted."""
        pairs = zip(self._all, self._versions, strict=True)
        return [p for p, version in pairs if p._version != version and not self._holds(p)]

    def seen(self, edited: nn.Parameter) -> str:
        """Return in words by what the edit of a parameter was seen."""
        if not any(p is edited for p in self._counted()):
            return "its values changed"
        return f"torch counted an edit (values are compared in parameters of up to {_SMALL:,} of them on a CPU alone)"

    def _holds(self, parameter: nn.Parameter) -> bool:
        """Return True if the values of a parameter are held, so that they decide."""
        return any(own is parameter for group in self._small.values() for own in group)


class WrittenParameters:
    """Parameters as their one writer leaves them, so that what others write in between is seen.

    That is seen by the version that it counts up. What counts none up, as through `.data`, is seen in looks 1, 2, 4, 8
    and so on; of a parameter that the host would have to wait for, in the first. Shards are left alone.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = [name for name, p in parameters.items() if not hasattr(p, "full_tensor")]
        self._all = [parameters[name] for name in self._names]
        self._looks = 0
        self.note()

    def note(self) -> None:
        """Note them as they are: their writer left them so."""
        self._versions = list(map(_version, self._all))
        self._sums: dict[str, Tensor] = {}
        look = self._looks + 1
        if look & (look - 1) == 0:
            pairs = zip(self._names, self._all, strict=True)
            self._sums = {name: bit_sum(p) for name, p in pairs if look == 1 or not reading_waits(p)}

    def written(self) -> str | None:
        """Return the name of one that another has written since; None if there is none."""
        self._looks += 1
        for name, p, version in zip(self._names, self._all, self._versions, strict=True):
            if p._version != version or (name in self._sums and not torch.equal(bit_sum(p), self._sums[name])):
                return name
        return None


@torch.no_grad()
def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([p if p.dim() == 1 else p.flatten() for p in parameters])
