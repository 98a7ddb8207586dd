"""Random number generators, as they were before a pass of the engine."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

import torch
from torch import nn

__all__ = ["RandomState", "generator_state", "set_generator_state"]


class RandomState:
    """The state of torch's, Python's and NumPy's global generators, now.

    Args:
        model: its device's generator counts too.
        torchs_alone: leave out Python's and NumPy's, which take longer to read.
    """

    def __init__(self, model: nn.Module, torchs_alone: bool = False) -> None:
        device = next((p.device for p in model.parameters()), None)
        self._device = device if device is not None and device.type == "cuda" else None
        self._numpy = None if torchs_alone else sys.modules.get("numpy.random")
        self._torch, self._python = torch.get_rng_state(), None if torchs_alone else random.getstate()
        self._cuda: Any = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._array: Any = None if self._numpy is None else self._numpy.get_state(legacy=False)

    def restore_torchs(self) -> bool:
        """Put torch's generators back; return True if one had moved."""
        moved = not torch.equal(torch.get_rng_state(), self._torch)
        if moved:
            torch.set_rng_state(self._torch)
        if self._device is not None and not torch.equal(torch.cuda.get_rng_state(self._device), self._cuda):
            torch.cuda.set_rng_state(self._cuda, self._device)
            moved = True
        return moved

    def restore(self) -> bool:
        """Put all generators back; return True if one had moved."""
        moved = self.restore_torchs()
        if self._python is not None and random.getstate() != self._python:
            random.setstate(self._python)
            moved = True
        if self._numpy is not None and not _same(self._numpy.get_state(legacy=False), self._array):
            self._numpy.set_state(self._array)
            moved = True
        return moved


def generator_state(x: object) -> bytes:
    """Return the state of a generator that somebody keeps: torch's, Python's or NumPy's."""
    if isinstance(x, torch.Generator):
        return bytes(x.get_state().tolist())
    if isinstance(x, random.Random):
        return pickle.dumps(x.getstate())
    return pickle.dumps([part.__reduce__()[-1] if _spawns(part) else part.state for part in _parts(x)])


def set_generator_state(x: object, state: bytes) -> None:
    """Put a generator back to what `generator_state` returned."""
    if isinstance(x, torch.Generator):
        x.set_state(torch.tensor(list(state), dtype=torch.uint8))
    elif isinstance(x, random.Random):
        x.setstate(pickle.loads(state))
    else:
        for part, own in zip(_parts(x), pickle.loads(state), strict=True):
            if _spawns(part):
                part.__setstate__(own)
            else:
                part.state = own


def _parts(x: object) -> list[Any]:
    """Return what one of NumPy's generators draws from: its bits, and the seeds that it gives to its children."""
    bits = getattr(x, "bit_generator", None) or getattr(x, "_bit_generator", x)
    seeds = getattr(bits, "seed_seq", None)
    return [bits, seeds] if _spawns(seeds) else [bits]


def _spawns(x: object) -> bool:
    return hasattr(x, "n_children_spawned")


def _same(x: Any, y: Any) -> bool:
    """Return True if two states of NumPy's generator are equal: dicts with arrays in them."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[name], y[name]) for name in x)
    return bool((x == y).all()) if hasattr(x, "all") else bool(x == y)
