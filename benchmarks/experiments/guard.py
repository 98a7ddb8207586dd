"""Accuracy that a guard and an anchor save where adapting does harm, and cost where it helps.

    python -m benchmarks.experiments.guard [--split dev|test] [--sources ...] [--rates ...] [--policies ...] [--long]

Digits seen and heard, batches of 8. A source model adapts to 80 batches of a stream, then to 40 clean ones. Helpful
streams are clean data and corruptions of one sensor at severity 5; hostile ones teach nothing. With --long there is one
stream of 20,016 samples: each of the others for 70 batches, with 69 clean ones before it. It prints a line for
each run, and a table. That has the accuracy against the source's, on the streams and on the clean data after them, and
in how many runs the guard acted. A run is harmed if it lost more than 2 points on its stream, or more than 1
afterwards.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lightning_abpem import ABPEM
from lightning_abpem.bench.digits_source import train_digits_model
from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.data.digits import DigitsPairs, Split
from lightning_abpem.methods.abpem import GUARDED
from lightning_abpem.models.digits import DigitsModel
from lightning_abpem.processes import Workers

SOURCES: dict[str, dict[str, int]] = {
    "width 32": {"width": 32},
    "width 64": {},
    "width 128": {"width": 128, "depth": 4},
    "width 192": {"width": 192},
}
BOUNDS = {name: GUARDED[name] for name in ("max_step", "max_drift", "anchor")}
AT_ANY_RATE = {name: value for name, value in GUARDED.items() if name != "learning_rate"}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "warn": {"monitor": "source", "guard": "warn"},
    "warn, every 4th": {"monitor": 4, "guard": "warn"},
    "warn, every 8th": {"monitor": 8, "guard": "warn"},
    "anchor": {"anchor": 0.01},
    "reset": {"monitor": "source", "guard": "reset"},
    "rollback": {"monitor": "source", "guard": "rollback"},
    "rollback, anchor": {"monitor": "source", "guard": "rollback", "anchor": 0.01},
    "rollback, every 4th": {"monitor": 4, "guard": "rollback", "anchor": 0.01},
    "bounds": BOUNDS,
    "guarded": AT_ANY_RATE,
    "guarded, every 8th": AT_ANY_RATE | {"monitor": 8},
}
KINDS: dict[Split, dict[str, tuple[str, ...]]] = {
    "dev": {
        "image": ("fog", "elastic_transform", "gaussian_noise", "contrast", "pixelate"),
        "audio": ("gaussian_noise", "traffic", "rain"),
    },
    "test": {
        "image": ("frost", "motion_blur", "shot_noise", "brightness", "snow"),
        "audio": ("crowd", "thunder", "wind"),
    },
}
BATCH, CLEAN = 8, 40

Batch = tuple[Tensor, Tensor, Tensor]


class Outcome(NamedTuple):
    """One run: accuracies in percent, of the source and of the adapted model, and how often the guard acted."""

    source: str
    stream: str
    rate: float
    policy: str
    plain: tuple[float, float]
    adapted: tuple[float, float]
    events: int

    @property
    def gains(self) -> tuple[float, float]:
        """Accuracy over the source's, in points: on the stream, and on the clean data after it."""
        return self.adapted[0] - self.plain[0], self.adapted[1] - self.plain[1]

    @property
    def is_harmed(self) -> bool:
        """True if adapting lost more than 2 points on the stream, or more than 1 on the clean data after it."""
        return self.gains[0] < -2 or self.gains[1] < -1


def streams(split: Split) -> dict[str, list[Batch]]:
    """Streams by name: those that help, then the hostile ones, whose names begin with a mark."""
    pairs, rng = DigitsPairs(split, 640), np.random.default_rng(0)
    labels, count = torch.as_tensor(pairs.labels), 640
    audio, image = pairs.audio(None), pairs.images(None)
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate((audio, image))]
    zeros = torch.zeros_like(audio), torch.zeros_like(image)

    def drawn() -> Tensor:
        return torch.as_tensor(rng.permutation(count))

    def batches(sounds: Tensor, images: Tensor, order: Tensor) -> list[Batch]:
        every = zip(sounds[order].split(BATCH), images[order].split(BATCH), labels[order].split(BATCH), strict=True)
        return list(every)

    made = {"clean": batches(audio, image, drawn())}
    for kind in KINDS[split]["image"]:
        made[kind] = batches(audio, pairs.images(Corruption("image", kind, 5)), drawn())
    for kind in KINDS[split]["audio"]:
        made[f"{kind} (audio)"] = batches(pairs.audio(Corruption("audio", kind, 5)), image, drawn())
    threes = torch.nonzero(labels == 3).flatten()
    one = threes[torch.as_tensor(rng.integers(0, len(threes), count))]
    by_label = labels.argsort(stable=True)
    first = torch.zeros(count, dtype=torch.long)
    loud = batches(50 * audio, 50 * image, drawn())
    hostile = {
        "one class": batches(audio, image, one),
        "a frozen frame": batches(audio, image, first),
        "noise": batches(noise[0], noise[1], drawn()),
        "zeros": batches(*zeros, drawn()),
        "labels sorted": batches(audio, image, by_label),
        "labels sorted, fog": batches(audio, pairs.images(Corruption("image", "fog", 5)), by_label),
        "pairs that do not belong together": batches(audio, image[drawn()], drawn()),
        "50 times too loud": loud,
        "no sound": batches(zeros[0], image, drawn()),
    }
    hostile["noise and one class in turns"] = [
        pair[i % 2] for i, pair in enumerate(zip(hostile["noise"], hostile["one class"], strict=True))
    ]
    return made | {f"! {name}": own for name, own in hostile.items()}


def long_stream(split: Split) -> dict[str, list[Batch]]:
    """One stream of 2,502 batches in which the faults of the others come and go; and the clean one."""
    made = streams(split)
    clean = made["clean"]
    parts = [clean[:69] + own[:70] for name, own in made.items() if name != "clean"]
    return {"! all in turns": [batch for part in parts for batch in part], "clean": clean}


def _accuracy(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    hits = [(model(*inputs).argmax(-1) == labels).float().mean() for *inputs, labels in batches]
    return 100 * torch.stack(hits).mean().item()


STREAMS: dict[str, list[Batch]] = {}  # of a worker


def start_worker(split: Split, make: Callable[[Split], dict[str, list[Batch]]]) -> None:
    """Make the streams of a process that runs on them."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    STREAMS.update(make(split))


def names_of_streams() -> list[str]:
    return list(STREAMS)


def source_model(source: str) -> DigitsModel:
    """Return a trained source model in eval mode."""
    path = train_digits_model(**SOURCES[source])
    return DigitsModel.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


@torch.no_grad()
def _run(source: str, stream: str, rates: Sequence[float], policies: Sequence[str]) -> list[Outcome]:
    model = source_model(source)
    parts = STREAMS[stream], STREAMS["clean"][:CLEAN]
    plain = _accuracy(model, parts[0]), _accuracy(model, parts[1])
    outcomes = []
    for rate in rates:
        for policy in policies:
            own = copy.deepcopy(model)
            callback = ABPEM("fusion.self_attn", learning_rate=rate, **POLICIES[policy])
            with callback.attach(own):
                adapted = _accuracy(own, parts[0]), _accuracy(own, parts[1])
            outcomes.append(Outcome(source, stream, rate, policy, plain, adapted, len(callback.events)))
    return outcomes


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    columns = ["rate", "policy", "clean: worst", "helpful: mean", "worst", "clean after"]
    columns += ["hostile: mean", "worst", "clean after", "worst"]
    columns += ["alarms where helpful", "harmed runs with an alarm", "other runs with one"]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for rate in dict.fromkeys(own.rate for own in outcomes):
        for policy in dict.fromkeys(own.policy for own in outcomes):
            chosen = [own for own in outcomes if (own.rate, own.policy) == (rate, policy)]
            hostile = np.array([own.gains for own in chosen if own.stream.startswith("!")])
            helpful = np.array([own.gains for own in chosen if not own.stream.startswith("!")] or [(math.nan,) * 2])
            clean = min((own.gains[0] for own in chosen if own.stream == "clean"), default=math.nan)
            cells = [clean, helpful[:, 0].mean(), helpful[:, 0].min(), helpful[:, 1].mean()]
            cells += [hostile[:, 0].mean(), hostile[:, 0].min(), hostile[:, 1].mean(), hostile[:, 1].min()]
            shown = [f"{cell:+.1f}" for cell in cells]
            for part in (
                [own for own in chosen if not own.stream.startswith("!")],
                [own for own in chosen if own.is_harmed],
                [own for own in chosen if not own.is_harmed],
            ):
                shown.append(f"{sum(own.events > 0 for own in part)} of {len(part)}")
            yield f"| {rate:g} | {policy} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="dev is what constants were chosen on")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--long", action="store_true", help="the stream of 20,016 samples alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/guard.md"))
    options = parser.parse_args()
    for source in options.sources:
        train_digits_model(**SOURCES[source])
    say = partial(Console().print, soft_wrap=True, highlight=False, markup=False)
    outcomes: list[Outcome] = []
    pool = Workers(options.workers, start_worker, options.split, long_stream if options.long else streams)
    try:
        names = [own for own in pool.submit(names_of_streams).result() if own.startswith("!") or not options.long]
        jobs = [
            pool.submit(_run, source, name, options.rates, options.policies)
            for source in options.sources
            for name in names
        ]
        for job in as_completed(jobs):
            outcomes += job.result()
            for own in job.result():
                scores = " -> ".join(f"{stream:.1f} and {clean:.1f}" for stream, clean in (own.plain, own.adapted))
                run = f"{own.source}, {own.stream}, {own.rate:g}, {own.policy}"
                say(f"{run}: {scores}, {own.events} events")
    finally:
        pool.shutdown(cancel_futures=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(_table(outcomes)) + "\n")
    say(options.out.read_text())


if __name__ == "__main__":
    main()
