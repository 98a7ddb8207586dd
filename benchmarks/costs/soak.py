"""Thousands of updates on batches of varying shapes: nothing grows, and no step gets slower.

    python -m benchmarks.costs.soak [--updates 50000] [--way attach|Trainer] [--processes 2]

Every so many updates it reads resident memory (Linux), live objects, open files, hooks, the longest container in the
engine, and the time of a step. `make soak` runs both ways, in one process and in two.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_abpem import ABPEM
from lightning_abpem.demo.trainer import quiet
from lightning_abpem.processes import Workers
from tests.ranks import free_port
from tests.toy import Toy

__all__ = ["Reading", "Shapes", "growth", "slower", "soak", "soak_together"]

WAYS = ("attach", "Trainer")
_RANGES = ((1, 8), (2, 12), (2, 9))
_STATM = Path("/proc/self/statm")
_FILES = Path("/proc/self/fd")
_BOUNDS: dict[str, Callable[[float], float]] = {
    "memory": lambda before: 1.02 * before,
    "objects": lambda before: 1.001 * before + 10,  # a batch more in the memory of tokens, events of the guard
    "tensors": lambda before: before + 2,
    "files": lambda before: before,
    "hooks": lambda before: before,
    "longest": lambda before: before,
}


class Reading(NamedTuple):
    """The state of a process after a number of updates.

    Args:
        updates: how many steps were taken or skipped.
        memory: resident, in MiB; 0 where the system does not tell.
        objects: that Python's garbage collector knows.
        tensors: of these.
        files: open ones; 0 where the system does not tell.
        hooks: on the model.
        longest: the number of items in the longest container that the engine keeps.
        milliseconds: of processor time for a step, the median since the reading before.
    """

    updates: int
    memory: float
    objects: int
    tensors: int
    files: int
    hooks: int
    longest: int
    milliseconds: float


class Model(Toy):
    """The toy without a memory of its outputs."""

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("largest", self(*batch).amax(1).mean(), batch_size=len(batch[0]))


class Shapes(IterableDataset[tuple[Tensor, ...]]):
    """Batches of 1 to 8 samples, 2 to 12 tokens of audio and 2 to 9 of video, drawn anew each.

    Args:
        count: how many.
        seed: of shapes and values.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            size, audio, video = (int(torch.randint(a, b + 1, (), generator=generator)) for a, b in _RANGES)
            yield tuple(torch.randn(size, tokens, 3, generator=generator) for tokens in (audio, video))


class Reader(Callback):
    """Reads the state of the process after each step that is a multiple of `every`."""

    def __init__(self, model: nn.Module, abpem: ABPEM, every: int) -> None:
        self.model, self.abpem, self.every = model, abpem, every
        self.readings: list[Reading] = []
        self._steps, self._seconds, self._last = 0, deque[float](maxlen=every), time.process_time()

    def on_test_batch_end(self, *_: Any) -> None:
        self._seconds.append(time.process_time() - self._last)
        self._steps += 1
        if self._steps % self.every == 0:
            self.readings.append(self._read())
        self._last = time.process_time()

    def _read(self) -> Reading:
        updates = self.abpem.updates + self.abpem.skipped
        gc.collect()
        memory = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if _STATM.exists() else 0.0
        files = sum(1 for _ in _FILES.iterdir()) if _FILES.exists() else 0
        live = gc.get_objects()
        tensors = sum(isinstance(x, Tensor) for x in live)
        hooks = sum(len(x) for m in self.model.modules() for name, x in vars(m).items() if name.endswith("hooks") and x)
        milliseconds = 1000 * statistics.median(self._seconds)
        objects = len(live) - len(self.readings)
        return Reading(updates, memory, objects, tensors, files, hooks, _longest(self.abpem), milliseconds)


def _longest(root: Any) -> int:
    """Return the length of the longest container that `root` leads to through the package's objects."""
    longest, seen, rest = 0, set(), [root]
    while rest:
        x = rest.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Mapping | list | tuple | set | frozenset | deque):
            longest = max(longest, len(x))
            rest += [*x.values()] if isinstance(x, Mapping) else [*x]
        elif type(x).__module__.startswith("lightning_abpem") and not isinstance(x, type):
            rest += vars(x).values() if hasattr(x, "__dict__") else ()
    return longest


def options(processes: int) -> dict[str, Any]:
    """Return options that switch on everything the callback keeps from one batch to the next."""
    spans: Any = "auto"
    if processes > 1:  # where "auto" needs a batch of every process
        spans = {
            "audio": lambda audio, video: _mask(audio, video, is_first=True),
            "video": lambda audio, video: _mask(audio, video, is_first=False),
        }
    return {"fusion": "fusion.*.attn", "modalities": spans, "monitor": "source", "guard": "rollback"}


def _mask(audio: Tensor, video: Tensor, is_first: bool) -> Tensor:
    places = torch.arange(audio.shape[1] + video.shape[1])
    return ((places < audio.shape[1]) == is_first).expand(len(audio), -1)


def soak(way: str, updates: int, every: int, processes: int = 1, rank: int = 0, memory: int = 3) -> list[Reading]:
    """Adapt to `updates` batches in this process; return a reading for every `every` of them.

    Args:
        way: "attach" or "Trainer".
        updates: batches.
        every: batches from one reading to the next.
        processes: how many take part; the process group is there.
        rank: of this one.
        memory: batches that the loss sees.
    """
    torch.manual_seed(0)
    model = Model().eval()
    abpem = ABPEM(**options(processes), memory_batches=memory)
    reader, batches = Reader(model, abpem, every), Shapes(updates, rank)
    if way == "attach":
        with torch.no_grad(), abpem.attach(model):
            for batch in batches:
                model(*batch)
                reader.on_test_batch_end()
        return reader.readings
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=5)) if processes > 1 else "auto"
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = Trainer(accelerator="cpu", devices=processes, strategy=strategy, callbacks=[abpem, reader], **off)
    trainer.test(model, DataLoader(batches, batch_size=None), verbose=False)
    return reader.readings


def soak_together(way: str, updates: int, every: int, processes: int) -> list[list[Reading]]:
    """Run `soak` in several real processes; return each one's readings."""
    port = free_port()
    with Workers(processes, _start, port, processes) as workers:
        futures = [workers.submit(_worker, way, updates, every, processes, rank, port) for rank in range(processes)]
        return [future.result() for future in futures]


def _start(port: int, processes: int) -> None:
    quiet()
    torch.set_num_threads(1)


def _worker(way: str, updates: int, every: int, processes: int, rank: int, port: int) -> list[Reading]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    if way == "attach":
        dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(minutes=5))
    try:
        return soak(way, updates, every, processes, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def growth(readings: Sequence[Reading], warm: int) -> list[str]:
    """Say what has grown since the reading after `warm` updates, except for the time of a step.

    Medians of the first and the second half of the readings are compared, since the memory of tokens varies from batch
    to batch.

    Raises:
        ValueError: if there are fewer than four readings.
    """
    settled = [reading for reading in readings if reading.updates >= warm]
    if len(settled) < 4:
        raise ValueError(f"Expected four readings or more after {warm} updates, but got {len(settled)}.")
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    grown = []
    for name, bound in _BOUNDS.items():
        before, after = (statistics.median(getattr(reading, name) for reading in half) for half in halves)
        if after > bound(before):
            grown.append(f"{name}: {before:g} to {after:g}")
    return grown


def slower(readings: Sequence[Reading]) -> list[str]:
    """Say so if steps in the last quarter of the readings take over 1.25 times as long as in the second quarter."""
    times = [reading.milliseconds for reading in readings]
    part = max(len(times) // 4, 1)
    before, after = statistics.median(times[part : 2 * part]), statistics.median(times[-part:])
    return [f"time of a step: {before:.2f} to {after:.2f} ms"] if after > 1.25 * before else []


def show(title: str, readings: list[Reading]) -> None:
    """Print the readings as a table."""
    table = Table(*Reading._fields, title=title)
    for reading in readings:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in reading))
    Console(width=120).print(table)


def main() -> int:
    """Run from the command line; return 1 if anything has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--way", choices=WAYS, default="attach")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    quiet()
    logging.getLogger("lightning_abpem").setLevel(logging.ERROR)
    every = max(args.updates // 20, 1)
    runs = soak_together(args.way, args.updates, every, args.processes)
    grown = False
    for rank, readings in enumerate(runs):
        show(f"{args.way}, process {rank} of {args.processes}", readings)
        found = growth(readings, warm=args.updates // 5) + slower(readings)
        print("; ".join(found) or "Nothing has grown.")  # noqa: T201
        grown = grown or bool(found)
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
