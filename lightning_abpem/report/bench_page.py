"""The page of a benchmark's run, from the lines of its results.csv: accuracy by corruption and method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from lightning_abpem.report.charts import bars_chart
from lightning_abpem.report.html import chart, document, number, section, shown, table, tiles

__all__ = ["bench_page"]

_Table = tuple[str, int, int]
_MOST = 40  # protocols, severities and batch sizes together


def bench_page(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML of a benchmark's report.

    Args:
        name: of the run.
        lines: one for each cell and row: `protocol`, `severity`, `batch_size`, `row`, `method`, `source`, `seed` and
            `accuracy` in percent; and where the run has them `seconds`, `updates` and `skipped`.

    Raises:
        ValueError: there are no lines, or more tables than a page holds.
    """
    tables: dict[_Table, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        tables[line["protocol"], line["severity"], line["batch_size"]].append(line)
    if not 0 < len(tables) <= _MOST:
        raise ValueError(
            f"Expected a run with 1 to {_MOST} protocols, severities and batch sizes, but got {len(tables)}."
        )
    counts = [
        (label, number(len({line[key] for line in lines})))
        for key, label in (("method", "methods"), ("row", "conditions"), ("seed", "seeds"), ("source", "source models"))
    ]
    body = [f"<header><h1>{shown(name)}</h1><p class='muted'>A run of abpem bench</p></header>", tiles(counts)]
    body += [_section(i, *of) for i, of in enumerate(tables.items())]
    body.append(section("Cost", _cost(lines)))
    return document(name, body)


def _section(index: int, key: _Table, lines: Sequence[Mapping[str, Any]]) -> str:
    protocol, severity, size = key
    methods, rows = (list(dict.fromkeys(line[name] for line in lines)) for name in ("method", "row"))
    scores = {(m, r): _score([x for x in lines if (x["method"], x["row"]) == (m, r)]) for m in methods for r in rows}
    means = {m: _score([x for x in lines if x["method"] == m]) for m in methods}
    body = [[shown(r), *_cells([scores[m, r] for m in methods])] for r in rows]
    if len(rows) > 1:
        body.append(["all conditions", *_cells([means[m] for m in methods])])
    known = {m: score for m, score in means.items() if score is not None}
    svg = bars_chart(f"t{index}", {m: score[0] for m, score in known.items()}, "accuracy (%)")
    words = f"severity {severity}, " if severity else ""
    title = f"{protocol}, {words}batches of {size}"
    caption = "Accuracy in percent: mean and, over several seeds, standard deviation. The best of a row is marked."
    picture = chart("All conditions", "Mean accuracy of each method.", svg)
    return section(
        title,
        f'<div class="charts">{picture}</div>',
        f'<p class="muted">{caption}</p>',
        table(["condition", *methods], body, range(1, len(methods) + 1)),
    )


def _cells(scores: Sequence[tuple[float, float | None] | None]) -> list[str]:
    known = {f"{score[0]:.1f}" for score in scores if score is not None}
    best = max(known, key=float) if len(known) > 1 else None
    cells = []
    for score in scores:
        words = "-" if score is None else f"{score[0]:.1f}"
        spread = "" if score is None or score[1] is None else f' <span class="muted">± {score[1]:.1f}</span>'
        cells.append(f"{'*' * (words == best)}{words}{spread}")
    return cells


def _score(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float | None] | None:
    """Return mean and deviation over seeds, first within a seed; None without a line."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        by_seed[line["seed"]].append(line["accuracy"])
    values = [fmean(own) for own in by_seed.values()]
    return (fmean(values), stdev(values) if len(values) > 1 else None) if values else None


def _cost(lines: Sequence[Mapping[str, object]]) -> str:
    """Return a table of seconds, updates and skipped steps: of a cell, means."""
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == method]
        rows.append([shown(method), *(number(_mean(own, name)) for name in ("seconds", "updates", "skipped"))])
    return table(["method", "seconds of a cell", "updates", "skipped"], rows, (1, 2, 3))


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    try:
        return fmean(float(line[name]) for line in lines)
    except (KeyError, TypeError, ValueError):  # a file without it, or with other words there
        return None
