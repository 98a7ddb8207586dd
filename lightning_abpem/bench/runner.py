"""Cells computed on several processes, with progress. An interrupt loses only the cells being computed."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.cells import Cell, run_cell
from lightning_abpem.bench.protocols import find_protocol
from lightning_abpem.bench.variants import Variant
from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.processes import Workers

__all__ = ["MakeBenchmark", "faults_of", "finished", "list_cells", "load_cells", "run_cells"]

MakeBenchmark = Callable[[], Benchmark]


def list_cells(
    benchmark: Benchmark,
    protocols: Sequence[str],
    severities: Sequence[int],
    seeds: Sequence[int],
    sources: Sequence[str],
    batch_sizes: Sequence[int],
    methods: Sequence[str],
) -> list[Cell]:
    """Return all cells of a run, those of one stream beside each other.

    Raises:
        ValueError: an unknown protocol or source, a severity outside 1 to 5, or names that files cannot have.
    """
    if unknown := [name for name in sources if name not in benchmark.sources]:
        raise ValueError(f"Expected `sources` to be among {', '.join(benchmark.sources)}, but got {unknown}.")
    if odd := [word for word in (*sources, *methods) if not re.fullmatch(r"[\w.+-]+", word)]:
        raise ValueError(f"Expected labels of letters, digits and any of . _ + -, for files have them, but got {odd}.")
    cells = []
    for name in protocols:
        protocol = find_protocol(name)
        for severity in severities if protocol.has_severity else (0,):
            for condition in protocol.conditions(benchmark.kinds, severity):
                for seed in seeds:
                    cells += [
                        Cell(name, severity, condition.name, seed, source, batch_size, method)
                        for source in sources
                        for batch_size in batch_sizes
                        for method in methods
                    ]
    return cells


def faults_of(benchmark: Benchmark, cells: Iterable[Cell]) -> list[Corruption]:
    """Return all corruptions that these cells' streams may have, each once."""
    faults: dict[Corruption, None] = {}
    for name, severity in dict.fromkeys((cell.protocol, cell.severity) for cell in cells):
        protocol = find_protocol(name)
        for condition in protocol.conditions(benchmark.kinds, severity):
            faults |= dict.fromkeys(protocol.faults(condition))
    return list(faults)


def finished(folder: Path, cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells whose results are in the folder."""
    return [cell for cell in cells if _path(folder, cell).exists()]


def load_cells(folder: Path, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Read finished cells.

    Raises:
        ValueError: a file is damaged.
    """
    return [_read(_path(folder, cell)) for cell in cells]


def run_cells(
    make: MakeBenchmark,
    cells: Sequence[Cell],
    variants: Mapping[str, Variant],
    folder: Path,
    workers: int,
    device: str,
    on_done: Callable[[], None],
) -> None:
    """Compute the cells that the folder does not have yet, each into a file of its own.

    Args:
        make: makes the benchmark, in every process; it can be pickled.
        cells: what to compute.
        variants: the methods by their labels in the cells.
        folder: where cells are kept.
        workers: processes; 1 computes here.
        device: where the models run, as torch names it.
        on_done: called after each new cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial-*"):
        stale.unlink()
    done = set(finished(folder, cells))
    wanted = [cell for cell in cells if cell not in done]
    if workers == 1:
        _start(make, device, None)
        with _quiet():
            for cell in wanted:
                _compute(cell, variants[cell.method], folder)
                on_done()
        return
    pool = Workers(workers, _start, make, device, 1)
    try:
        jobs = [pool.submit(_compute, cell, variants[cell.method], folder) for cell in wanted]
        for job in as_completed(jobs):
            job.result()
            on_done()
    finally:
        pool.shutdown(cancel_futures=True)  # the cells under way are finished, and those that wait are not begun


_TALKING = "lightning.pytorch"  # where a method says what it adapts: here once per cell, to nobody


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(_TALKING)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


_BENCHMARK: Benchmark | None = None  # of this process
_DEVICE = "cpu"


def _start(make: MakeBenchmark, device: str, threads: int | None) -> None:
    global _BENCHMARK, _DEVICE
    if threads is not None:  # in a process of the pool, which is told to stop by the one that started it
        torch.set_num_threads(threads)
        logging.getLogger(_TALKING).setLevel(logging.WARNING)
    _BENCHMARK, _DEVICE = make(), device
    _source.cache_clear()


@lru_cache(maxsize=8)
def _source(name: str) -> LightningModule:
    assert _BENCHMARK is not None
    return _BENCHMARK.source(name).to(_DEVICE)


def _compute(cell: Cell, variant: Variant, folder: Path) -> None:
    assert _BENCHMARK is not None
    result = run_cell(_BENCHMARK, cell, variant, _source(cell.source))
    path = _path(folder, cell)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)  # which may be a link to a file elsewhere
    with partial.open("x", encoding="utf-8") as file:
        file.write(json.dumps(result))
    partial.replace(path)


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.key}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and run again.") from error
