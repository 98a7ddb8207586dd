"""How the demo's hyper-parameters were chosen: on corruptions, scans and voices that its table does not use.

Source and adapted on the development split, speckle noise, Gaussian blur, traffic and pink noise at severity 5, and
clean, one seed. Run ``python -m demo.choose``.
"""

from __future__ import annotations

from itertools import product
from statistics import fmean

from rich.console import Console
from rich.table import Table

from demo.protocol import Run, evaluate_all, quiet, recipe, train_source
from lightning_abpem.data.digits import Corruption

HELD_OUT = (("image", "speckle_noise"), ("image", "gaussian_blur"), ("audio", "traffic"), ("audio", "pink_noise"))
GRID = {"learning_rate": (1e-4, 1e-3, 3e-3, 1e-2), "attention_weight": (0.1, 1.0), "k": (2, 3)}


def main() -> None:
    quiet()
    corruptions = [None, *(Corruption(modality, kind, 5) for modality, kind in HELD_OUT)]
    candidates = [None, *(dict(zip(GRID, values, strict=True)) for values in product(*GRID.values()))]
    runs = [
        Run(corruption, 0, None if changes is None else recipe(**changes), split="dev")
        for changes in candidates
        for corruption in corruptions
    ]
    rows = evaluate_all(runs, train_source(), "choosing")
    table = Table(*GRID, "clean", *(f"{m}: {k}".replace("_", " ") for m, k in HELD_OUT), "mean of the corrupted")
    for number, changes in enumerate(candidates):
        accuracy = [row["accuracy"] for row in rows[number * len(corruptions) : (number + 1) * len(corruptions)]]
        options = ["source", "", ""] if changes is None else [f"{value:g}" for value in changes.values()]
        table.add_row(*options, *(f"{value:.1f}" for value in accuracy), f"{fmean(accuracy[1:]):.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
