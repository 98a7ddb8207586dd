"""``abpem report``: the page of a run, from its record, or of a benchmark's run, from its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lightning_abpem.display import literal
from lightning_abpem.report.bench_page import bench_page
from lightning_abpem.report.charts import check_matplotlib
from lightning_abpem.report.page import run_page
from lightning_abpem.report.record import check_writable, read_record, write_text

__all__ = ["add_arguments", "run"]

_EPILOG = """examples:
  abpem report report.json -o report.html        the record that ABPEM(report="report.html") wrote
  abpem report runs/today -o today.html          the same, report.json in a folder
  abpem report runs/iid -o iid.html              what `abpem bench --out runs/iid` wrote
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the page."""
    parser.epilog = _EPILOG
    parser.add_argument("run", type=Path, metavar="RUN", help="a record, or the folder of a run")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the page to write")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Write the page."""
    if rest:
        raise ValueError(f"Expected a run and -o FILE alone, but got {' '.join(rest)} too.")
    check_matplotlib()
    check_writable(options.out)
    write_text(options.out, _page(options.run))
    Console().print(literal(f"Report: {options.out}"))


def _page(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"Expected a record or the folder of a run, but there is no '{path}'.")
    if not path.is_dir():
        return run_page(read_record(path))
    if (path / "results.csv").is_file():
        from lightning_abpem.bench.output import read_lines  # which needs scipy

        return bench_page(path.resolve().name, read_lines(path))
    if (path / "report.json").is_file():
        return run_page(read_record(path / "report.json"))
    raise ValueError(
        f"Expected '{path}' to hold report.json, which a run with `report` leaves, or results.csv, which "
        "`abpem bench` leaves, but it has neither."
    )
