"""A test of several learning rates side by side against each rate alone, on streams that have labels.

    python -m benchmarks.experiments.rates [--split dev|test] [--sources NAME ...] [--rates auto|RATE ...]

Digits seen and heard, batches of 8. The streams are those of `benchmarks.experiments.guard`: clean data and corruptions
of one sensor at severity 5, and hostile ones. Besides them: the helpful ones with their labels sorted, two in which
four corruptions come one after the other, and one in which all take turns batch by batch. Each protocol has a row for
each model: the accuracy of the whole stream for the source, for each rate alone, and for the rates side by side.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.experiments import guard
from benchmarks.experiments.guard import BATCH, SOURCES, STREAMS, Batch, names_of_streams, source_model, start_worker
from lightning_abpem import ABPEM
from lightning_abpem.bench.digits_source import train_digits_model
from lightning_abpem.data.digits import Split
from lightning_abpem.processes import Workers
from lightning_abpem.tuning import RATES

Row = tuple[str, str, list[float]]
SEGMENT, TURNS = 40, 14  # batches of each corruption, where they come one after the other, and where they take turns


def streams(split: Split) -> dict[str, list[Batch]]:
    """Streams by protocol and name."""
    made, rng = guard.streams(split), np.random.default_rng(7)
    helpful = {name: own for name, own in made.items() if not name.startswith("!")}
    found = {f"shuffled: {name}": own for name, own in helpful.items()}
    corrupted = [own for name, own in helpful.items() if name != "clean"]
    for name, own in helpful.items():
        whole = [torch.cat(column) for column in zip(*own, strict=True)]
        order = whole[2].argsort(stable=True)
        found[f"sorted: {name}"] = list(zip(*(x[order].split(BATCH) for x in whole), strict=True))
    for i in range(2):
        chosen = [corrupted[j] for j in rng.permutation(len(corrupted))[:4]]
        found[f"continual: {i}"] = [batch for own in chosen for batch in own[:SEGMENT]]
    found["in turns: all"] = [batch for own in zip(*(x[:TURNS] for x in corrupted), strict=True) for batch in own]
    return found | {f"{name}: hostile": own for name, own in made.items() if name.startswith("!")}


@torch.no_grad()
def _run(source: str, stream: str, rates: Any) -> Row:
    model = source_model(source)

    def accuracy(own: torch.nn.Module) -> float:
        hits = [(own(*inputs).argmax(-1) == labels).float().mean() for *inputs, labels in STREAMS[stream]]
        return 100 * torch.stack(hits).mean().item()

    found = [accuracy(model)]
    for rate in (*RATES, rates):
        own = copy.deepcopy(model)
        with ABPEM("fusion.self_attn", learning_rate=rate, monitor="off", guard="off").attach(own):
            found.append(accuracy(own))
    return source, stream, found


def _table(rows: Sequence[Row]) -> Iterator[str]:
    names = ["source", *(f"{rate:g}" for rate in RATES), "side by side", "best rate of the row"]
    yield f"| protocol | model | {' | '.join(names)} |"
    yield "|" + "---|" * (len(names) + 2)
    protocols = dict.fromkeys(stream.partition(":")[0] for _, stream, _ in rows)
    models = dict.fromkeys(source for source, *_ in rows)
    for protocol in protocols:
        for model in (*models, "all"):
            own = [x for source, stream, x in rows if stream.startswith(f"{protocol}:") and model in (source, "all")]
            cells = torch.tensor(own).mean(0).tolist()
            yield f"| {protocol} | {model} | {' | '.join(f'{x:.1f}' for x in (*cells, max(cells[1:-1])))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="dev is what constants were chosen on")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rates", nargs="+", default=["auto"], help="side by side; %(default)s")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/rates.md"))
    options = parser.parse_args()
    for source in options.sources:
        train_digits_model(**SOURCES[source])
    rates = "auto" if options.rates == ["auto"] else [float(rate) for rate in options.rates]
    say = partial(Console().print, soft_wrap=True, highlight=False, markup=False)
    rows: list[Row] = []
    pool = Workers(options.workers, start_worker, options.split, streams)
    try:
        names = pool.submit(names_of_streams).result()
        jobs = [pool.submit(_run, source, name, rates) for source in options.sources for name in names]
        for job in as_completed(jobs):
            rows.append(job.result())
            source, stream, found = rows[-1]
            say(f"{source}, {stream}: {' '.join(f'{x:.1f}' for x in found)}")
    finally:
        pool.shutdown(cancel_futures=True)
    rows.sort(key=lambda row: (options.sources.index(row[0]), names.index(row[1])))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(_table(rows)) + "\n")
    say(options.out.read_text())


if __name__ == "__main__":
    main()
