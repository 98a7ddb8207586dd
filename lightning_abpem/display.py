"""Tables for a terminal, from rows: formats, never computes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

__all__ = [
    "comparison_table",
    "inspection_table",
    "literal",
    "plain_text",
    "show",
    "summary_table",
    "tuning_table",
    "visible",
]


def comparison_table(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """Source against adapted model, one line per corruption.

    Args:
        title: the caption above.
        rows: each with `name`; `source_accuracy`, `adapted_accuracy` and `change`, in percent; `spread`, the standard
            deviation of the change over seeds; `source_entropy`, `adapted_entropy` in nats; `source_gap`,
            `adapted_gap`, sizes in scores; and optionally `section`, true where a rule goes under the line.
    """
    table = Table(title=literal(title, "table.title"), title_justify="left", header_style="bold")
    table.add_column("corruption")
    for heading in ("source", "adapted", "change", "entropy", "attention gap"):
        table.add_column(heading, justify="right")
    for row in rows:
        colour = "green" if row["change"] > 0 else "red" if row["change"] < 0 else "default"
        table.add_row(
            literal(row["name"]),
            f"{row['source_accuracy']:.1f} %",
            f"[bold]{row['adapted_accuracy']:.1f} %[/bold]",
            f"[{colour}]{row['change']:+.1f}[/{colour}] ± {row['spread']:.1f}",
            f"{row['source_entropy']:.2f} → {row['adapted_entropy']:.2f}",
            f"{row['source_gap']:.2f} → {row['adapted_gap']:.2f}",
            end_section=row.get("section", False),
        )
    return table


def inspection_table(rows: Iterable[Mapping[str, Any]], line: str | None, notes: Iterable[str]) -> Group:
    """The attention calls of a model, and the `ABPEM(...)` line that fits.

    Args:
        rows: each with `name`, `kind`, `queries`, `keys`, `heads`, `tokens` (whose they are), `fusion` (whether it
            brings modalities together) and `values`, the number that would adapt.
        line: the line to paste, if there is one.
        notes: sentences below it.
    """
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, expand=True)
    table.add_column("attention", overflow="fold", ratio=5)
    table.add_column("kernel", no_wrap=True)
    table.add_column("queries", justify="right", no_wrap=True)
    table.add_column("keys", justify="right", no_wrap=True)
    table.add_column("heads", justify="right", no_wrap=True)
    table.add_column("tokens of", ratio=2)
    table.add_column("q, k, v", justify="right", no_wrap=True)
    for row in rows:
        known = row["kind"] != "hidden"
        table.add_row(
            literal(row["name"]),
            literal(row["kind"]) if known else Text("hidden", "red"),
            *(str(row[size]) if known else "?" for size in ("queries", "keys", "heads")),
            literal(row["tokens"]),
            f"{row['values']:,}" if row["values"] else "?",
            style="bold green" if row["fusion"] else None,
        )
    below = [Text(line, style="bold", overflow="fold")] if line else []
    return Group(table, *below, *(literal(note, lines=True) for note in notes))


def summary_table(
    title: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], notes: Iterable[str]
) -> Group:
    """The figures of a run, one column per dataloader, and sentences below.

    Args:
        title: the caption above.
        columns: their headings.
        rows: each a name and a cell for every column.
        notes: lines below.
    """
    table = Table(
        title=literal(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim"
    )
    table.add_column("")
    for heading in columns:
        table.add_column(literal(heading), justify="right")
    for name, cells in rows:
        table.add_row(literal(name), *(literal(cell) for cell in cells))
    return Group(table, *(literal(note) for note in notes))


def tuning_table(title: str, rows: Iterable[Mapping[str, Any]], line: str | None, notes: Iterable[str]) -> Group:
    """Candidates of the learning rate, and the line with the best.

    Args:
        title: the caption above.
        rows: each with `name`, `updates`, `information` and `entropy` in nats, `harm`, `accuracy` (a share, or None),
            `logged` (numbers by name), `error` (a reason in place of figures, or None), and whether it is `harmful` and
            the `best`.
        line: the line to paste, if there is one.
        notes: sentences below it.
    """
    rows = list(rows)
    logged = list(dict.fromkeys(name for row in rows for name in row["logged"]))
    has_accuracy = any(row["accuracy"] is not None for row in rows)
    table = Table(title=literal(title, "table.title"), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    table.add_column("rate", no_wrap=True)
    for heading in ("steps", "information", "entropy", "harm", *(["accuracy"] if has_accuracy else []), *logged):
        table.add_column(literal(heading), justify="right", min_width=min(len(heading), 11))
    table.add_column("", overflow="fold")
    for row in rows:
        known = row["error"] is None
        cells = [str(row["updates"]), *(f"{row[name]:.3f}" for name in ("information", "entropy", "harm"))]
        if has_accuracy:
            cells.append("" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %")
        cells += [f"{row['logged'][name]:.4g}" if name in row["logged"] else "" for name in logged]
        state = "best" if row["best"] else "harmful" if known and row["harmful"] else ""
        table.add_row(
            literal(row["name"]),
            *(cells if known else [""] * len(cells)),
            literal(state if known else row["error"].splitlines()[0]),
            style="bold green" if row["best"] else "red" if state or not known else None,
        )
    below = [Text(line, style="bold", overflow="fold")] if line else []
    return Group(table, *below, *(literal(note, lines=True) for note in notes))


def literal(words: str, style: str = "", lines: bool = False) -> Text:
    """Return words for a terminal as they are: no markup, no emoji codes, no control characters."""
    return Text(visible(words, lines), style)


def visible(words: str, lines: bool = False) -> str:
    """Return words with escapes for control characters; with `lines` they may have several."""
    return _CONTROL.sub(lambda found: found[0] if lines and found[0] == "\n" else repr(found[0])[1:-1], words)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # and what turns text around


def show(renderable: object) -> None:
    """Print to the terminal."""
    Console().print(renderable)


def plain_text(renderable: object, width: int = 160) -> str:
    """Return what a terminal without colours shows, without spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable, soft_wrap=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
