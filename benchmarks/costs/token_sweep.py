"""Growth of time and memory with the number of joint tokens: the package against the published way.

    python -m benchmarks.costs.token_sweep [--tokens 512 1024 ...] [--out FOLDER]

One fusion block of width 256, batches of 2, no encoders, no memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from math import log2
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from benchmarks.costs.lockstep import Measured, Turns, in_lockstep
from benchmarks.costs.programs import FusionAlone, Inputs, engine, published_way
from lightning_abpem.demo.trainer import quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BATCH = 256, 2
PROGRAMS = ("plain inference", "ABPEM", "published way")


def run(turns: Turns, program: str, tokens: int, threads: int) -> None:
    quiet()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = FusionAlone(tokens, WIDTH).eval()
    batches = _batches(turns, tokens)
    if program == "published way":
        for _ in published_way(model, batches, memory=1):
            pass
        return
    with torch.no_grad(), engine(model, 1).attach(model) if program == "ABPEM" else nullcontext():
        for inputs in batches:
            model(*inputs)


def _batches(turns: Turns, tokens: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(BATCH, tokens // 2, WIDTH, generator=generator) for _ in range(2))
    for _ in turns:
        yield first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/token-sweep"))
    args = parser.parse_args()
    measured = {
        tokens: in_lockstep(
            {program: (run, (program, tokens, args.threads)) for program in PROGRAMS}, rounds=args.rounds, warmup=3
        )
        for tokens in args.tokens
    }
    args.out.mkdir(parents=True, exist_ok=True)
    table = as_table(measured)
    (args.out / "table.md").write_text(table + "\n")
    numbers = {n: {label: vars(own) for label, own in at.items()} for n, at in measured.items()}
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1))
    draw(measured).savefig(args.out / "tokens.png", dpi=150)
    Console().print(table, soft_wrap=True)


def as_table(measured: dict[int, dict[str, Measured]]) -> str:
    """Return Markdown: median ms and added peak MB by number of tokens, and the exponent of memory's growth."""
    lines = ["| tokens | plain, ms | ABPEM, ms | published way, ms | ABPEM, added MB | published way, added MB |"]
    lines.append("|---" * 6 + "|")
    for tokens, at in measured.items():
        times = [f"{1e3 * at[program].median:.0f}" for program in PROGRAMS]
        added = [f"{added_memory(at, program):.0f}" for program in PROGRAMS[1:]]
        lines.append("| " + " | ".join([str(tokens), *times, *added]) + " |")
    long = {tokens: at for tokens, at in measured.items() if tokens > 2 * WIDTH}  # where no map is made
    if len(long) > 1:
        ours, published = (growth({n: added_memory(at, program) for n, at in long.items()}) for program in PROGRAMS[1:])
        lines.append("")
        lines.append(
            f"From {min(long)} tokens on added memory grows as N to the power of {ours:.2f} and {published:.2f}."
        )
    return "\n".join(lines)


def growth(sizes: dict[int, float]) -> float:
    """Return the exponent of a power law, fitted to sizes by number of tokens by least squares of logarithms."""
    return linear_regression([log2(n) for n in sizes], [log2(max(size, 1)) for size in sizes.values()]).slope


def added_memory(at: dict[str, Measured], program: str) -> float:
    """Return the peak memory above plain inference's, in MB."""
    return (at[program].peak - at[PROGRAMS[0]].peak) / 2**20


def draw(measured: dict[int, dict[str, Measured]]) -> Figure:
    from matplotlib.figure import Figure  # here, for `growth` is used where there is no matplotlib

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for program, colour in zip(PROGRAMS, ("0.5", "tab:blue", "tab:red"), strict=True):
        time.plot(
            list(measured), [1e3 * at[program].median for at in measured.values()], "o-", color=colour, label=program
        )
        if program != PROGRAMS[0]:
            memory.plot(list(measured), [added_memory(at, program) for at in measured.values()], "o-", color=colour)
    for axes, title in ((time, "milliseconds per batch"), (memory, "added peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="joint tokens", title=title)
        axes.set_xticks(list(measured), [str(tokens) for tokens in measured], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
