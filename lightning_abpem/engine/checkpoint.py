"""What a stream that is cut needs to go on elsewhere as if it had not been: plain values, and the file that holds them.

A state holds tensors of the host, numbers, strings, lists and dicts, so that `torch.load(weights_only=True)`, and with
it Lightning's checkpoints, can read it.
"""

from __future__ import annotations

import glob
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_abpem.engine.ranks import process

__all__ = [
    "FORMAT",
    "check_form",
    "check_saved",
    "check_weights",
    "own_path",
    "placed",
    "plain",
    "random_state",
    "read_state",
    "set_random_state",
    "source_sums",
    "write_state",
]

FORMAT = 1
_KEYS: dict[str, tuple[str, ...]] = {  # by part; of all of it
    "": ("process", "weights", "scale", "state", "measured", "resets_next", "memory", "random"),
    "weights": ("params", "source", "optimizer", "optimizer_class", "counts"),
    "scale": ("value", "streak"),
    "random": ("cpu",),
}
_NOT_READABLE = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def plain(value: Any) -> Any:
    """A copy on the host, without classes of this package's own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: plain(own) for key, own in value.items()}
    return [plain(own) for own in value] if isinstance(value, list | tuple) else value


def placed(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: placed(own, device) for key, own in value.items()}
    return [placed(own, device) for own in value] if isinstance(value, list | tuple) else value


def source_sums(source: Sequence[Tensor]) -> list[int]:
    """A number for each tensor that changes if any bit of it does, the same on any device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def checksum(x: Tensor) -> int:
        bits = x.detach().contiguous().flatten().view(integers[x.element_size()]).to("cpu", torch.int64)
        return int((bits * torch.arange(1, len(bits) + 1)).sum())  # wraps around

    return [checksum(x) for x in source]


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's random numbers, on the host and on the device."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Back to a `random_state`, as far as there are such devices."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_form(state: Any, method: str) -> None:
    """Hold what a user gave against what `state_dict` makes, as far as can be told without the model.

    Raises:
        ValueError: if it is no such thing, of another version's form or of another method.
    """
    if not isinstance(state, Mapping) or not {"format", "weights", "method"} <= state.keys():
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"Expected the state of an adaptation, as `state_dict` makes it, but got {keys}.")
    if state["format"] != FORMAT:
        raise ValueError(
            f"Expected an adaptation's state of form {FORMAT}, but got {state['format']!r}: another version of "
            "lightning_abpem wrote it."
        )
    if state["method"] != method:
        raise ValueError(f"Expected a state of {method}, but got one of {state['method']}.")
    for part, wanted in _KEYS.items():
        own = state[part] if part else state
        missing = [key for key in wanted if not isinstance(own, Mapping) or key not in own]
        if missing:
            raise ValueError(f"Expected a whole state, but `{part or 'state'}` has no {', '.join(missing)}.")


def check_weights(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Hold the weights of a state against those of the model that is to go on with it.

    Raises:
        ValueError: if they are of another model, of another fusion pattern, of another source or optimizer.
    """
    shapes, own_shapes = ({name: tuple(x.shape) for name, x in w["params"].items()} for w in (theirs, ours))
    if shapes != own_shapes:
        differ = [name for name in {**shapes, **own_shapes} if shapes.get(name) != own_shapes.get(name)][:3]
        listed = ", ".join(f"{n} {shapes.get(n, 'missing')} instead of {own_shapes.get(n, 'nothing')}" for n in differ)
        raise ValueError(
            f"Expected a state of this model and these patterns, but what adapts is not the same: {listed}."
        )
    if theirs["source"] != ours["source"]:
        raise ValueError(
            "Expected a state that began with this model's weights, but it began with others. Load the source model's "
            "checkpoint, not one that was written while the model was adapted."
        )
    if theirs["optimizer_class"] != ours["optimizer_class"]:
        raise ValueError(f"Expected a state of {ours['optimizer_class']}, but got one of {theirs['optimizer_class']}.")


def own_path(path: str | Path, rank: int, size: int) -> Path:
    """Where this process's state lies: `path`, or one of several beside each other, as state-0-of-2.pt."""
    path = Path(path)
    return path if size == 1 else path.with_name(f"{path.stem}-{rank}-of-{size}{path.suffix}")


def write_state(state: Mapping[str, Any], path: str | Path) -> Path:
    """Write a state, all of it or nothing; with several processes, each its own."""
    path = own_path(path, *state["process"])
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    checksums = get_crc32_options()
    try:
        set_crc32_options(True)
        torch.save(dict(state), partial)
        partial.replace(path)
    finally:
        set_crc32_options(checksums)
        partial.unlink(missing_ok=True)
    return path


def read_state(path: str | Path, method: str) -> dict[str, Any]:
    """This process's state from what `write_state` wrote.

    Raises:
        FileNotFoundError: if there is none, or none of this process.
        ValueError: if the file is damaged, or holds something else.
    """
    rank, size = process()
    path = own_path(path, rank, size)
    if not path.exists():
        each = f" Each process has a file of its own, and this is process {rank} of {size}." if size > 1 else ""
        raise FileNotFoundError(f"There is no '{path}' with the state of an adaptation.{each}")
    return _read(path, method)


def check_saved(path: str | Path, method: str) -> None:
    """Hold what `write_state` wrote against a method, before it is known which process this will be.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: see `read_state`.
    """
    path = Path(path)
    of_processes = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{glob.escape(path.suffix)}"))
    found = [path] if path.exists() else of_processes
    if not found:
        raise FileNotFoundError(f"There is no '{path}' with the state of an adaptation.")
    _read(found[0], method)


def _read(path: Path, method: str) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # by its checksums, at which torch.load does not look
        state = {} if broken else torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, *_NOT_READABLE) as error:
        raise ValueError(f"Expected '{path}' to hold the state of an adaptation, but it cannot be read.") from error
    if broken is not None:
        raise ValueError(f"Expected '{path}' to hold the state of an adaptation, but it is damaged at '{broken}'.")
    check_form(state, method)
    return state
