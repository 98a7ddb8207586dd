"""Evaluating the source model, as it is and adapted, on streams of corrupted pairs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_abpem import ABPEM
from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.data.digits import DigitsAV, Split
from lightning_abpem.demo.trainer import quiet, silent_trainer
from lightning_abpem.models.digits import DigitsModel

__all__ = ["FUSION", "MODALITIES", "RECIPE", "SEEDS", "Row", "Run", "evaluate", "evaluate_all", "recipe"]

SEEDS = (0, 1, 2)
FUSION = "fusion.self_attn"
MODALITIES = {"audio": 32, "image": 16}
# The package's defaults, with a memory of 32 samples, and the learning rate that fits so short a stream (docs/results).
RECIPE: dict[str, Any] = {"memory_batches": 4, "learning_rate": 1e-3}

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One stream through one model: what is wrong with the sensors, and the options of ABPEM (None: the source)."""

    corruption: Corruption | None
    seed: int
    options: dict[str, Any] | None
    labels: dict[str, Any] = field(default_factory=dict)
    split: Split = "test"
    batch_size: int = 8
    pairs: int = 640


def recipe(**changes: object) -> dict[str, Any]:
    """The demo's recipe with some options changed."""
    return RECIPE | changes


def evaluate(run: Run, checkpoint: Path) -> Row:
    """One run's accuracy, in percent, and the figures that ABPEM records, averaged over the stream."""
    options = recipe(steps=0, memory_batches=1) if run.options is None else dict(run.options)
    optimizer = partial(torch.optim.Adam, lr=options.pop("learning_rate"))
    abpem = ABPEM(FUSION, MODALITIES, optimizer=optimizer, verbose=0, figures="all", **options)
    data = DigitsAV(run.batch_size, run.corruption, run.split, run.pairs, run.seed)
    model = DigitsModel.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    result = silent_trainer(callbacks=[abpem]).test(model, data, verbose=False)[0]

    figures = {name.removeprefix("abpem/test/"): value for name, value in result.items()}
    return {**run.labels, "seed": run.seed, **figures, "accuracy": 100 * result["accuracy"]}


def evaluate_all(runs: Iterable[Run], checkpoint: Path, title: str) -> list[Row]:
    """All runs, in their order, on one process per core; neighbours in pairs, which have the same stream."""
    runs = list(runs)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_quiet_worker) as pool,
        Progress(*columns) as progress,
    ):
        bar = progress.add_task(title, total=len(runs))
        rows = []
        for row in pool.map(partial(evaluate, checkpoint=checkpoint), runs, chunksize=2):
            rows.append(row)
            progress.advance(bar)
        return rows


def _quiet_worker() -> None:
    quiet()
    torch.set_num_threads(1)
