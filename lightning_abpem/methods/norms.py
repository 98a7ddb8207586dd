"""The affine parameters of normalisation layers, which Tent, EATA and SAR adapt, and their batch statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_statistics", "norm_params"]


def norm_params(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Weights and biases of all normalisation layers, by name.

    These are torch's own and whatever else is called ...Norm, such as an RMSNorm, and has a vector `weight`.

    Args:
        model: the model.
        exclude: how the names of those layers start that stay as they are.

    Raises:
        ValueError: if there are none.
    """
    params: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        is_norm = type(module).__name__.rstrip("123d").endswith("Norm")
        if is_norm and not any(name == start or name.startswith(f"{start}.") for start in exclude):
            own = {f"{name}.{kind}": p for kind, p in module.named_parameters(recurse=False)}
            params |= {full: p for full, p in own.items() if full.endswith((".weight", ".bias")) and p.dim() == 1}
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
