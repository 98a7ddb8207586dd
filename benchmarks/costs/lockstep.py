"""Timing programs against each other: a process for each, taking turns batch by batch in one run.

Each program has its own process, so its peak memory is its own. They take turns, so other load on the machine slows
all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import profile, supported_activities

from lightning_abpem.processes import start_worker

__all__ = ["Measured", "Turns", "count_operations", "in_lockstep"]

_COUNT = -1  # instead of a number of batches: one, of which the operations are counted


@dataclass(frozen=True)
class Measured:
    """The measurements of one program.

    Attributes:
        seconds: per batch, a value for each round.
        peak: memory of its process, in bytes.
        operations: of one batch, as `count_operations` counts them.
    """

    seconds: list[float]
    peak: int
    operations: int

    @property
    def median(self) -> float:
        return median(self.seconds)


class Turns:
    """One program's side of the turns: an iterator with an item for each batch that the program may run.

    Attributes:
        peak: memory in bytes, read before the operations are counted.
    """

    def __init__(self, connection: Connection, device: str) -> None:
        self._connection, self._device = connection, device
        self._left, self._start = 0, 0.0
        self._profiler: profile | None = None
        self.peak = 0

    def take(self) -> bool:
        """Wait for the program's turn, if its last one is over; return False after the last batch of all."""
        if self._left == 0:
            self._connection.send(self._measured())
            self._left = self._connection.recv()
            if self._left == _COUNT:
                self._left, self.peak = 1, _peak(self._device)
                self._profiler = profile(activities=supported_activities())
                self._profiler.start()
            self._start = time.perf_counter()
        self._left -= 1
        return self._left >= 0

    def __iter__(self) -> Iterator[None]:
        while self.take():
            yield

    def _measured(self) -> float:
        """Return the seconds of the finished turn, or its operations if they were counted."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        if self._profiler is None:
            return time.perf_counter() - self._start
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        return count_operations(profiler, self._device)


def in_lockstep(
    programs: Mapping[str, tuple[Callable[..., None], Sequence[Any]]],
    *,
    rounds: int,
    batches: int = 1,
    warmup: int | Mapping[str, int] = 1,
    device: str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Measured]:
    """Run all programs in turns, each in its own process.

    Args:
        programs: by label, a function and its arguments. It gets `Turns` before them, and runs a batch for each item.
        rounds: turns that each program has.
        batches: batches per turn; seconds are per batch.
        warmup: batches before the first round, untimed; by label where they differ.
        device: "cpu" or "cuda", for the peak memory and to wait for the device.
        progress: wraps the rounds.

    Raises:
        RuntimeError: if the process of a program ends before its turns do.
    """
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    running: dict[str, _Program] = {}
    with ExitStack() as stack:
        for label, (run, arguments) in programs.items():
            running[label] = program = _Program(label, device, run, arguments)
            stack.callback(program.stop)
            program.receive()  # built
            program.take_turn(warmup if isinstance(warmup, int) else warmup[label])
        for _ in progress(range(rounds)):
            for label, program in running.items():
                seconds[label].append(program.take_turn(batches) / batches)
        operations = {label: program.take_turn(_COUNT) for label, program in running.items()}
        peaks = {label: program.take_turn(0) for label, program in running.items()}
    return {label: Measured(seconds[label], peaks[label], operations[label]) for label in programs}


class _Program:
    """The caller's side of one program: its process, and the connection to it."""

    def __init__(self, label: str, device: str, run: Callable[..., None], arguments: Sequence[Any]) -> None:
        context = get_context("spawn")
        self._label = label
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, device, run, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that a program that fails ends the run

    def take_turn(self, batches: int) -> Any:
        """Let the program run so many batches; return its seconds, with `_COUNT` its operations, with 0 its peak."""
        self._connection.send(batches)
        return self.receive()

    def receive(self) -> Any:
        """Wait for what the program sends.

        Raises:
            RuntimeError: its process ended.
        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise RuntimeError(
                f"The process of the program {self._label!r} ended early, with exit code {self._process.exitcode}. "
                "Minus 9 is what the system gives where memory runs out: run fewer programs at once."
            ) from error

    def stop(self) -> None:
        """End the process and the connection."""
        self._process.terminate()
        self._process.join()
        self._connection.close()


def _work(connection: Connection, device: str, run: Callable[..., None], arguments: Sequence[Any]) -> None:
    start_worker()
    turns = Turns(connection, device)
    run(turns, *arguments)
    connection.send(turns.peak)


def count_operations(profiler: profile, device: str) -> int:
    """Return the number of kernels launched on a GPU, or on a CPU of torch operators that call no other."""
    if device == "cuda":
        launches = ("cudaLaunchKernel", "cuLaunchKernel")
        return sum(event.count for event in profiler.key_averages() if event.key.startswith(launches))
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in profiler.events())


def _peak(device: str) -> int:
    """Return the peak memory in bytes: the GPU's, or on a CPU this process's (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
