"""``abpem demo``: digits seen and heard, their sensors corrupted; the source and the adapted model side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_abpem.demo.protocol import RECIPE
from lightning_abpem.demo.run import run_demo
from lightning_abpem.demo.trainer import OUTPUT

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The learning rate, and where the results go."""
    parser.add_argument("--learning-rate", type=float, default=RECIPE["learning_rate"], help="of ABPEM; %(default)g")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of the table and the figure; %(default)s")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Train the model, or take it from the cache, and test it under every corruption."""
    if rest:
        raise ValueError(f"Expected no arguments but those of --help, but got {' '.join(rest)}.")
    if not options.learning_rate > 0:
        raise ValueError(f"Expected `--learning-rate` to be a number > 0, but got {options.learning_rate:g}.")
    run_demo(options.learning_rate, options.out)
