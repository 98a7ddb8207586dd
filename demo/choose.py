"""How the demo's hyper-parameters were chosen: on corruptions, scans and voices that its table does not use.

Source and adapted on the development split, clean and under speckle noise, Gaussian blur, traffic and pink noise at
severity 5, mean of three seeds. Run ``python -m demo.choose``.
"""

from __future__ import annotations

from itertools import product
from statistics import fmean

from rich.console import Console
from rich.table import Table

from demo.protocol import Run, accuracy_by_seed, recipe
from demo.source import quiet, train_source
from lightning_abpem.data.digits import Corruption

HELD_OUT = (("image", "speckle_noise"), ("image", "gaussian_blur"), ("audio", "traffic"), ("audio", "pink_noise"))
GRID = {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-3), "attention_weight": (0.1, 1.0), "k": (2, 3)}


def main() -> None:
    quiet()
    corruptions = [None, *(Corruption(modality, kind, 5) for modality, kind in HELD_OUT)]
    candidates = [None, *(dict(zip(GRID, values, strict=True)) for values in product(*GRID.values()))]
    cells = list(product(range(len(candidates)), range(len(corruptions))))
    options = [None if changes is None else recipe(**changes) for changes in candidates]
    runs = {(i, j): Run(corruptions[j], 0, options[i], split="dev") for i, j in cells}
    accuracy = accuracy_by_seed(runs, train_source(), "choosing")
    table = Table("lr", "weight", "k", "clean", *(f"{m}: {k}".replace("_", " ") for m, k in HELD_OUT), "corrupted")
    for candidate, changes in enumerate(candidates):
        names = ["source", "", ""] if changes is None else [f"{value:g}" for value in changes.values()]
        values = [fmean(accuracy[candidate, corruption]) for corruption in range(len(corruptions))]
        table.add_row(*names, *(f"{value:.1f}" for value in values), f"{fmean(values[1:]):.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
