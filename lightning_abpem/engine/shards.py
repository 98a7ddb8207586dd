"""Weights that FSDP2 has cut into shards, a DTensor each: whole values, and gradients, where the engine needs them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

__all__ = [
    "assign",
    "check_shards",
    "full_tensor",
    "gathers_weights",
    "has_shards",
    "is_sharded",
    "reshard",
    "sharded_gradients",
]


def is_sharded(x: object) -> bool:
    """Return True for a DTensor, without importing what most runs never need."""
    return hasattr(x, "full_tensor")


def has_shards(model: nn.Module) -> bool:
    """Return True if some parameters are cut into shards, so that the model's forward needs all processes."""
    return bool(modules_of_shards(model)) or any(map(is_sharded, model.parameters()))


def check_shards(params: Mapping[str, nn.Parameter], method: str, reads_params: bool) -> bool:
    """Return True if some of what adapts is cut into shards.

    Raises:
        ValueError: if the method cannot do with that.
    """
    names = [name for name, p in params.items() if is_sharded(p)]
    if names and reads_params:
        raise ValueError(
            f"{method} looks at the values of what adapts, but '{names[0]}' is cut into shards. Leave the modules that "
            "hold it out of fully_shard."
        )
    return bool(names)


def full_tensor(x: Tensor) -> Tensor:
    """All of a tensor; of a shard, it takes all processes to tell."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, or this process's shard of it, to a whole value, which all processes have."""
    if is_sharded(parameter) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(parameter.dtype), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def modules_of_shards(model: nn.Module) -> list[nn.Module]:
    """The modules before whose forward FSDP2 has to gather weights; afterwards it may keep them whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it nothing was cut
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def gathers_weights(module: nn.Module) -> bool:
    """Return True if this module itself is one of them."""
    return module in modules_of_shards(module)


def reshard(model: nn.Module) -> None:
    """Let go of whole copies that FSDP2 kept after a forward, so that the next one sees what is written to shards."""
    for module in modules_of_shards(model):
        module.reshard()  # type: ignore[operator]


def sharded_gradients(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """The gradients of several losses, by loss; of shards, whole and averaged over processes, as FSDP2 leaves them.

    FSDP2 gives a module other weights while it runs, so the gradients of its own come by `backward` alone.
    """
    gradients, before = [], [p.grad for p in params]
    try:
        for loss in losses:
            for p in params:
                p.grad = None
            loss.backward(retain_graph=loss is not losses[-1])
            gradients.append([None if p.grad is None else full_tensor(p.grad) for p in params])
    finally:
        for p, own in zip(params, before, strict=True):
            p.grad = own
    return gradients
