"""The files of a benchmark's run: lines, tables and figures."""

from __future__ import annotations

import csv
import io
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
from lightning_abpem.bench.settings import plain
from lightning_abpem.bench.tables import latex, markdown, title
from lightning_abpem.data.published_layout import write

__all__ = ["note_on", "published_beside", "read_lines", "write_results"]

Json = dict[str, Any]


def write_results(
    folder: Path,
    cells: Sequence[Mapping[str, object]],
    benchmark: Benchmark,
    averaging: Averaging,
    run: Mapping[str, object],
) -> list[Summary]:
    """Write results.csv, results.json, tables.md, tables.tex and figures/; return the summaries.

    Args:
        folder: of the run.
        cells: the finished ones.
        benchmark: that of the cells.
        averaging: "samples", or "batches" for unweighted means over batches.
        run: the arguments of the run, for results.json.
    """
    lines = flatten(cells)
    summaries = summarise(lines, averaging)
    names = list(dict.fromkeys(name for line in lines for name in line))
    _write_text(folder / "results.csv", _csv(names, lines))
    record = {**_circumstances(), "run": plain(run), "provenance": plain(benchmark.provenance())}
    averages = [_averages(summary) for summary in summaries]
    record |= {"hyper_parameters": _hyper_parameters(cells), "averages": averages}
    _write_text(folder / "results.json", json.dumps(record, indent=2) + "\n")
    note = note_on(benchmark, averaging)
    tables = [markdown(s, published_beside(s, benchmark), note) for s in summaries]
    _write_text(folder / "tables.md", "\n".join(tables))
    _write_text(folder / "tables.tex", "\n".join(latex(s, note) for s in summaries))
    _write_figures(folder / "figures", cells, summaries)
    return summaries


def _csv(names: Sequence[str], lines: Sequence[Mapping[str, object]]) -> str:
    words = io.StringIO(newline="")
    writer = csv.DictWriter(words, names)
    writer.writeheader()
    writer.writerows(lines)
    return words.getvalue()


def _write_text(path: Path, words: str) -> None:
    """Put a file in the place of what has its name, be it a link."""
    write(path, words.encode())


def published_beside(summary: Summary, benchmark: Benchmark) -> Mapping[str, Mapping[str, float]]:
    """Return the published averages for a table, by modality, then by method; they are of severity 5."""
    known = benchmark.published() if summary.severity == 5 else {}
    return {sensor: rows for (protocol, sensor), rows in known.items() if protocol == summary.protocol}


def note_on(benchmark: Benchmark, averaging: Averaging) -> str:
    """Return the notes below a table: what is procedural, left out, or averaged otherwise; empty if nothing is."""
    known = benchmark.provenance()
    made = [name for name in ("noise", "frost") if "procedural" in str(known.get(name))]
    notes = {
        f"Procedural: {', '.join(made)}.": made,
        f"Samples left out, for they are missing or broken: {known.get('skipped')}.": known.get("skipped"),
        "Means over batches, whatever their size.": averaging == "batches",
    }
    return " ".join(words for words, holds in notes.items() if holds)


def read_lines(folder: Path) -> list[Json]:
    """Return the lines of a finished run's results.csv.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"Expected {folder} to be the folder of a finished run, but it has no results.csv.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_line(raw) for raw in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"Expected {path} to be of a finished run, but it is damaged: {error!r}.") from error


_TYPES = {
    **dict.fromkeys(("protocol", "row", "source", "method"), str),
    **dict.fromkeys(("severity", "seed", "batch_size"), int),
    **dict.fromkeys(("accuracy", "batch_accuracy"), float),
}


def _line(raw: Mapping[str, object]) -> Json:
    """Convert a line of results.csv: its numbers from text."""
    if missing := [name for name in _TYPES if raw[name] is None]:
        raise ValueError(f"a line ends before {missing[0]}")
    return {**raw, **{name: kind(raw[name]) for name, kind in _TYPES.items()}}


def _hyper_parameters(cells: Sequence[Mapping[str, Any]]) -> Json:
    """Return by method its cells' hyper-parameters; if they differ, each set with its conditions and batch sizes."""
    found: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for cell in cells:
        own = found.setdefault(cell["cell"]["method"], {}).setdefault(json.dumps(cell["hyper_parameters"]), {})
        for name in ("condition", "batch_size"):
            values = own.setdefault(f"{name}s", [])
            if cell["cell"][name] not in values:
                values.append(cell["cell"][name])
    return {
        method: [{**json.loads(values), **(where if len(by_values) > 1 else {})} for values, where in by_values.items()]
        for method, by_values in found.items()
    }


def _write_figures(folder: Path, cells: Sequence[Mapping[str, object]], summaries: Sequence[Summary]) -> None:
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
    """Return versions, commit, command, machine and time."""
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
    """Return the commit of the package's own repository, -dirty if it has changes; None if installed from elsewhere."""
    root = Path(lightning_abpem.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        asked = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip()
