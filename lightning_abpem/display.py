"""Tables for a terminal, from rows: formats, never computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

__all__ = ["comparison_table"]


def comparison_table(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """Source against adapted model, one line per corruption.

    Args:
        title: the caption above.
        rows: each with `name`; `source_accuracy`, `adapted_accuracy` and `change`, in percent; `spread`, the standard
            deviation of the change over seeds; `source_entropy`, `adapted_entropy` in nats; `source_gap`,
            `adapted_gap`, sizes in scores; and optionally `section`, true where a rule goes under the line.
    """
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("corruption")
    for heading in ("source", "adapted", "change", "entropy", "attention gap"):
        table.add_column(heading, justify="right")
    for row in rows:
        colour = "green" if row["change"] > 0 else "red" if row["change"] < 0 else "default"
        table.add_row(
            row["name"],
            f"{row['source_accuracy']:.1f} %",
            f"[bold]{row['adapted_accuracy']:.1f} %[/bold]",
            f"[{colour}]{row['change']:+.1f}[/{colour}] ± {row['spread']:.1f}",
            f"{row['source_entropy']:.2f} → {row['adapted_entropy']:.2f}",
            f"{row['source_gap']:.2f} → {row['adapted_gap']:.2f}",
            end_section=row.get("section", False),
        )
    return table
