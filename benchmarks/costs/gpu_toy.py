"""Helpers of the checks of `benchmarks.costs.gpu`: requirements with a figure, and a small model that adapts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_abpem import ABPEM
from tests.toy import MODALITIES, PAPER, batches

__all__ = [
    "CheckError",
    "Stream",
    "abpem",
    "distance",
    "is_same",
    "predictions",
    "require",
    "state_of",
    "stream_of",
]

Stream = list[tuple[Tensor, ...]]


class CheckError(AssertionError):
    """Says what does not hold, with the figure."""


def require(holds: bool, what: str) -> str:
    """Return `what`, the figure as words, if `holds`; raise otherwise.

    Raises:
        CheckError: if it does not.
    """
    if not holds:
        raise CheckError(what)
    return what


def abpem(**changes: Any) -> ABPEM:
    """Return the callback for the tests' toy model, with the published loss."""
    options: dict[str, Any] = {"fusion": "fusion.*.attn", "modalities": MODALITIES}
    adam = partial(torch.optim.Adam, lr=1e-3)
    return ABPEM(**(options | {"optimizer": adam} | PAPER | changes))


def predictions(model: nn.Module, stream: Stream, device: str, **changes: Any) -> list[Tensor]:
    """Return the logits of a stream that the model adapts to, on a device."""
    model.to(device)
    with torch.no_grad(), abpem(**changes).attach(model):
        return [model(*(x.to(device) for x in batch)) for batch in stream]


def stream_of(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Stream:
    """Return the toy model's batches."""
    return [tuple(x.to(device, dtype) for x in batch) for batch in batches(count)]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; NaN counts as infinite."""
    return (a.cpu().double() - b.cpu().double()).abs().nan_to_num(nan=float("inf")).max().item()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's weights and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(source: dict[str, Tensor], model: nn.Module) -> bool:
    """Return True if the model's weights and buffers equal `state` bit for bit."""
    return all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
