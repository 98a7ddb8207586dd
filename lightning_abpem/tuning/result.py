"""Figures of the candidates, and the best of them by figures that need no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_abpem.display import plain_text, tuning_table
from lightning_abpem.engine.guard import LIMIT

__all__ = ["Candidate", "Tuning", "choose", "expression"]

MARGIN = 0.03
"""Information that is no gain, as a share of ln C: chosen on the development split of the digits, see docs/tune."""


@dataclass(frozen=True)
class Candidate:
    """One row of a `Tuning`: the model's predictions on the first batches of the stream, with these options.

    Args:
        learning_rate: of the optimizer; None for the source, which does not adapt.
        anchor: as the callback has it.
        samples: how many predictions count.
        updates: steps taken.
        information: entropy of the mean prediction less the mean entropy of a prediction, in nats.
        entropy: mean entropy of a prediction, in nats.
        harm: what the guard calls harm, over all these predictions, as a share of ln C; 0 for the source.
        accuracy: share of right predictions, if there were labels.
        logged: what the LightningModule's own step logged, by name.
        error: why there are no figures; None if there are.
    """

    learning_rate: float | None
    anchor: float = 0.0
    samples: int = 0
    updates: int = 0
    information: float = float("nan")
    entropy: float = float("nan")
    harm: float = float("nan")
    accuracy: float | None = None
    logged: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def name(self) -> str:
        """The candidate's options in words."""
        if self.learning_rate is None:
            return "source"
        return f"{self.learning_rate:g}" + (f", anchor {self.anchor:g}" if self.anchor else "")

    @property
    def is_harmful(self) -> bool:
        """True if the guard would say that it does harm."""
        return not self.harm <= LIMIT


@dataclass(frozen=True)
class Tuning:
    """Result of `TestTimeAdaptation.tune`; prints as a table and the line to paste.

    Args:
        rows: the source, then every candidate in the order of the options.
        best: the row that was chosen; the source if no candidate is better.
        line: an expression for the callback with the options of `best`; None if that is the source.
        batches: how many batches each row is of.
        notes: what to know about the choice.
    """

    rows: Sequence[Candidate]
    best: Candidate
    line: str | None
    batches: int
    notes: Sequence[str] = ()

    def __rich__(self) -> Any:
        shown = [
            {**vars(row), "name": row.name, "harmful": row.is_harmful, "best": row is self.best} for row in self.rows
        ]
        title = f"First {self.batches} batches, {self.rows[0].samples} samples"
        return tuning_table(title, shown, self.line, self.notes)

    def __str__(self) -> str:
        return plain_text(self.__rich__())

    __repr__ = __str__


def choose(rows: Sequence[Candidate], classes: int) -> Candidate:
    """Return the row with the least rate that is as good as the best, among the source and those that do no harm.

    As good is what has at most 0.03 ln C less information.

    Args:
        rows: the source first.
        classes: C, how many there are.
    """
    source, *others = rows
    fit = [source, *(row for row in others if row.error is None and not row.is_harmful)]
    least = max(row.information for row in fit) - MARGIN * math.log(classes)
    return min(
        (row for row in fit if row.information >= least), key=lambda row: (row.learning_rate or 0, -row.information)
    )


def expression(name: str, args: Sequence[object], options: Mapping[str, object]) -> str:
    """Return the call of a class as Python has it; what has no such form, as a function, as `...`."""
    words = [_shown(value) for value in args] + [f"{key}={_shown(value)}" for key, value in options.items()]
    return f"{name}({', '.join(words)})"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_shown(key)}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    return repr(value) if value is None or isinstance(value, str | bool | int | float) else "..."
