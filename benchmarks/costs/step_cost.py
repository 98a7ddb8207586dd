"""Costs of adapting: time and memory per batch, against plain inference and against the published way.

    python -m benchmarks.costs.step_cost [--model cavmae|digits] [--accelerator cpu|cuda] [--precision ...] [--out ...]

`make costs` runs it for docs/performance.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.costs.lockstep import Measured, Turns, in_lockstep
from benchmarks.costs.programs import Inputs, by_hand, engine, published_way
from lightning_abpem.demo.trainer import quiet, silent_trainer
from lightning_abpem.models import CAVMAE
from lightning_abpem.models.digits import DigitsModel

SHAPES = {"cavmae": ((1024, 128), (3, 224, 224)), "digits": ((64, 32), (1, 32, 32))}
DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """The model, data and precision that all programs of a run share."""

    model: str
    batch_size: int
    accelerator: str
    precision: str
    compiled: bool
    threads: int

    def build(self) -> LightningModule:
        torch.manual_seed(0)
        model: Any = CAVMAE(50) if self.model == "cavmae" else DigitsModel()
        if self.compiled:
            encoders = (model.blocks_a, model.blocks_v) if self.model == "cavmae" else (model.audio, model.image)
            for encoder in encoders:
                for block in encoder if self.model == "cavmae" else [encoder]:
                    block.compile()
        return model.eval().to(self.accelerator)

    def batches(self) -> list[Inputs]:
        generator = torch.Generator().manual_seed(1)
        first, second = SHAPES[self.model]

        def batch() -> Inputs:
            one, other = (torch.randn(self.batch_size, *shape, generator=generator) for shape in (first, second))
            return one.to(self.accelerator), other.to(self.accelerator)

        return [batch() for _ in range(8)]

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.accelerator, dtype)


class _Stream(IterableDataset[Any]):
    """A data set for a Trainer's run: it yields a batch for each item of `turns`."""

    def __init__(self, setting: Setting, turns: Turns) -> None:
        self._setting, self._turns = setting, turns

    def __iter__(self) -> Iterator[Any]:
        label = torch.zeros(self._setting.batch_size, dtype=torch.long, device=self._setting.accelerator)
        flat = self._setting.model == "digits"
        for one, other in _dealt(self._setting, self._turns):
            yield (one, other, label) if flat else ((one, other), label)


def _dealt(setting: Setting, turns: Turns) -> Iterator[Inputs]:
    batches = setting.batches()
    for i, _ in enumerate(turns):
        yield batches[i % len(batches)]


def trainer(turns: Turns, setting: Setting, memory: int | None, is_logged: bool = False) -> None:
    """Run `trainer.test` with ABPEM, or without it if `memory` is None; log every step to a CSV file if `is_logged`."""
    _prepare(setting)
    model = setting.build()
    callbacks = [] if memory is None else [engine(model, memory)]
    with TemporaryDirectory() as folder:
        logging = {"logger": CSVLogger(folder), "log_every_n_steps": 1} if is_logged else {}
        loop = silent_trainer(
            accelerator=setting.accelerator, precision=setting.precision, callbacks=callbacks, **logging
        )
        loop.test(model, DataLoader(_Stream(setting, turns), batch_size=None), verbose=False)


def loop(turns: Turns, setting: Setting, memory: int | None, options: dict[str, Any]) -> None:
    """Run a plain loop with ABPEM attached, or without it if `memory` is None."""
    _prepare(setting)
    model = setting.build()
    attached = nullcontext() if memory is None else engine(model, memory, **options).attach(model)
    with torch.no_grad(), setting.autocast(), attached:
        for inputs in _dealt(setting, turns):
            model(*inputs)


def written(turns: Turns, setting: Setting, program: Callable[..., Iterable[Any]], memory: int) -> None:
    """Run a loop that is written for this model: `by_hand` or `published_way`."""
    _prepare(setting)
    with setting.autocast():
        for _ in program(setting.build(), _dealt(setting, turns), memory):
            pass


def _prepare(setting: Setting) -> None:
    quiet()
    torch.set_num_threads(setting.threads)
    # As loading a checkpoint does: once such a block was freed, glibc keeps smaller ones. Alike in all programs.
    torch.empty(31 * 2**20, dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="cavmae")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32-true", *DTYPES], default="32-true")
    parser.add_argument("--compile", action="store_true", help="compile the frozen encoders' blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=1, help="batches per round")
    parser.add_argument("--only", nargs="*", default=None, help="programs whose names hold one of these")
    parser.add_argument("--out", type=Path, default=Path("runs/step-cost"))
    args = parser.parse_args()
    setting = Setting(args.model, args.batch_size, args.accelerator, args.precision, args.compile, args.threads)
    programs = {
        label: program
        for label, program in every_program(setting, args.memory).items()
        if args.only is None or label.startswith("plain") or any(word in label for word in args.only)
    }
    measured = in_lockstep(
        programs,
        rounds=args.rounds,
        batches=args.batches,
        warmup={
            label: 1 + next((memory for memory in args.memory if label.endswith(f" {memory}")), 1) for label in programs
        },
        device=args.accelerator,
        progress=lambda rounds: track(rounds, "rounds", transient=True),
    )
    table = as_table(measured, "kernels" if args.accelerator == "cuda" else "operations")
    name = "-".join([args.model, args.accelerator, args.precision, str(args.batch_size)] + ["compiled"] * args.compile)
    save(args.out / name, setting, measured, table)
    Console().print(table, soft_wrap=True)


def every_program(setting: Setting, memories: Iterable[int]) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """Return the programs by label; the others are compared with those whose labels start with "plain"."""
    defaults = {"k": "auto", "attention_weight": "auto", "balance": "stream"}
    programs: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "plain Trainer": (trainer, (setting, None)),
        "plain loop": (loop, (setting, None, {})),
    }
    for memory in memories:
        programs |= {
            f"ABPEM in a Trainer, memory {memory}": (trainer, (setting, memory)),
            f"ABPEM in a Trainer that logs, memory {memory}": (trainer, (setting, memory, True)),
            f"ABPEM attached, memory {memory}": (loop, (setting, memory, {})),
            f"ABPEM attached, comparing each batch, memory {memory}": (loop, (setting, memory, {"monitor": "source"})),
            f"three rates attached, memory {memory}": (loop, (setting, memory, {"learning_rate": "auto"})),
            f"defaults attached, memory {memory}": (loop, (setting, memory, defaults)),
            f"by hand, memory {memory}": (written, (setting, by_hand, memory)),
            f"published way, memory {memory}": (written, (setting, published_way, memory)),
        }
    return programs


def as_table(measured: Mapping[str, Measured], counted: str) -> str:
    """Return Markdown: median times, ratios to the plain program of the same loop, added peak memory, operations."""
    lines = [f"| program | ms per batch | of plain | added peak memory, MB | {counted} |", "|---|---|---|---|---|"]
    for label, own in measured.items():
        plain = measured["plain Trainer" if "Trainer" in label else "plain loop"]
        added = (own.peak - plain.peak) / 2**20
        ratio = own.median / plain.median
        lines.append(f"| {label} | {1e3 * own.median:.2f} | {ratio:.3f} | {added:.0f} | {own.operations} |")
    return "\n".join(lines)


def save(folder: Path, setting: Setting, measured: Mapping[str, Measured], table: str) -> None:
    """Write the table, and its numbers with the setting, device and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table + "\n")
    device = torch.cuda.get_device_name() if setting.accelerator == "cuda" else platform.processor() or "CPU"
    numbers = {label: vars(own) for label, own in measured.items()}
    versions = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    (folder / "numbers.json").write_text(json.dumps({**vars(setting), **versions, "programs": numbers}, indent=1))


if __name__ == "__main__":
    main()
