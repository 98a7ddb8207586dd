"""Numbers of finished cells: one line per cell and row, means and deviations over seeds, paired comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from scipy import stats

__all__ = ["Averaging", "Comparison", "Score", "Summary", "compare", "flatten", "summarise"]

Averaging = Literal["samples", "batches"]
Line = Mapping[str, Any]


class Score(NamedTuple):
    """Mean and standard deviation over seeds, in percent; None for the deviation of one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Summary:
    """The table of one protocol, severity and batch size.

    Args:
        protocol: its name.
        severity: 1 to 5, or 0 where the protocol has its own.
        batch_size: samples per batch.
        groups: the rows by the modality that fails, "" for those of several or none.
        scores: by method, then by row.
        by_group: by method, then by group, over its rows.
        average: by method, over all rows.
        by_source: by method and source model, over all rows.
    """

    protocol: str
    severity: int
    batch_size: int
    groups: Mapping[str, Sequence[str]]
    scores: Mapping[str, Mapping[str, Score]]
    by_group: Mapping[str, Mapping[str, Score]]
    average: Mapping[str, Score]
    by_source: Mapping[str, Mapping[str, Score]]


class Comparison(NamedTuple):
    """Accuracies of B less those of A, in points, paired by row, seed and source.

    `low` and `high` bound the mean difference with 95 % confidence, and `p` is that of a two-sided t test. Both are
    over rows, each averaged over its seeds and sources, which are not independent. They are None for a single row.
    """

    protocol: str
    severity: int
    batch_size: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    pairs: int


def flatten(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a line per cell and row: coordinates, accuracies in percent, and figures of the whole stream."""
    return [
        {
            **cell["cell"],
            **row,
            "updates": cell["updates"],
            "skipped": cell["skipped"],
            "seconds": round(cell["seconds"], 3),
            **cell["figures"],
        }
        for cell in cells
        for row in cell["rows"]
    ]


def summarise(lines: Sequence[Line], averaging: Averaging = "samples") -> list[Summary]:
    """Return a summary per protocol, severity and batch size, in the lines' order."""
    figure = {"samples": "accuracy", "batches": "batch_accuracy"}[averaging]
    tables: dict[tuple[str, int, int], list[Line]] = defaultdict(list)
    for line in lines:
        tables[line["protocol"], line["severity"], line["batch_size"]].append(line)
    return [_summary(*key, chosen, figure) for key, chosen in tables.items()]


def compare(a: Sequence[Line], b: Sequence[Line]) -> list[Comparison]:
    """Compare B with A, for each protocol, severity and batch size that both have.

    Raises:
        ValueError: they have no row, seed and source in common.
    """
    first, second = _by_pair(a), _by_pair(b)
    tables: dict[tuple[str, int, int], list[tuple[str, float, float]]] = defaultdict(list)
    for key in first.keys() & second.keys():
        protocol, severity, batch_size, row, *_ = key
        tables[protocol, severity, batch_size].append((row, first[key], second[key]))
    if not tables:
        raise ValueError("Expected two runs with streams in common, but no protocol, row, seed and source is in both.")
    return [_compared(*key, pairs) for key, pairs in sorted(tables.items())]


def _summary(protocol: str, severity: int, batch_size: int, lines: Sequence[Line], figure: str) -> Summary:
    methods, rows, sources = (list(dict.fromkeys(line[name] for line in lines)) for name in ("method", "row", "source"))
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[row.partition(": ")[0] if row.count(": ") == 1 else ""].append(row)
    by_method = {method: [line for line in lines if line["method"] == method] for method in methods}

    def table(names: Iterable[str], belongs: Callable[[Line, str], bool]) -> dict[str, dict[str, Score]]:
        return {
            method: {name: _score([line for line in own if belongs(line, name)], figure) for name in names}
            for method, own in by_method.items()
        }

    return Summary(
        protocol,
        severity,
        batch_size,
        groups,
        scores=table(rows, lambda line, row: line["row"] == row),
        by_group=table(groups, lambda line, group: line["row"] in groups[group]),
        average={method: _score(own, figure) for method, own in by_method.items()},
        by_source=table(sources, lambda line, source: line["source"] == source),
    )


def _score(lines: Iterable[Line], figure: str) -> Score:
    """Return mean and deviation over seeds; a seed's value is the mean of its lines."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        by_seed[line["seed"]].append(line[figure])
    values = [fmean(of_seed) for of_seed in by_seed.values()]
    return Score(fmean(values) if values else float("nan"), stdev(values) if len(values) > 1 else None)


def _by_pair(lines: Iterable[Line]) -> dict[tuple[Any, ...], float]:
    names = ("protocol", "severity", "batch_size", "row", "seed", "source")
    return {tuple(line[name] for name in names): line["accuracy"] for line in lines}


def _compared(protocol: str, severity: int, batch_size: int, pairs: list[tuple[str, float, float]]) -> Comparison:
    by_row: dict[str, list[float]] = defaultdict(list)
    for row, a, b in pairs:
        by_row[row].append(b - a)
    differences = [fmean(values) for values in by_row.values()]
    low = high = p = None
    if len(differences) > 1 and stdev(differences) > 0:
        test = stats.ttest_1samp(differences, 0)
        interval = test.confidence_interval(0.95)
        low, high, p = float(interval.low), float(interval.high), float(test.pvalue)
    a, b = fmean(a for _, a, _ in pairs), fmean(b for *_, b in pairs)
    return Comparison(protocol, severity, batch_size, a, b, fmean(differences), low, high, p, len(pairs))
