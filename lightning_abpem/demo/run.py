"""The demo: train on clean pairs, corrupt the sensors, test the source and the adapted model, show both."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from lightning_abpem.bench.digits_source import train_digits_model
from lightning_abpem.data.corruptions import Corruption, Sensor
from lightning_abpem.demo.protocol import RECIPE, SEEDS, Row, Run, evaluate_all, recipe
from lightning_abpem.demo.trainer import OUTPUT, quiet
from lightning_abpem.display import comparison_table, literal
from lightning_abpem.report import severity_figure

__all__ = ["GAPS", "KINDS", "run_demo"]

KINDS: tuple[tuple[Sensor, str], ...] = (
    *(("image", kind) for kind in ("gaussian_noise", "impulse_noise", "fog", "contrast")),
    *(("audio", kind) for kind in ("gaussian_noise", "crowd", "rain", "wind")),
)
GAPS = {
    "attention_gap/audio_to_image": "audio asks image",
    "attention_gap/image_to_audio": "image asks audio",
}


def run_demo(learning_rate: float = RECIPE["learning_rate"], out: Path = OUTPUT) -> None:
    """Run the demo, and print its table.

    Args:
        learning_rate: of ABPEM's Adam.
        out: folder for results.csv and severity.png.
    """
    options = recipe(learning_rate=learning_rate)
    quiet()
    console = Console(width=100)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = train_digits_model()
    rows = evaluate_all(_runs(options), checkpoint, "testing source and adapted")
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    severity_figure(_curves(rows), GAPS, out / "severity.png")
    title = f"Severity 5, batch 8, learning rate {learning_rate:g}, mean of 3 seeds (± of the change)"
    console.print(comparison_table(title, _summary(rows)))
    console.print(literal(f"Every run: {out / 'results.csv'}. Severities 0 to 5: {out / 'severity.png'}."))


def _runs(options: dict[str, object]) -> list[Run]:
    """Clean and severity 5 with every seed, severities 1 to 4 with the first."""
    corruptions: list[tuple[Corruption | None, int]] = [(None, seed) for seed in SEEDS]
    for modality, kind in KINDS:
        corruptions += [(Corruption(modality, kind, 5), seed) for seed in SEEDS]
        corruptions += [(Corruption(modality, kind, severity), SEEDS[0]) for severity in range(1, 5)]
    return [
        Run(corruption, seed, chosen, {**_labels(corruption), "method": method})
        for corruption, seed in corruptions
        for method, chosen in (("source", None), ("adapted", options))
    ]


def _labels(corruption: Corruption | None) -> dict[str, Any]:
    if corruption is None:
        return {"corruption": "clean", "severity": 0}
    return {"corruption": _name(corruption.modality, corruption.kind), "severity": corruption.severity}


def _name(modality: str, kind: str) -> str:
    return f"{modality}: {kind.replace('_', ' ')}"


def _summary(rows: list[Row]) -> list[Row]:
    """A line for clean data, one per corruption at severity 5, and their mean."""
    names = [_name(*kind) for kind in KINDS]
    lines = [_line("clean", [row for row in rows if row["severity"] == 0], section=True)]
    lines += [
        _line(name, [r for r in rows if r["corruption"] == name and r["severity"] == 5], section=name == names[-1])
        for name in names
    ]
    return [*lines, _line("mean of the corruptions", [row for row in rows if row["severity"] == 5])]


def _line(name: str, rows: list[Row], section: bool = False) -> Row:
    def mean(method: str, figure: str, seed: int | None = None) -> float:
        return fmean(row[figure] for row in rows if row["method"] == method and seed in (None, row["seed"]))

    def gap(method: str) -> float:
        return fmean(abs(mean(method, direction)) for direction in GAPS)

    changes = [mean("adapted", "accuracy", seed) - mean("source", "accuracy", seed) for seed in SEEDS]
    line = {"name": name, "change": fmean(changes), "spread": stdev(changes), "section": section}
    for method in ("source", "adapted"):
        line |= {f"{method}_{figure}": mean(method, figure) for figure in ("accuracy", "entropy")}
        line[f"{method}_gap"] = gap(method)
    return line


def _curves(rows: list[Row]) -> list[Row]:
    """Means over seeds for every corruption, severity and method; clean data is severity 0 of each corruption."""
    points = []
    for name in (_name(*kind) for kind in KINDS):
        for severity in range(6):
            for method in ("source", "adapted"):
                wanted = ("clean" if severity == 0 else name, severity, method)
                chosen = [r for r in rows if (r["corruption"], r["severity"], r["method"]) == wanted]
                figures = {figure: fmean(r[figure] for r in chosen) for figure in ("accuracy", *GAPS)}
                points.append({"corruption": name, "severity": severity, "method": method, **figures})
    return points
