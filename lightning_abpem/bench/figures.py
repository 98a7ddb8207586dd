"""A benchmark's figures, from finished cells. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_abpem.bench.cells import BINS
from lightning_abpem.bench.results import Summary
from lightning_abpem.bench.tables import title
from lightning_abpem.data.published_layout import write
from lightning_abpem.report.labels import figure_text

__all__ = ["accuracy_figure", "gap_figure", "reliability_figure", "running_figure"]

_COLOURS = (
    "#8a8f98",
    "#0b6e4f",
    "#c8553d",
    "#3d5a80",
    "#e0a458",
    "#7d5ba6",
    "#58a4b0",
    "#a23b72",
    "#6b8e23",
    "#222222",
)
Cells = Iterable[Mapping[str, Any]]
_HALF_BAND = 0.22  # of a row: less than what is left to the next one's marks


def accuracy_figure(summary: Summary, path: Path) -> None:
    """Draw accuracy by corruption: a band for each, with a mark for each method and its standard deviation.

    Methods share a band's middle, so that marks of one corruption are closer together than those of its neighbours. The
    source is grey.
    """
    rows = [row for group in summary.groups.values() for row in group]
    figure = Figure(figsize=(7, 0.4 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(-_HALF_BAND, _HALF_BAND, len(summary.scores)) if len(summary.scores) > 1 else np.zeros(1)
    for (method, scores), offset, colour in zip(summary.scores.items(), offsets, _cycle(), strict=False):
        means, deviations = [scores[row].mean for row in rows], [scores[row].deviation or 0 for row in rows]
        style: dict[str, Any] = {"fmt": "o", "color": colour, "label": figure_text(method), "ms": 4, "lw": 1}
        axes.errorbar(means, np.arange(len(rows)) + offset, xerr=deviations, **style)
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f3f5f6", lw=0, zorder=0)
    axes.set_yticks(range(len(rows)), [figure_text(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("accuracy (%)")
    axes.set_title(figure_text(title(summary)), fontsize=10, loc="left")
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=5)
    _save(figure, [axes], path)


def gap_figure(cells: Cells, path: Path) -> bool:
    """Draw the attention gap against severity: a panel per failing modality and pair of modalities, a line per method.

    Returns:
        True if something was drawn: it takes cells of `iid` at two severities or more, with a recorded gap.
    """
    values: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for cell in cells:
        of = cell["cell"]
        for name, value in cell["figures"].items():
            if of["protocol"] == "iid" and name.startswith("attention_gap/") and value is not None:
                panel = of["condition"].partition(":")[0], name.removeprefix("attention_gap/").replace("_", " ")
                values[panel][of["method"]][of["severity"]].append(value)
    if not any(len(by_severity) > 1 for methods in values.values() for by_severity in methods.values()):
        return False
    figure = Figure(figsize=(2.9 * len(values) + 1, 3), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, ((modality, pair), methods) in zip(panels, values.items(), strict=True):
        for (method, by_severity), colour in zip(methods.items(), _cycle(), strict=False):
            points = sorted((severity, float(np.mean(gaps))) for severity, gaps in by_severity.items())
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=figure_text(method), ms=4)
        axes.set_title(figure_text(f"{modality} fails: {pair}"), fontsize=9)
        axes.set_xlabel("severity")
    panels[0].set_ylabel("attention gap (scores)")
    panels[-1].legend(frameon=False, fontsize=8)
    _save(figure, panels, path)
    return True


def running_figure(cells: Cells, path: Path) -> None:
    """Draw the accuracy until each point of the stream, over all cells of a protocol: a panel per protocol."""
    hits: dict[str, dict[str, list[Sequence[Sequence[int]]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        hits[cell["cell"]["protocol"]][cell["cell"]["method"]].append((cell["hits"], cell["sizes"]))
    figure, panels = _panels(len(hits), 4, (3.0, 2.7))
    for axes, (protocol, methods) in zip(panels, hits.items(), strict=True):
        for (method, runs), colour in zip(methods.items(), _cycle(), strict=False):
            grid = np.linspace(0.05, 1, 96)
            curves = [np.interp(grid, *_running(*run)) for run in runs]
            axes.plot(100 * grid, np.mean(curves, axis=0), color=colour, label=figure_text(method))
        axes.set_title(figure_text(protocol), fontsize=9)
    figure.supxlabel("share of the stream seen (%)", fontsize=9)
    figure.supylabel("accuracy so far (%)", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    _save(figure, panels, path)


def reliability_figure(cells: Cells, path: Path) -> None:
    """Draw accuracy against confidence, a panel per method, with the expected calibration error.

    A mark's area is proportional to the number of predictions in its bin.
    """
    bins: dict[str, Any] = defaultdict(lambda: np.zeros((BINS, 3)))
    for cell in cells:
        bins[cell["cell"]["method"]] += np.array(cell["reliability"])
    figure, panels = _panels(len(bins), 5, (2.2, 2.3), share=True)
    for axes, (method, counts) in zip(panels, bins.items(), strict=True):
        samples, confidence, correct = counts[counts[:, 0] > 0].T
        error = np.abs(confidence - correct).sum() / samples.sum()
        axes.plot([0, 1], [0, 1], ":", color="#8a8f98")
        axes.plot(confidence / samples, correct / samples, color=_COLOURS[1], lw=1)
        sizes = 3 + 60 * samples / samples.max()  # what few predictions say is small
        axes.scatter(confidence / samples, correct / samples, sizes, color=_COLOURS[1])
        axes.set_title(f"{figure_text(method)}, ECE {100 * error:.1f} %", fontsize=8)
    figure.supxlabel("confidence", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    _save(figure, figure.axes, path)


def _panels(count: int, columns: int, size: tuple[float, float], share: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels, in rows."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns + 1.5, size[1] * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for i, axes in enumerate(panels[count:], count):
        axes.set_visible(False)
        panels[i - columns].tick_params(labelbottom=True)
    return figure, panels[:count]


def _running(hits: Sequence[int], sizes: Sequence[int]) -> tuple[Any, Any]:
    """Return the share of the stream after each batch, and the accuracy until then."""
    seen = np.cumsum(sizes)
    return seen / seen[-1], 100 * np.cumsum(hits) / seen


def _cycle() -> Iterable[str]:
    while True:
        yield from _COLOURS


def _save(figure: Figure, panels: Iterable[Axes], path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write(path, picture.getvalue())  # in the place of what has the name, be it a link
