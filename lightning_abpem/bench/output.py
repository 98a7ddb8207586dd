"""What a benchmark's run leaves in its folder: settings, lines, tables and figures."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning_abpem
from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.figures import accuracy_figure, gap_figure, reliability_figure, running_figure
from lightning_abpem.bench.results import Averaging, Summary, flatten, summarise
from lightning_abpem.bench.tables import latex, markdown, title
from lightning_abpem.bench.variants import Variant
from lightning_abpem.data.published_layout import write_json

__all__ = ["check_comparable", "check_settings", "published_beside", "read_lines", "write_results"]

Json = dict[str, Any]


def check_settings(
    folder: Path, benchmark: Benchmark, arguments: Mapping[str, Any], variants: Mapping[str, Variant]
) -> None:
    """Hold a run against what the folder's finished cells were computed with, and write down what is new.

    Raises:
        ValueError: the benchmark, its arguments, where its data and models come from, the package's version or a
            method's options are others.
    """
    before: Json = _read_settings(folder) or {}
    methods = {label: _settings_of(variant, benchmark) for label, variant in variants.items()}
    now: Json = {
        "benchmark": benchmark.name,
        "arguments": _plain(arguments),
        "provenance": _plain(benchmark.provenance()),
        "version": lightning_abpem.__version__,
    }
    if before:
        earlier = {**{name: before[name] for name in now if name in before}, **before["methods"]}
        current = {**now, **methods}
        for name in earlier.keys() & current.keys():
            if earlier[name] != current[name]:
                raise ValueError(
                    f"Expected `out` to be new or of the same settings, but in {folder} `{name}` is {earlier[name]}, "
                    f"and now {current[name]}. Choose another `out`, another label, or delete the folder."
                )
    known = {**before.get("methods", {}), **methods}
    write_json(folder / "settings.json", {**now, "methods": known})


def check_comparable(a: Path, b: Path) -> None:
    """Hold two runs against each other: the same samples have to be in both.

    Raises:
        ValueError: they are of different benchmarks, or of one with different arguments.
    """
    first, second = _read_settings(a), _read_settings(b)
    for name in ("benchmark", "arguments"):
        if first and second and first[name] != second[name]:
            raise ValueError(
                f"Expected two runs on the same data, but `{name}` is {first[name]} in {a} and {second[name]} in {b}."
            )


def write_results(
    folder: Path, cells: Sequence[Mapping[str, Any]], benchmark: Benchmark, averaging: Averaging, run: Mapping[str, Any]
) -> list[Summary]:
    """results.csv, results.json, tables.md, tables.tex and figures/ in the folder.

    Args:
        folder: of the run.
        cells: the finished ones.
        benchmark: what they are of.
        averaging: of samples, or of batches without weights.
        run: how the run was asked for, as results.json keeps it.
    """
    lines = flatten(cells)
    summaries = summarise(lines, averaging)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    record = {**_circumstances(), "run": _plain(run), "provenance": dict(benchmark.provenance())}
    averages = [_averages(summary) for summary in summaries]
    (folder / "results.json").write_text(
        json.dumps({**record, "options": _options(cells), "averages": averages}, indent=2) + "\n"
    )
    tables = [markdown(s, published_beside(s, benchmark)) for s in summaries]
    (folder / "tables.md").write_text("\n".join(tables))
    (folder / "tables.tex").write_text("\n".join(map(latex, summaries)))
    _write_figures(folder / "figures", cells, summaries)
    return summaries


def published_beside(summary: Summary, benchmark: Benchmark) -> Mapping[str, Mapping[str, float]]:
    """The published averages that belong beside a table, by modality, then by method: they are of severity 5."""
    known = benchmark.published() if summary.severity == 5 else {}
    return {sensor: rows for (protocol, sensor), rows in known.items() if protocol == summary.protocol}


def read_lines(folder: Path) -> list[Json]:
    """The lines of a finished run's results.csv.

    Raises:
        ValueError: there is none.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"Expected {folder} to be the folder of a finished run, but it has no results.csv.")
    numbers = {"severity": int, "seed": int, "batch_size": int, "accuracy": float, "batch_accuracy": float}
    with path.open(newline="") as file:
        return [{**line, **{name: kind(line[name]) for name, kind in numbers.items()}} for line in csv.DictReader(file)]


def _read_settings(folder: Path) -> Json | None:
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.exists() else None


def _settings_of(variant: Variant, benchmark: Benchmark) -> Json:
    """A variant's method and its options on the benchmark, whichever sensors fail."""
    failing = [[], *([sensor] for sensor in benchmark.sensors), list(benchmark.sensors)]
    resolved = {" and ".join(sensors) or "none": _plain(variant.resolved(benchmark, sensors)) for sensors in failing}
    return {"method": variant.method, "options": resolved}


def _options(cells: Sequence[Mapping[str, Any]]) -> Json:
    """By method, the options of its cells, and the conditions that each were for where there are several."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        conditions = found.setdefault(cell["cell"]["method"], {}).setdefault(json.dumps(cell["options"]), [])
        if cell["cell"]["condition"] not in conditions:
            conditions.append(cell["cell"]["condition"])
    return {
        method: [
            {"options": json.loads(options), **({"conditions": names} if len(by_options) > 1 else {})}
            for options, names in by_options.items()
        ]
        for method, by_options in found.items()
    }


def _write_figures(folder: Path, cells: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> None:
    folder.mkdir(exist_ok=True)
    for summary in summaries:
        accuracy_figure(summary, folder / f"accuracy {title(summary)}.png".replace(", ", "-").replace(" ", "-"))
    gap_figure(cells, folder / "attention-gap.png")
    running_figure(cells, folder / "running-accuracy.png")
    reliability_figure(cells, folder / "reliability.png")


def _averages(summary: Summary) -> Json:
    averages = {method: score._asdict() for method, score in summary.average.items()}
    return {
        "protocol": summary.protocol,
        "severity": summary.severity,
        "batch_size": summary.batch_size,
        "accuracy": averages,
    }


def _circumstances() -> Json:
    """Versions, machine, commit, time."""
    packages = ("torch", "lightning", "numpy", "scipy", "pillow")
    return {
        "versions": {
            "python": platform.python_version(),
            "lightning_abpem": lightning_abpem.__version__,
            **{name: version(name) for name in packages},
        },
        "commit": _commit(),
        "command": " ".join(["abpem", *sys.argv[1:]]),
        "processor": platform.machine(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Of the package's own repository, -dirty with changes after it; None where it was installed from elsewhere."""
    root = Path(lightning_abpem.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        asked = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()


def _plain(value: Any) -> Any:
    """What JSON can hold, by the value's words where it cannot."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
