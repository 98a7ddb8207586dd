"""One cell of a benchmark: a method on one stream of one source model, and its measurements."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.protocols import Item, find_protocol
from lightning_abpem.bench.settings import hyper_parameters
from lightning_abpem.bench.variants import Variant
from lightning_abpem.engine.adaptation import Adaptation

__all__ = ["BINS", "Cell", "run_cell", "stream_of"]

BINS = 10
"""Bins of the reliability diagram, of equal width in confidence."""


@dataclass(frozen=True, order=True)
class Cell:
    """The coordinates of one number in a table."""

    protocol: str
    severity: int
    condition: str
    seed: int
    source: str
    batch_size: int
    method: str

    @property
    def key(self) -> str:
        """Name for the cell's file."""
        words = [str(value).replace(" ", "_").replace(":", "") for value in asdict(self).values()]
        return ",".join(words)


def stream_of(benchmark: Benchmark, cell: Cell) -> list[Item]:
    """Return the samples in their order, the same for all methods, sources and batch sizes."""
    protocol = find_protocol(cell.protocol)
    conditions = {condition.name: condition for condition in protocol.conditions(benchmark.kinds, cell.severity)}
    condition = conditions[cell.condition]
    words = (cell.protocol, cell.condition)
    rng = np.random.default_rng([cell.seed, *(zlib.crc32(word.encode()) for word in words)])
    return protocol.stream(condition, benchmark.labels, rng)


def run_cell(benchmark: Benchmark, cell: Cell, variant: Variant, model: LightningModule) -> dict[str, Any]:
    """Adapt the model along the stream, then restore it; return the measurements, ready for JSON.

    Returns:
        `cell`; the method's `hyper_parameters`; `rows`, each row of the table with its `samples`, `accuracy` and
        `batch_accuracy` (the unweighted mean over batches, as published scripts have it), in percent; `hits` and
        `sizes` by batch; `reliability`, per bin of confidence the samples, the sum of confidences and the hits;
        `figures`, the method's own averaged over samples; `updates`, `skipped`, and `seconds` in the model's calls.
    """
    items = stream_of(benchmark, cell)
    sensors = sorted({c.modality for item in items for c in item.corruptions} | {i.missing for i in items if i.missing})
    callback = variant.build(benchmark, sensors, len(items), cell.batch_size)
    benchmark.load(list(dict.fromkeys(c for item in items for c in item.corruptions)))
    stream = _Stream(benchmark, items)
    loader = DataLoader(stream, cell.batch_size, num_workers=benchmark.num_workers, collate_fn=_collate)
    tally, seconds, device = _Tally(), 0.0, next(model.parameters()).device
    with callback.attach(model) as adaptation, torch.no_grad():
        for start, inputs in zip(range(0, len(items), cell.batch_size), loader, strict=True):
            if isinstance(inputs, Exception):
                raise inputs
            batch = items[start : start + cell.batch_size]
            labels = torch.from_numpy(benchmark.labels[[item.index for item in batch]])
            begin = time.perf_counter()
            logits = model(*(x.to(device) for x in inputs)).cpu()
            seconds += time.perf_counter() - begin
            tally.add(batch, logits, labels, _figures(adaptation))
    return {
        "cell": asdict(cell),
        "hyper_parameters": hyper_parameters(callback),
        **tally.results(),
        "updates": adaptation.updates,
        "skipped": adaptation.skipped,
        "seconds": seconds,
    }


class _Stream(Dataset[tuple[Tensor, ...] | Exception]):
    """The model's inputs, sample by sample; a missing modality is zeros, what a normalised input is on average.

    For a sample that cannot be read, the item is the error itself. Raised inside a worker process, its message would
    contain that process's traceback.
    """

    def __init__(self, benchmark: Benchmark, items: Sequence[Item]) -> None:
        self._benchmark, self._items = benchmark, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: int) -> tuple[Tensor, ...] | Exception:
        item = self._items[position]
        try:
            inputs = self._benchmark.sample(item.index, item.corruptions)
        except (OSError, ValueError) as error:
            return error
        missing = [sensor == item.missing for sensor in self._benchmark.sensors]
        return tuple(x.new_zeros(x.shape) if lacks else x for x, lacks in zip(inputs, missing, strict=True))


def _collate(samples: list[tuple[Tensor, ...] | Exception]) -> Any:
    """A batch of inputs; the error if one could not be read."""
    return next((sample for sample in samples if isinstance(sample, Exception)), None) or default_collate(samples)


def _figures(adaptation: Adaptation) -> Mapping[str, float]:
    return {name: value.item() for name, value in adaptation.record.items()}


class _Tally:
    """Counts along a stream."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[int, int]]] = {}  # samples and hits, by batch
        self._hits: list[int] = []
        self._sizes: list[int] = []
        self._bins = np.zeros((BINS, 3))
        self._figures: dict[str, list[tuple[float, int]]] = {}

    def add(self, batch: list[Item], logits: Tensor, labels: Tensor, figures: Mapping[str, float]) -> None:
        confidence, predicted = logits.double().softmax(1).max(1)
        hits = (predicted == labels).numpy()
        for row in dict.fromkeys(item.row for item in batch):
            own = np.array([item.row == row for item in batch])
            self._rows.setdefault(row, []).append((int(own.sum()), int(hits[own].sum())))
        self._hits.append(int(hits.sum()))
        self._sizes.append(len(batch))
        bins = np.minimum((confidence.nan_to_num().numpy() * BINS).astype(int), BINS - 1)
        for column, values in enumerate((np.ones(len(batch)), confidence.nan_to_num().numpy(), hits)):
            self._bins[:, column] += np.bincount(bins, values, minlength=BINS)
        for name, value in figures.items():
            self._figures.setdefault(name, []).append((value, len(batch)))

    def results(self) -> dict[str, Any]:
        return {
            "rows": [_row(name, counts) for name, counts in self._rows.items()],
            "hits": self._hits,
            "sizes": self._sizes,
            "reliability": self._bins.tolist(),
            "figures": {name: _mean(pairs) for name, pairs in self._figures.items()},
        }


def _row(name: str, counts: list[tuple[int, int]]) -> dict[str, Any]:
    samples, hits = (sum(column) for column in zip(*counts, strict=True))
    by_batch = float(np.mean([hit / size for size, hit in counts]))
    return {"row": name, "samples": samples, "accuracy": 100 * hits / samples, "batch_accuracy": 100 * by_batch}


def _mean(pairs: list[tuple[float, int]]) -> float | None:
    """Return a figure's mean over the samples of the batches that have it."""
    finite = [(value, size) for value, size in pairs if np.isfinite(value)]
    return sum(value * size for value, size in finite) / sum(size for _, size in finite) if finite else None
