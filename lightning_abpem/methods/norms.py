"""Methods that move the affine parameters of normalisation layers, under batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.engine.method import Method, Predicts
from lightning_abpem.modules.patches import Changes

__all__ = ["NormMethod", "batch_statistics", "norm_params", "running_mean"]

_MOMENTUM = 0.9
_Running = TypeVar("_Running", float, Tensor)


class NormMethod(Method):
    """Moves the affine parameters of normalisation layers; batch normalisation uses the batch's own statistics.

    Predictions are those that the step was computed from. `exclude` says how the names of layers start that stay.
    """

    predicts: ClassVar[Predicts] = "before"
    exclude: Sequence[str] = ()

    def collect(self, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
        return norm_params(model, self.exclude)

    def prepared(self, model: nn.Module) -> AbstractContextManager[None]:
        return batch_statistics(model)


def running_mean(before: _Running | None, now: _Running) -> _Running:
    """Return the mean of what came before, with momentum 0.9, and of now."""
    return now if before is None else _MOMENTUM * before + (1 - _MOMENTUM) * now


def norm_params(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Weights and biases of all normalisation layers, by name.

    These are torch's own and whatever else is called ...Norm, such as an RMSNorm, and has a vector `weight`.

    Args:
        model: the model.
        exclude: how the names of those layers start that stay as they are.

    Raises:
        ValueError: if there are none.
    """
    layers = {name: module for name, module in model.named_modules() if _is_norm(module)}
    if unknown := [start for start in exclude if not any(_starts(name, start) for name, _ in model.named_modules())]:
        raise ValueError(f"Expected `exclude` to name modules of {type(model).__name__}, but got {unknown}.")
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in layers.items():
        if not any(_starts(name, start) for start in exclude):
            for kind in ("weight", "bias"):
                p = getattr(module, kind, None)
                if isinstance(p, nn.Parameter):
                    found.setdefault(id(p), (f"{name}.{kind}", p))
    params = dict(found.values())
    if not params:
        raise ValueError(
            f"Expected normalisation layers with weights to adapt in {type(model).__name__}, but found none"
            + (f" outside {', '.join(exclude)}." if exclude else ".")
        )
    return params


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let every batch normalisation use the batch's own mean and variance while the block lasts.

    The running ones are there as ever, but for the time of its forward.
    """
    with Changes() as changes:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                changes.note(partial(_put_back, module, module.running_mean, module.running_var))
                changes.wrap(module, "forward", _run_without_statistics, module)
        yield


def _run_without_statistics(
    module: _BatchNorm, forward: Callable[..., object], /, *args: object, **kwargs: object
) -> Any:
    """Run the forward of a batch normalisation, or of a subclass that does more, while it has no running statistics."""
    mean, variance = module.running_mean, module.running_var
    try:
        module.running_mean = module.running_var = None
        return forward(*args, **kwargs)
    finally:
        _put_back(module, mean, variance)


def _put_back(module: _BatchNorm, mean: Tensor | None, variance: Tensor | None) -> None:
    """Put running statistics back where there are none."""
    if module.running_mean is None:
        module.running_mean = mean
    if module.running_var is None:
        module.running_var = variance


def _is_norm(module: nn.Module) -> bool:
    """Return True for torch's normalisation layers, their subclasses, and a ...Norm with a vector weight."""
    weight = getattr(module, "weight", None)
    named_so = type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter) and weight.dim() == 1
    return named_so or isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm))


def _starts(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}.")
