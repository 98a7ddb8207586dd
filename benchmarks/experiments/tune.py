"""A test of the learning rate that `tune` picks without labels, on streams that have labels.

    python -m benchmarks.experiments.tune [--split dev|test] [--sources NAME ...] [--batches N ...]

Digits seen and heard, 80 batches of 8. The streams are those of `benchmarks.experiments.guard`, clean data and
corruptions of one sensor at severity 5, and four that are no place to tune. Accuracy is of the whole stream. Each
stream has a row: the source, each rate for the whole stream, the rates picked on all batches and on the first ones.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.experiments.guard import SOURCES, streams
from lightning_abpem import ABPEM
from lightning_abpem.bench.digits_source import train_digits_model
from lightning_abpem.data.digits import Split
from lightning_abpem.models.digits import DigitsModel
from lightning_abpem.tuning import RATES, Tuning

HOSTILE = ("! labels sorted", "! labels sorted, fog", "! one class", "! a frozen frame")
DEFAULT = 1e-4  # of the callback

Row = tuple[str, str, list[float], float, list[float]]


def _percent(found: Tuning, rate: float | None) -> float:
    [row] = [row for row in found.rows if row.learning_rate == rate]
    return 100 * (row.accuracy or 0)


def _run(split: Split, sources: Sequence[str], batches: Sequence[int]) -> Iterator[Row]:
    """Yield source, stream, accuracy by rate (the source's first), the best fixed rate's, and the picked ones'."""
    made = streams(split)
    chosen = [name for name in made if not name.startswith("!") or name in HOSTILE]
    for source in sources:
        model = DigitsModel.load_from_checkpoint(
            train_digits_model(**SOURCES[source]), map_location="cpu", weights_only=True
        )
        for name in chosen:
            tune = partial(
                ABPEM("fusion.self_attn").tune,
                model,
                made[name],
                forward=lambda model, batch: model(*batch[:2]),
                labels=lambda batch: batch[2],
            )
            whole = tune(batches=len(made[name]))
            picked = [whole.best.learning_rate, *(tune(batches=count).best.learning_rate for count in batches)]
            by_rate = [_percent(whole, rate) for rate in (None, *RATES)]
            yield source, name, by_rate, max(by_rate), [_percent(whole, rate) for rate in picked]


def _table(rows: Sequence[Row], batches: Sequence[int]) -> Iterator[str]:
    names = ["source", *(f"{rate:g}" for rate in RATES), "best fixed"]
    names += ["picked", *(f"picked on {count}" for count in batches)]
    yield f"| model | stream | {' | '.join(names)} |"
    yield "|" + "---|" * (len(names) + 2)
    groups = {"mean, streams that help": [row for row in rows if not row[1].startswith("!")]}
    groups |= {f"mean, {name}": [row for row in rows if row[1] == name] for name in HOSTILE}
    for source, stream, by_rate, best, picked in rows:
        yield f"| {source} | {stream} | {' | '.join(f'{x:.1f}' for x in (*by_rate, best, *picked))} |"
    for title, own in groups.items():
        cells = torch.tensor([[*by_rate, best, *picked] for _, _, by_rate, best, picked in own]).mean(0).tolist()
        yield f"| all | {title} | {' | '.join(f'{x:.1f}' for x in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="dev is what constants were chosen on")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=["width 64", "width 32"])
    parser.add_argument("--batches", nargs="*", type=int, default=[40], help="first batches to pick on, besides all")
    parser.add_argument("--out", type=Path, default=Path("runs/tune.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    say = partial(Console().print, soft_wrap=True, highlight=False, markup=False)
    rows: list[Row] = []
    for row in _run(options.split, options.sources, options.batches):
        rows.append(row)
        say(f"{row[0]}, {row[1]}: {' '.join(f'{x:.1f}' for x in (*row[2], row[3], *row[4]))}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(_table(rows, options.batches)) + "\n")
    say(options.out.read_text())


if __name__ == "__main__":
    main()
