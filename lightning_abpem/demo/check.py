"""Check of what the last demo promised. Run ``make check-demo``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from statistics import fmean

from lightning_abpem.demo.trainer import OUTPUT

__all__ = ["broken_promises"]


def broken_promises(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the promises that results.csv breaks: accurate and no worse on clean data, better under corruption."""
    rows = list(rows)

    def accuracy(method: str, severity: int) -> float:
        return fmean(
            float(row["accuracy"]) for row in rows if row["method"] == method and int(row["severity"]) == severity
        )

    clean, corrupted = (accuracy("adapted", severity) - accuracy("source", severity) for severity in (0, 5))
    checks = {
        f"the source has {accuracy('source', 0):.1f} % on clean data, less than 98": accuracy("source", 0) >= 98,
        f"adapting gains {corrupted:+.1f} points at severity 5, less than 5": corrupted >= 5,
        f"adapting changes clean accuracy by {clean:+.2f} points, less than -0.3": clean >= -0.3,
    }
    return [words for words, kept in checks.items() if not kept]


if __name__ == "__main__":
    with (OUTPUT / "results.csv").open() as file:
        sys.exit("\n".join(broken_promises(csv.DictReader(file))) or None)
