"""Costs of several processes: time and bytes exchanged per step, and an estimate on paper for many GPUs.

    python -m benchmarks.costs.scaling [--rounds 7] [--memory 1] [--out FOLDER]
    python -m benchmarks.costs.scaling --paper [--step SECONDS] [--bandwidth GB/S] [--latency SECONDS]

Processes are gloo's, on one machine, with one thread each. `make costs` runs both for docs/distributed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.costs.lockstep import Measured, Turns, in_lockstep
from benchmarks.costs.programs import engine
from benchmarks.costs.step_cost import Setting
from lightning_abpem.demo.trainer import quiet
from lightning_abpem.processes import start_worker

CASES = {
    "1 process, batch 4": (1, 4),
    "2 processes, 2 each": (2, 2),
    "1 process, batch 8": (1, 8),
    "2 processes, 4 each": (2, 4),
}
GRADIENT_BYTES = 4 * (3 * 768 * 768 + 3 * 768)
ROW_BYTES = 4 * (50 + 6 * 2)


def adapt(turns: Turns | None, size: int, rank: int, local: int, memory: int, port: int, counted: str) -> None:
    """One process of several: rank 0 takes the turns, the others follow it batch by batch."""
    quiet()
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=size)
    setting = Setting("cavmae", local, "cpu", "32-true", compiled=False, threads=1)
    model, batches = setting.build(), setting.batches()
    with torch.no_grad(), engine(model, memory).attach(model), _counted_bytes() as exchanged:
        for i, _ in enumerate(_together(turns, size)):
            exchanged.clear()
            model(*batches[i % len(batches)])
            if rank == 0:
                Path(counted).write_text(str(sum(exchanged)))


def _together(turns: Turns | None, size: int) -> Iterator[None]:
    """Yield rank 0's turns in every process, so that all run the same batches."""
    if size == 1 and turns is not None:
        yield from turns
        return
    goes_on = torch.ones(1)
    while goes_on:
        if turns is not None:
            goes_on.fill_(turns.take())
        dist.broadcast(goes_on, 0)
        if goes_on:
            yield


def follow(*arguments: Any) -> None:
    start_worker()
    adapt(None, *arguments)


@contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Yield a list that gets the bytes of each tensor this process puts into a collective."""
    sizes: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(everybody: list[Tensor], own: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(own.nbytes)
        return gather(everybody, own, *args, **kwargs)

    def all_reduce(own: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(own.nbytes)
        return reduce(own, *args, **kwargs)

    with patch.object(dist, "all_gather", all_gather), patch.object(dist, "all_reduce", all_reduce):
        yield sizes


def measure(rounds: int, memory: int, folder: Path) -> tuple[dict[str, Measured], dict[str, int]]:
    """Measure all cases in turns; return the times, and the bytes exchanged in a step, by case."""
    context = get_context("spawn")
    programs, followers = {}, []
    for label, (size, local) in CASES.items():
        arguments = (local, memory, _free_port(), str(folder / f"bytes-{size}x{local}"))
        programs[label] = (adapt, (size, 0, *arguments))
        followers += [context.Process(target=follow, args=(size, r, *arguments), daemon=True) for r in range(1, size)]
    for follower in followers:
        follower.start()
    try:
        measured = in_lockstep(
            programs, rounds=rounds, warmup=1 + memory, progress=lambda turns: track(turns, "rounds", transient=True)
        )
        for follower in followers:
            follower.join()
    finally:
        for follower in followers:
            follower.terminate()
    exchanged = {label: int((folder / f"bytes-{n}x{b}").read_text()) for label, (n, b) in CASES.items()}
    return measured, exchanged


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def as_table(measured: dict[str, Measured], exchanged: dict[str, int]) -> str:
    lines = [
        "| program | ms per batch | samples per second | exchanged per step and process, MB |",
        "|---|---|---|---|",
    ]
    for label, (size, local) in CASES.items():
        seconds = measured[label].median
        lines.append(f"| {label} | {1e3 * seconds:.0f} | {size * local / seconds:.2f} | {exchanged[label] / 1e6:.2f} |")
    return "\n".join(lines)


def exchange_seconds(gpus: int, local: int, memory: int, bandwidth: float, latency: float) -> float:
    """Estimate the seconds of a step's exchanges by rings of GPUs that send and receive at `bandwidth` bytes/s.

    A header and the rows of all samples are gathered, and the gradients are summed. Each hop of a message takes
    `latency` seconds. A ring has a hop for each GPU; for short messages the fewer hops of a tree are taken.
    """
    share = (gpus - 1) / gpus
    rows = gpus * local * memory * ROW_BYTES
    short, hops = math.log2(gpus) * latency, (gpus - 1) * latency
    gather = share * rows / bandwidth + min(hops, short + rows / bandwidth)
    reduce = 2 * share * GRADIENT_BYTES / bandwidth + 2 * short
    return short + gather + reduce


def paper(
    step: float, bandwidth: float, latency: float, local: int = 32, counts: Sequence[int] = (8, 32, 128, 512)
) -> str:
    """Return a table of the exchanges' time and share of a step, for GPUs whose own step takes `step` seconds."""
    lines = [
        "| GPUs | memory 1: exchange, ms | share of a step | memory 4: exchange, ms | share of a step |",
        "|---" * 5 + "|",
    ]
    for gpus in counts:
        times = [exchange_seconds(gpus, local, memory, bandwidth, latency) for memory in (1, 4)]
        cells = " | ".join(f"{1e3 * t:.2f} | {t / (t + step):.1%}" for t in times)
        lines.append(f"| {gpus} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--paper", action="store_true", help="print the model on paper instead")
    parser.add_argument("--step", type=float, default=0.1, help="seconds of a step without exchange, for --paper")
    parser.add_argument("--bandwidth", type=float, default=20.0, help="GB/s to and from each GPU, for --paper")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds from GPU to GPU, for --paper")
    args = parser.parse_args()
    if args.paper:
        Console().print(paper(args.step, args.bandwidth * 1e9, args.latency), soft_wrap=True)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    measured, exchanged = measure(args.rounds, args.memory, args.out)
    table = as_table(measured, exchanged)
    (args.out / "table.md").write_text(table + "\n")
    seconds = {label: own.seconds for label, own in measured.items()}
    (args.out / "numbers.json").write_text(json.dumps({"seconds": seconds, "bytes": exchanged}, indent=1))
    Console().print(table, soft_wrap=True)


if __name__ == "__main__":
    main()
