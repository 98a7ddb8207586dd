"""The settings of a run's cells: kept beside them, and compared with those of a later run in that folder."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_abpem
from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.protocols import POOLED, Kinds
from lightning_abpem.bench.variants import Variant
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.data.published_layout import read_json, write_json

__all__ = ["check_comparable", "check_settings", "hyper_parameters", "plain", "pooled_kinds", "settings_of"]

Json = dict[str, Any]

_OF_ENGINE = ("steps", "memory_batches", "memory_at", "reset", "predicts")


def settings_of(
    benchmark: Benchmark, arguments: Mapping[str, object], sources: Sequence[str], variants: Mapping[str, Variant]
) -> Json:
    """Return everything that the cells of a run depend on, by dotted names.

    Args:
        benchmark: what it runs on.
        arguments: of the benchmark's constructor.
        sources: the source models of the run; the settings have a checksum of each one's weights.
        variants: its methods, by their labels.
    """
    material = {name: value for name, value in arguments.items() if name not in benchmark.immaterial}
    return {
        "benchmark": benchmark.name,
        "version": lightning_abpem.__version__,
        **{f"arguments.{name}": plain(value) for name, value in material.items()},
        **{f"provenance.{name}": plain(value) for name, value in benchmark.provenance().items()},
        **{f"sources.{name}": _checksum(benchmark.source(name)) for name in sources},
        **{f"methods.{label}": _on(benchmark, variant) for label, variant in variants.items()},
    }


def pooled_kinds(kinds: Kinds, every: Kinds, protocols: Collection[str]) -> Json:
    """Return the kinds of corruption of a run, for the protocols whose streams draw from all of them.

    Args:
        kinds: those of the run.
        every: those of the benchmark.
        protocols: the names of those protocols.
    """
    chosen = _EVERY if plain(kinds) == plain(every) else plain(kinds)
    return {f"kinds.{name}": chosen for name in protocols}


_EVERY = "all"  # which also holds for folders of runs that could not choose


def check_settings(folder: Path, settings: Json) -> None:
    """Compare a run's settings with those of the folder's finished cells, and add the new ones to the record.

    Raises:
        ValueError: a setting that both have differs.
    """
    before = _of_cells(folder)
    for name, earlier, now in _differences(before, settings):
        raise ValueError(
            f"Expected `out` to be new or of the same settings, but in {folder} `{name}` is {earlier}, and now {now}. "
            "Choose another `out`, another label, or delete the folder."
        )
    write_json(folder / "settings.json", {**before, **settings})


def check_comparable(a: Path, b: Path) -> None:
    """Raise unless two runs have the same samples and source models.

    Raises:
        ValueError: the benchmark, its arguments, its noises or a source model differ.
    """
    for name, first, second in _differences(_of_cells(a), _of_cells(b)):
        if name != "version" and not name.startswith("methods."):
            raise ValueError(f"Expected two runs on the same data, but `{name}` is {first} in {a} and {second} in {b}.")


def hyper_parameters(callback: TestTimeAdaptation) -> Json:
    """Return a method's hyper-parameters, defaults included, ready for JSON."""
    settings = callback.settings
    optimizer = settings.optimizer_factory([nn.Parameter(torch.zeros(1))])
    own = settings.method
    return {
        **(plain(own) if is_dataclass(own) else {}),
        **{name: plain(getattr(settings, name)) for name in _OF_ENGINE},
        "optimizer": {"class": type(optimizer).__name__, **plain(optimizer.defaults)},
    }


def plain(value: object) -> Any:
    """Convert a value for JSON; what JSON cannot hold becomes its name or text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # which JSON has no numbers for
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return getattr(value, "__qualname__", None) or str(value)  # of a function without its address


def _on(benchmark: Benchmark, variant: Variant) -> Json:
    """Return a variant's method, and its hyper-parameters by the sensors that fail."""
    failing = [[], *([sensor] for sensor in benchmark.sensors), list(benchmark.sensors)]
    built = {
        " and ".join(sensors) or "none": variant.build(benchmark, sensors, len(benchmark.labels), benchmark.batch_size)
        for sensors in failing
    }
    return {"method": variant.method, **{name: hyper_parameters(callback) for name, callback in built.items()}}


def _checksum(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_cells(folder: Path) -> Json:
    """Return the recorded settings that apply to at least one finished cell."""
    path = folder / "settings.json"
    names = [cell.stem.split(",") for cell in (folder / "cells").glob("*.json")]
    cells = [words for words in names if len(words) == 7]  # the parts of a cell's key
    if not cells or not path.exists():
        return {}
    pooled = {words[0] for words in cells if words[2] == POOLED}
    used = {"kinds": pooled, "sources": {words[4] for words in cells}, "methods": {words[-1] for words in cells}}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"Expected {path} to hold an object, but got {reprlib.repr(settings)}.")
    settings = {**dict.fromkeys((f"kinds.{name}" for name in pooled), _EVERY), **settings}
    return {name: value for name, value in settings.items() if _is_of(name, used)}


def _is_of(name: str, used: Mapping[str, Collection[str]]) -> bool:
    part, _, label = name.partition(".")
    return part not in used or label in used[part]


def _differences(first: Json, second: Json) -> list[tuple[str, Any, Any]]:
    """Return the settings that both have with different values: name, first value, second value."""
    return [(name, first[name], second[name]) for name in first if name in second and first[name] != second[name]]
