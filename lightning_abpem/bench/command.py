"""A benchmark's run from beginning to end: cells, progress, results; and two runs side by side."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.cells import Cell
from lightning_abpem.bench.output import note_on, published_beside, read_lines, write_results
from lightning_abpem.bench.protocols import POOLED, Kinds, chosen_kinds
from lightning_abpem.bench.results import Averaging, compare
from lightning_abpem.bench.runner import faults_of, finished, list_cells, load_cells, run_cells
from lightning_abpem.bench.settings import check_comparable, check_settings, pooled_kinds, settings_of
from lightning_abpem.bench.tables import comparison_markdown, terminal
from lightning_abpem.bench.variants import METHODS, Variant, find_variants
from lightning_abpem.display import literal, visible
from lightning_abpem.engine.checks import check_integer

__all__ = ["SEEDS", "compare_runs", "run_benchmark"]

SEEDS = (111, 222, 333, 444, 555)
"""Those of the published protocol."""

Words = str | Sequence[str]
Numbers = int | str | Sequence[int]


def run_benchmark(
    benchmark: type[Benchmark],
    arguments: Mapping[str, object],
    *,
    out: Path,
    methods: Words | None = None,
    protocol: Words = "iid",
    kinds: Words | None = None,
    severity: Numbers = 5,
    seeds: Numbers = 5,
    sources: Words | None = None,
    batch_size: Numbers | None = None,
    averaging: Averaging = "samples",
    variants: Mapping[str, Mapping[str, object]] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> None:
    """Run the requested cells that `out` does not have yet, and write the results of all of them.

    Args:
        benchmark: the class of the benchmark.
        arguments: of its constructor.
        out: folder of the run. Finished cells in it are kept.
        methods: labels of methods or of `variants`, in the order of the tables; several with commas. By default every
            method, and the variants.
        protocol: one or several of clean, iid, continual, mixed, gradual, both, missing, skewed-0.1, skewed-1.
        kinds: of corruption, one or several; all by default. MODALITY:KIND is one of a modality alone.
        severity: one or several of 1 to 5.
        seeds: how many of 111, 222, 333, 444, 555; or, with commas or as a list, the seeds themselves.
        sources: names of source models; all by default.
        batch_size: one or several; the benchmark's own by default.
        averaging: "samples" weighs batches by their size; "batches" does not, as published scripts.
        variants: by label, a `method` and its `options`: settings of one's own.
        workers: processes, >= 1; by default one per core, and one where the device is not the CPU.
        device: where the models run, such as "cuda".
        console: where progress and tables are shown.

    Raises:
        ValueError: something asked for does not exist, or `out` holds a run of other settings.
    """
    console = console or Console()
    own = _variants(variants or {})
    chosen = find_variants(list({**METHODS, **own}) if methods is None else _words("methods", methods), own)
    processes = _processes(workers, device)
    on = _On(benchmark, arguments, None if kinds is None else _words("kinds", kinds))
    asked: dict[str, Any] = {
        "protocols": _words("protocol", protocol),
        "severities": _numbers("severity", severity),
        "seeds": _seeds(seeds),
        "sources": list(on.data.sources) if sources is None else _words("sources", sources),
        "batch_sizes": _numbers("batch_size", on.data.batch_size if batch_size is None else batch_size),
        "methods": list(chosen),
    }
    cells = list_cells(on.data, **asked)
    _try_out(on.data, chosen, device)
    _prepare(on, cells, asked["sources"], chosen, out)
    with _progress(console) as progress:
        done = len(finished(out / "cells", cells))
        bar = progress.add_task(visible(on.data.name), total=len(cells), completed=done)
        run_cells(on.make, cells, chosen, out / "cells", processes, device, lambda: progress.advance(bar))
    run = {"benchmark": on.data.name, "arguments": on.arguments, "kinds": on.data.kinds, **asked}
    _show(console, out, cells, on.data, averaging, run | {"averaging": averaging, "device": device})


class _On:
    """A run's benchmark.

    Attributes:
        data: the benchmark, with the chosen kinds of corruption alone.
        every: all of its kinds.
        arguments: of its constructor, the defaults included.
        make: makes it again in any process.
    """

    def __init__(self, benchmark: type[Benchmark], arguments: Mapping[str, Any], kinds: Sequence[str] | None) -> None:
        bound = inspect.signature(benchmark).bind_partial(**arguments)
        bound.apply_defaults()
        self.arguments: Mapping[str, Any] = bound.arguments
        self.data = benchmark(**self.arguments)
        self.every = self.data.kinds
        some = None if kinds is None else chosen_kinds(self.every, kinds)
        self.make = partial(_make, benchmark, self.arguments, some)
        self.data.kinds = self.every if some is None else some


def _processes(workers: int | None, device: str) -> int:
    if workers is None:
        return os.cpu_count() or 1 if device == "cpu" else 1
    check_integer("workers", workers, 1)
    return workers


def _prepare(
    on: _On, cells: Sequence[Cell], sources: Sequence[str], variants: Mapping[str, Variant], out: Path
) -> None:
    """Load what the cells need, and hold the folder against what its finished cells were computed with."""
    for name in ("cells", "figures"):
        if (out / name).is_symlink():
            raise ValueError(f"Expected '{out / name}' to be a folder of the run's own, but it is a link. Remove it.")
    on.data.load(faults_of(on.data, cells))
    on.data.prepare(sources)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    pooled = pooled_kinds(on.data.kinds, on.every, {cell.protocol for cell in cells if cell.condition == POOLED})
    check_settings(out, {**settings_of(on.data, on.arguments, sources, variants), **pooled})


def _show(
    console: Console,
    out: Path,
    cells: Sequence[Cell],
    data: Benchmark,
    averaging: Averaging,
    run: Mapping[str, object],
) -> None:
    """Write the results of finished cells, and show them."""
    for summary in write_results(out, load_cells(out / "cells", cells), data, averaging, run):
        console.print(terminal(summary, published_beside(summary, data)))
    console.print(literal(note_on(data, averaging)))
    console.print(literal(f"Cells: {out / 'results.csv'}. Tables: {out / 'tables.md'}, {out / 'tables.tex'}."))


def compare_runs(a: str, b: str) -> str:
    """Return Markdown that compares two runs side by side, with a paired test.

    Args:
        a: a run's folder, or FOLDER:METHOD for one of its methods.
        b: likewise. Without methods, each method that both runs have is compared with itself.

    Raises:
        ValueError: a folder is not one of a finished run, or they have nothing in common.
    """
    (folder_a, of_a), (folder_b, of_b) = (_side(side) for side in (a, b))
    check_comparable(folder_a, folder_b)
    lines_a, lines_b = read_lines(folder_a), read_lines(folder_b)
    in_a, in_b = ({line["method"] for line in lines} for lines in (lines_a, lines_b))
    for side, method, known in ((a, of_a or of_b, in_a), (b, of_b or of_a, in_b)):
        if method is not None and method not in known:
            raise ValueError(f"Expected a method of {', '.join(sorted(known))}, but got {method} of {side}.")
    both = sorted(in_a & in_b)
    pairs = [(of_a or of_b, of_b or of_a)] if of_a or of_b else [(method, method) for method in both]
    if not pairs:
        raise ValueError(f"Expected runs with a method in common, but {a} has {sorted(in_a)} and {b} {sorted(in_b)}.")
    parts = []
    for first, second in pairs:
        comparisons = compare(
            [line for line in lines_a if line["method"] == first],
            [line for line in lines_b if line["method"] == second],
        )
        parts.append(comparison_markdown(f"{folder_a}: {first}", f"{folder_b}: {second}", comparisons))
    return "\n".join(parts)


def _side(words: str) -> tuple[Path, str | None]:
    if Path(words).is_dir():
        return Path(words), None
    folder, colon, method = words.rpartition(":")
    return (Path(folder), method) if colon else (Path(words), None)


def _variants(specs: Mapping[str, Mapping[str, object]]) -> dict[str, Variant]:
    if not isinstance(specs, Mapping):
        raise ValueError(f"Expected `variants` to map labels to a `method` and its `options`, but got {specs!r}.")
    return {label: _variant(label, spec) for label, spec in specs.items()}


def _variant(label: str, spec: Mapping[str, object]) -> Variant:
    wanted = f"Expected variant {label!r} to have a `method` and its `options`"
    if not isinstance(spec, Mapping) or "method" not in spec or set(spec) - {"method", "options"}:
        raise ValueError(f"{wanted}, but got {spec!r}.")
    method, options = spec["method"], spec.get("options") or {}
    if not isinstance(method, str) or not isinstance(options, Mapping):
        raise ValueError(f"{wanted}, a string and a mapping, but got {spec!r}.")
    try:
        return Variant(method, options)
    except ValueError as error:
        raise ValueError(f"`variants.{label}`: {error}") from error


def _make(benchmark: type[Benchmark], arguments: Mapping[str, object], kinds: Kinds | None) -> Benchmark:
    """Make the benchmark with those kinds of corruption alone, in any process."""
    data = benchmark(**arguments)
    if kinds is not None:
        data.kinds = kinds
    return data


def _try_out(data: Benchmark, variants: Mapping[str, Variant], device: str) -> None:
    """Make every method once, and a tensor on the device, before anything is written."""
    for variant in variants.values():
        variant.build(data, list(data.sensors), len(data.labels), data.batch_size)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Expected `device` to be one that torch has here, but got {device!r}: {error}") from error


def _words(name: str, value: Words) -> list[str]:
    return _each_once(name, [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value))


def _numbers(name: str, value: Numbers) -> list[int]:
    words = [value] if isinstance(value, int) else value.split(",") if isinstance(value, str) else value
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        raise ValueError(f"Expected `{name}` to be an integer or several with commas, but got {value!r}.") from None
    low, high = {"severity": (1, 5), "batch_size": (1, 1 << 20)}.get(name, (0, 1 << 32))
    if any(not low <= number <= high for number in numbers):
        raise ValueError(f"Expected `{name}` in [{low}, {high}], but got {value!r}.")
    return _each_once(name, numbers)


def _each_once(name: str, values: list[Any]) -> list[Any]:
    if not values or len(set(values)) < len(values):
        listed = ", ".join(map(str, values)) or "none"
        raise ValueError(f"Expected `{name}` to have one at least, and each once, but got {listed}.")
    return values


def _seeds(value: Numbers) -> list[int]:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int):
        return _numbers("seeds", value)
    if not 1 <= value <= len(SEEDS):
        raise ValueError(f"Expected `seeds` to be how many of {SEEDS}, or a list, but got {value}.")
    return list(SEEDS[:value])


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
