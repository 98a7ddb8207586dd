"""Timed rows of `benchmarks.costs.gpu`: time, memory, kernels and host waits of one program in one setting."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import profile, supported_activities

from benchmarks.costs.lockstep import count_operations
from benchmarks.costs.programs import FusionAlone, Inputs, by_hand, published_way
from benchmarks.costs.step_cost import SHAPES, Setting, loop, trainer, written
from lightning_abpem.models import CAVMAE
from lightning_abpem.models.digits import DigitsModel

__all__ = [
    "PRECISIONS",
    "Machine",
    "NeedsGPUError",
    "Row",
    "Steps",
    "Workload",
    "counted_waits",
    "measure",
    "start_fresh",
]

PRECISIONS = {"float32": "32-true", "float32, TF32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}
"""Names of the rows' precisions, and what the Trainer calls them."""

DEFAULTS = {"k": "auto", "attention_weight": "auto", "balance": "stream"}
WIDTH = 256
_HERE = str(Path(__file__).parents[2])


class NeedsGPUError(Exception):
    """Raised by a measurement that makes no sense on a CPU."""


@dataclass(frozen=True)
class Machine:
    """The device, "cuda" or "cpu", and whether everything is tiny, as in a dry run."""

    device: str
    tiny: bool = False


@dataclass(frozen=True)
class Row:
    """One program in one setting.

    Args:
        program: a key of `_PROGRAMS`.
        precision: a key of `PRECISIONS`.
        batch: samples per batch; a dry run takes fewer, and fewer tokens.
        memory: batches that the loss sees; 0 for plain inference.
        compiled: whether the encoders' blocks are compiled.
        model: "cavmae", "digits", or "fusion": one block alone.
        tokens: joint tokens of "fusion".
    """

    program: str
    precision: str
    batch: int
    memory: int = 0
    compiled: bool = False
    model: str = "cavmae"
    tokens: int = 0

    @property
    def name(self) -> str:
        """All of its settings in words."""
        memory = f", memory {self.memory}" if self.memory else ""
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        compiled = ", compiled" if self.compiled else ""
        return f"{self.program}{memory}: {self.model}{tokens}, batch {self.batch}, {self.precision}{compiled}"

    @property
    def plain(self) -> Row:
        """The row of plain inference that this one is held against."""
        program = "plain Trainer" if self.program.endswith("Trainer") else "plain loop"
        return Row(program, self.precision, self.batch, 0, self.compiled, self.model, self.tokens)


@dataclass(frozen=True)
class Workload(Setting):
    """A setting whose model and batches are made on the device."""

    tokens: int = 0
    tiny: bool = False

    def build(self) -> Any:
        torch.manual_seed(0)
        with torch.device(self.accelerator):
            model = self._model().to(self.accelerator)  # which tells a LightningModule where it is
        if self.compiled:
            torch.compiler.reset()  # what earlier rows compiled counts against the limit of recompilations
            for block in (*model.blocks_a, *model.blocks_v):
                block.compile(backend="eager" if self.tiny else "inductor")
        return model.eval()

    def _model(self) -> Any:
        if self.model == "cavmae":
            return CAVMAE(50, 8, 1, 1) if self.tiny else CAVMAE(50)
        return DigitsModel() if self.model == "digits" else FusionAlone(self.tokens, WIDTH)

    def batches(self) -> list[Inputs]:
        generator = torch.Generator(self.accelerator).manual_seed(1)
        alone = (self.tokens // 2, WIDTH)
        shapes = SHAPES.get(self.model, (alone, alone))

        def batch() -> Any:
            return tuple(
                torch.randn(self.batch_size, *shape, generator=generator, device=self.accelerator) for shape in shapes
            )

        return [batch() for _ in range(4)]


_PROGRAMS: dict[str, Callable[..., None]] = {
    "plain loop": lambda steps, work, memory: loop(steps, work, None, {}),
    "plain Trainer": lambda steps, work, memory: trainer(steps, work, None),
    "ABPEM attached": lambda steps, work, memory: loop(steps, work, memory, {}),
    "ABPEM in a Trainer": trainer,
    "defaults attached": lambda steps, work, memory: loop(steps, work, memory, DEFAULTS),
    "by hand": lambda steps, work, memory: written(steps, work, by_hand, memory),
    "published way": lambda steps, work, memory: written(steps, work, published_way, memory),
}


def measure(row: Row, machine: Machine) -> dict[str, Any]:
    """Return the figures of a row; an exception says why there are none."""
    steps = Steps(machine.device, 1, 1) if machine.tiny else Steps(machine.device, 3 + row.memory, 20)
    batch, tokens = (row.batch // 64 + 2, row.tokens // 128) if machine.tiny else (row.batch, row.tokens)
    settled = PRECISIONS[row.precision], row.compiled, torch.get_num_threads()
    work = Workload(row.model, batch, machine.device, *settled, tokens=tokens, tiny=machine.tiny)
    held = torch.cuda.memory_allocated() if machine.device == "cuda" else 0  # by whatever came before
    with _tf32(row.precision.endswith("TF32")):
        _PROGRAMS[row.program](steps, work, row.memory)
    figures = steps.figures()
    return figures | {"peak": None if figures["peak"] is None else figures["peak"] - held}


class Steps:
    """The steps of a program, one for each item: untimed, timed, profiled, and one whose host waits are counted.

    A Trainer fetches each batch one step early. Between two fetches there is still exactly one step.
    """

    def __init__(self, device: str, warmup: int, timed: int, most_seconds: float = 2.0) -> None:
        self._device, self._warmup, self._timed, self._most_seconds = device, warmup, timed, most_seconds
        self._marks: list[Any] = []
        self._peak: int | None = None
        self._operations = 0
        self._waits: Counter[str] | None = None

    def __iter__(self) -> Iterator[None]:
        for _ in range(self._warmup):
            yield
        _reset_peak(self._device)
        self._marks = [self._mark()]
        begin = time.perf_counter()
        while len(self._marks) <= self._timed and (len(self._marks) <= 5 or _since(begin) < self._most_seconds):
            yield
            self._marks.append(self._mark())
        self._peak = _peak(self._device)
        with profile(activities=supported_activities()) as profiler:
            yield
        self._operations = count_operations(profiler, self._device)
        with counted_waits(self._device) as waits:
            yield
        self._waits = waits

    def figures(self) -> dict[str, Any]:
        """Return seconds per batch, peak memory in bytes, operations, and host waits by the line they come from."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        on_gpu = self._device == "cuda"
        seconds = [start.elapsed_time(end) / 1e3 if on_gpu else end - start for start, end in pairs]
        waits = self._waits
        return {
            "seconds": median(seconds),
            "steps": len(seconds),
            "spread": [min(seconds), max(seconds)],
            "peak": self._peak,
            "operations": self._operations,
            "waits": None if waits is None else sum(waits.values()),
            "waits_from": dict(waits or {}),
        }

    def _mark(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def counted_waits(device: str) -> Iterator[Counter[str] | None]:
    """Count the times that the host waits for the GPU, by the line of code; None on a CPU.

    Torch warns of synchronising operations. Waits for an event that has not happened yet are counted here.
    """
    if device != "cuda":
        yield None
        return
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[_caller()] += 1

    def synchronize(event: Any) -> None:
        if not event.query():
            places[_caller()] += 1
        wait(event)

    wait = torch.cuda.Event.synchronize
    with warnings.catch_warnings(), patch.object(torch.cuda.Event, "synchronize", synchronize):
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _caller() -> str:
    """Return the innermost line on the stack outside torch and this file, with its function."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not any(f"/{name}" in frame.filename for name in ("torch/", "warnings.py")):
            return f"{frame.filename.removeprefix(_HERE + '/')}:{frame.lineno} {frame.name}"
    return "unknown"


def start_fresh(device: str) -> None:
    """Free the GPU memory that earlier rows left allocated."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


@contextmanager
def _tf32(is_on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.backends.cudnn.allow_tf32 = is_on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def _peak(device: str) -> int | None:
    """The most memory since the last reset, in bytes; None on a CPU that is not Linux's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return None


def _since(begin: float) -> float:
    return time.perf_counter() - begin
