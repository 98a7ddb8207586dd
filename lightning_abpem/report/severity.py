"""Figures from a run's rows. Needs matplotlib (the `demo` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_abpem.report.labels import figure_text

__all__ = ["severity_figure"]

_COLOURS = {"source": "#8a8f98", "adapted": "#0b6e4f"}


def severity_figure(rows: Sequence[Mapping[str, Any]], gaps: Mapping[str, str], path: Path) -> None:
    """Accuracy (above) and attention gap (below) against severity 0 to 5, a column per corruption.

    Args:
        rows: each with `corruption`, `severity` (0 for clean), `method` ("source" or "adapted"), `accuracy` in percent
            and the gaps in scores; already averaged over seeds.
        gaps: the rows' names of the gaps, one per ordered pair of modalities, and what the legend calls them.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["corruption"] for row in rows))
    figure = Figure(figsize=(1.9 * len(kinds) + 0.6, 4.6), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(kinds):
        for method, colour in _COLOURS.items():
            chosen = sorted(
                (row for row in rows if row["corruption"] == kind and row["method"] == method),
                key=lambda row: row["severity"],
            )
            severity = [row["severity"] for row in chosen]
            axes[0, column].plot(severity, [r["accuracy"] for r in chosen], "o-", color=colour, label=method, ms=3.5)
            for (name, words), style in zip(gaps.items(), ("-", "--", ":", "-."), strict=False):
                label = figure_text(words) if method == "adapted" else None
                axes[1, column].plot(severity, [r[name] for r in chosen], style, color=colour, label=label)
        axes[0, column].set_title(figure_text(kind).replace(": ", "\n"), fontsize=10)
        axes[1, column].set_xlabel("severity")
        axes[1, column].set_xticks(range(6))
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("attention gap\n(mean score, self - cross)")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9, loc="lower left")
    axes[1, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
