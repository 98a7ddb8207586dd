"""Measurements and checks of the package on a GPU, in minutes: costs first, then what has to hold.

    PYTHONPATH=. python -m benchmarks.costs.gpu --out FOLDER --minutes 9
    PYTHONPATH=. python -m benchmarks.costs.gpu --out FOLDER --minutes 2 --device cpu --tiny

The most important rows come first. Each result is in FOLDER/results.json and FOLDER/results.md as soon as it is there.
A second call goes on where the first stopped; `--retry` runs what failed once more. The second line is a dry run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

import lightning_abpem
from benchmarks.costs.gpu_checks import CHECKS
from benchmarks.costs.gpu_graph import try_graph
from benchmarks.costs.gpu_report import as_markdown
from benchmarks.costs.gpu_rows import PRECISIONS, Machine, NeedsGPUError, Row, measure, start_fresh
from lightning_abpem.demo.trainer import quiet

__all__ = ["Budget", "Journal", "Task", "environment", "main", "plan", "work_off"]

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BY_IMPORTANCE = ("bf16-mixed", "float32, TF32", "float32", "16-mixed")
_EVERY_PROGRAM = ("ABPEM attached", "published way", "ABPEM in a Trainer", "defaults attached", "by hand")
GRAPH = "CUDA graph of a small model's step by hand"


@dataclass(frozen=True)
class Task:
    """Something to measure or check.

    Args:
        name: what it is, in words; no other task has the same.
        kind: "row" or "check".
        run: gives the figures, or raises.
        guess: seconds that it takes, as long as nothing alike was run.
        alike: the name that tasks share which take about as long.
        settings: those of a row.
        plain: the task of plain inference that a row is held against, in the same call of the program.
    """

    name: str
    kind: str
    run: Callable[[], Mapping[str, Any]]
    guess: float
    alike: str
    settings: Mapping[str, Any]
    plain: str | None = None


class Budget:
    """Seconds that are left of so many minutes, by a clock."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + 60 * minutes

    def has(self, seconds: float) -> bool:
        return self._clock() + seconds <= self._end


class Journal:
    """The results in a folder, those of one device and its versions at a time.

    Attributes:
        environment: the device and the versions.
        entries: its results by name.
    """

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        self._folder, self.environment = folder, dict(environment)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        self._all: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        own = next((one for one in self._all if one["environment"] == self.environment), None)
        if own is None:
            own = {"environment": self.environment, "entries": {}}
            self._all.append(own)
        self.entries: dict[str, dict[str, Any]] = own["entries"]

    def write(self, tasks: Iterable[Task], left_out: Sequence[str] = ()) -> None:
        """Write both files, each as a whole or not at all; entries in the order of the tasks."""
        ordered = {task.name: self.entries[task.name] for task in tasks if task.name in self.entries}
        self._replace("results.json", json.dumps(self._all, indent=1))
        self._replace("results.md", as_markdown(self.environment, ordered, left_out))

    def _replace(self, name: str, text: str) -> None:
        draft = self._folder / f".{name}.part"
        draft.write_text(text)
        os.replace(draft, self._folder / name)

    def expected(self, task: Task) -> float:
        """Return the seconds that the longest of the tasks alike took; a guess if there were none."""
        return max((own["wall"] for own in self.entries.values() if own["alike"] == task.alike), default=task.guess)


def work_off(
    tasks: Sequence[Task],
    journal: Journal,
    budget: Budget,
    say: Callable[[str], None],
    retry: bool = False,
    device: str = "cpu",
) -> list[str]:
    """Run what has no result yet and fits into the budget, and write each result.

    Returns:
        the names of the tasks that were left out.
    """
    settled = {name for name, entry in journal.entries.items() if not (retry and entry["status"] == "failed")}
    pending = {task.name for task in tasks if task.name not in settled}
    pending |= {task.plain for task in tasks if task.plain is not None and task.name in pending}
    fresh: set[str] = set()
    left_out, is_alive = [], True
    for task in tasks:
        if task.name not in pending:
            continue
        if not (is_alive and budget.has(journal.expected(task))):
            left_out.append(task.name)
            continue
        entry = _run(task, device)
        if task.plain in fresh:
            entry["plain"] = {key: journal.entries[task.plain][key] for key in ("seconds", "peak", "waits")}
        if entry["status"] == "done":
            fresh.add(task.name)
        journal.entries[task.name] = entry
        journal.write(tasks)
        say(f"{entry['status']}, {entry['wall']:.1f} s: {task.name}: {_in_short(entry)}")
        is_alive = _is_alive(device)
    if not is_alive:
        say("The device takes no more work after an error. Call the program again: it goes on with what is left.")
    journal.write(tasks, left_out)
    return left_out


def _run(task: Task, device: str) -> dict[str, Any]:
    begin = time.monotonic()
    entry = {"kind": task.kind, "alike": task.alike, "settings": dict(task.settings)}
    try:
        entry |= {"status": "done", **task.run()}
    except NeedsGPUError:
        entry |= {"status": "needs a GPU", "reason": "a CPU cannot say"}
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        entry |= {"status": "failed", "reason": f"{type(error).__name__}: {first}"}
    if _is_alive(device):
        start_fresh(device)
    return entry | {"wall": time.monotonic() - begin}


def _is_alive(device: str) -> bool:
    """Return False if an error has ended the work of this process on the GPU."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _in_short(entry: Mapping[str, Any]) -> str:
    if entry["status"] != "done":
        return str(entry["reason"])
    if "figure" in entry:
        return str(entry["figure"])
    ratio = f", {entry['seconds'] / entry['plain']['seconds']:.3f} of plain" if "plain" in entry else ""
    return f"{1e3 * entry['seconds']:.2f} ms{ratio}"


# ------------------------------------------------------------------------------------------------ what is run, in order


def plan(machine: Machine) -> list[Task]:
    """Return all tasks, the most important first; a dry run has fewer of those that come after the checks."""
    assert set(BY_IMPORTANCE) == set(PRECISIONS)
    most: Sequence[str] = BY_IMPORTANCE
    memories: Sequence[int] = (1, 4)
    tokens: Sequence[int] = TOKENS
    if machine.tiny:
        most, memories, tokens = ("float32",), (1,), (*TOKENS[:2], TOKENS[-1])
    rows = [
        *_rows(BY_IMPORTANCE, 32, ("ABPEM attached", "published way"), (1, 4)),
        *_sweep(tokens, published=TOKENS[:5]),
        *_rows(most, 32, ("ABPEM in a Trainer", "defaults attached", "by hand"), memories),
        *_rows(["float32"], 8, ("ABPEM attached", "by hand", "ABPEM in a Trainer"), memories, model="digits"),
        *_rows(most, 64, ("ABPEM attached", "published way", "by hand"), (1,)),
        *_rows(most, 8, _EVERY_PROGRAM, memories),
        *_rows(most, 32, ("ABPEM attached", "ABPEM in a Trainer"), memories, compiled=True),
        *_sweep(tokens, published=tokens),
    ]
    tasks = [_timed(row, machine) for row in dict.fromkeys(rows)]
    first = next(i for i, task in enumerate(tasks) if task.settings["model"] == "fusion")
    checks = [_checked(name, machine) for name in CHECKS]
    graph = Task(GRAPH, "check", partial(try_graph, machine), 10, GRAPH, {})
    return [*tasks[:first], *checks, graph, *tasks[first:]]


def _rows(
    precisions: Iterable[str], batch: int, programs: Iterable[str], memories: Iterable[int], **options: Any
) -> Iterator[Row]:
    """Yield the rows of each program and memory, each after the plain one that it is held against."""
    programs, memories = list(programs), list(memories)
    for precision in precisions:
        for program in programs:
            for memory in memories:
                row = Row(program, precision, batch, memory, **options)
                yield from (row.plain, row)


def _sweep(tokens: Iterable[int], published: Iterable[int]) -> Iterator[Row]:
    published = set(published)
    for count in tokens:
        programs = ["ABPEM attached", "published way"] if count in published else ["ABPEM attached"]
        yield from _rows(["float32"], 2, programs, (1,), model="fusion", tokens=count)


def _timed(row: Row, machine: Machine) -> Task:
    guess = 60 if row.compiled else 10
    alike = f"{row.program}, {row.memory}, {row.model}, {row.compiled}"
    plain = None if row.plain == row else row.plain.name
    return Task(row.name, "row", partial(measure, row, machine), guess, alike, asdict(row), plain)


def _checked(name: str, machine: Machine) -> Task:
    def run() -> dict[str, str]:
        return {"figure": CHECKS[name](machine)}

    return Task(name, "check", run, 60 if name == "memory does not grow" else 10, name, {})


# ---------------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a dry run")
    parser.add_argument("--retry", action="store_true", help="run what failed once more")
    args = parser.parse_args(arguments)
    budget = Budget(args.minutes)
    _check_device(args.device)
    quiet()
    logging.getLogger("lightning_abpem").setLevel(logging.ERROR)
    gc.freeze()  # what was imported: to collect garbage after each task would take longer than most of them
    machine = Machine(args.device, args.tiny)
    tasks, journal = plan(machine), Journal(args.out, environment(machine))
    say = partial(Console().print, soft_wrap=True, highlight=False, markup=False)
    left_out = work_off(tasks, journal, budget, say, args.retry, args.device)
    count = sum(entry["status"] == "failed" for entry in journal.entries.values())
    say(f"{len(journal.entries)} of {len(tasks)} done, {count} failed, {len(left_out)} left out: {args.out}/results.md")


def _check_device(device: str) -> None:
    if device not in ("cuda", "cpu"):
        raise SystemExit(f"Expected --device to be 'cuda' or 'cpu', but got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("Expected a GPU, but torch sees none. The dry run is --device cpu --tiny.")


def environment(machine: Machine) -> dict[str, Any]:
    """Return the device and the versions that results are of."""
    device = torch.cuda.get_device_name() if machine.device == "cuda" else platform.processor() or "CPU"
    return {
        "device": device,
        "tiny": machine.tiny,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_abpem": lightning_abpem.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    # One GPU, also for Trainers, which take all that they see.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    main()
