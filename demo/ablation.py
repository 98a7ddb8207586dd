"""What each part of the loss does: at batch 4, 8 and 32, in shuffled and in label-sorted order.

Mean accuracy over four corruptions at severity 5, and on clean data, three seeds each. Run ``make ablation``.
"""

from __future__ import annotations

from itertools import product
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.protocol import Run, accuracy_by_seed, recipe
from demo.source import quiet, train_source
from lightning_abpem.data.digits import Corruption

CORRUPTIONS = (
    *(Corruption("image", kind, 5) for kind in ("gaussian_noise", "fog")),
    *(Corruption("audio", kind, 5) for kind in ("gaussian_noise", "crowd")),
)
PARTS: dict[str, dict[str, Any]] = {
    "principal entropy": {"attention_weight": 0.0, "balance_weight": 0.0},
    "+ bootstrapping": {"balance_weight": 0.0},
    "+ balance": {"attention_weight": 0.0},
    "+ both (ABPEM)": {},
}
MEMORY_SAMPLES = 32


def main() -> None:
    quiet()
    cells = list(product((False, True), (4, 8, 32), ("source", *PARTS), (None, *CORRUPTIONS)))
    runs = {}
    for cell in cells:
        sorted_by_label, batch_size, parts, corruption = cell
        changes = {"memory_batches": MEMORY_SAMPLES // batch_size, **PARTS.get(parts, {})}
        options = None if parts == "source" else recipe(**changes)
        runs[cell] = Run(corruption, 0, options, batch_size=batch_size, sorted_by_label=sorted_by_label)
    accuracy = accuracy_by_seed(runs, train_source(), "ablation")
    table = Table("order", "batch", "data", "source", *PARTS)
    for sorted_by_label, batch_size, data in product((False, True), (4, 8, 32), ((None,), CORRUPTIONS)):
        values = []
        for parts in ("source", *PARTS):
            per_seed = [accuracy[sorted_by_label, batch_size, parts, corruption] for corruption in data]
            means = [fmean(seed) for seed in zip(*per_seed, strict=True)]
            values.append(f"{fmean(means):.1f} ± {stdev(means):.1f}")
        order = "sorted by label" if sorted_by_label else "shuffled"
        table.add_row(order, str(batch_size), "clean" if data == (None,) else "corrupted", *values)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
