"""Runs of the toy benchmark, and what is in their folders."""

import csv
import json
from typing import Any

from lightning_abpem.bench.cells import Cell
from lightning_abpem.bench.command import run_benchmark
from tests.toybench import ToyBench

CELL = Cell("iid", 3, "image: fog", 111, "one", 8, "abpem")


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def run(folder, **options):
    quick: dict[str, Any] = {"methods": "source,abpem", "seeds": 2, "workers": 1}
    run_benchmark(ToyBench, options.pop("arguments", {}), out=folder, **(quick | options))


def lines(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def cells_in(folder):
    return {path.name: {**json.loads(path.read_text()), "seconds": 0} for path in (folder / "cells").iterdir()}
