"""Methods that move the affine parameters of normalisation layers, under batch statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.engine.method import Method, Predicts

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
    """Let every batch normalisation use the batch's own mean and variance while the block lasts."""
    kept = [(m, m.running_mean, m.running_var) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        for module, _, _ in kept:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance


def _is_norm(module: nn.Module) -> bool:
    """Return True for torch's normalisation layers, their subclasses, and a ...Norm with a vector weight."""
    weight = getattr(module, "weight", None)
    named_so = type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter) and weight.dim() == 1
    return named_so or isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm))


def _starts(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}.")
