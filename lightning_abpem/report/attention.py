"""The attention of a run's page: score blocks of a few samples before and after adapting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_abpem.report.charts import blocks_chart, scale_of
from lightning_abpem.report.html import chart, shown

__all__ = ["attention"]

Json = Mapping[str, Any]


def attention(record: Json) -> list[str]:
    """Return pictures of the fusion attention, three for each sample; none if the run has none."""
    blocks = record["blocks"]
    if blocks is None or not blocks["pairs"]:
        return []
    pairs = blocks["pairs"]
    sizes = ", ".join(f"{pair['query']} {pair['queries']}" for pair in pairs if pair["query"] == pair["key"])
    names = ", ".join(dict.fromkeys(pair["attention"] for pair in pairs))
    words = (
        f"Scores before the softmax, averaged over heads, of the first samples of the first batch, in {names}. "
        "Before: with the source's weights. After: with the weights at the end of the run. Both have the same colours. "
        f"Blocks with many tokens show means over neighbours (tokens: {sizes})."
    )
    charts = [picture for sample in range(len(pairs[0]["before"])) for picture in _pictures(pairs, sample)]
    return [f'<p class="muted">{shown(words)}</p>', f'<div class="charts">{"".join(charts)}</div>']


def _pictures(pairs: Sequence[Json], sample: int) -> list[str]:
    """Return a sample's scores before and after, and their difference."""
    maps = {when: {(p["query"], p["key"]): p[when][sample] for p in pairs} for when in ("before", "after")}
    scale = scale_of([rows for own in maps.values() for rows in own.values()])
    change = {pair: _difference(maps["after"][pair], rows) for pair, rows in maps["before"].items()}
    most = max(map(abs, scale_of(list(change.values()))))
    name = f"Sample {sample + 1}"
    return [
        chart(f"{name}, before", "source weights", blocks_chart(f"b{sample}", maps["before"], scale)),
        chart(f"{name}, after", "adapted weights", blocks_chart(f"a{sample}", maps["after"], scale)),
        chart(f"{name}, change", "after less before", blocks_chart(f"d{sample}", change, (-most, most), True)),
    ]


def _difference(a: Sequence[Sequence[float | None]], b: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [
        [None if x is None or y is None else x - y for x, y in zip(*rows, strict=True)]
        for rows in zip(a, b, strict=True)
    ]
