"""A run's outcome in a few numbers, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_abpem.display import summary_table
from lightning_abpem.engine.guard import Event

__all__ = ["Summary"]

_ROWS = {
    "entropy": ("entropy of a prediction, nats", "{:.3f}"),
    "attention_gap": ("attention gap, self less cross", "{:.3f}"),
    "information": ("information of a prediction, nats", "{:.3f}"),
    "drift": ("way of the weights from the source", "{:.2%}"),
}


@dataclass(frozen=True)
class Summary:
    """Counts and averages of a run, which `rich` prints as a table.

    Args:
        title: of the table.
        averages: by dataloader, then by name.
        batches: calls of the target.
        updates: steps taken.
        skipped_for: steps not taken, by reason.
        seconds: spent in adapting passes and steps, by the device's clock.
        total: seconds from the first batch to the end.
        events: what the guard did.
        left_out: samples left out of steps, for their logits were not finite.
        monitored: every how many batches the source was compared with. Its averages are shown only for 1: else they are
            of other batches than the adapted model's.
    """

    title: str
    averages: Mapping[int, Mapping[str, Tensor]]
    batches: int
    updates: int
    skipped_for: Mapping[str, int]
    seconds: float
    total: float
    events: Sequence[Event] = field(default=())
    left_out: int = 0
    monitored: int = 1

    def __rich__(self) -> Any:
        several = len(self.averages) > 1
        is_compared = any(self._source_of(means, "entropy") is not None for means in self.averages.values())
        heading = "source → adapted" if is_compared else "adapted"
        columns = [f"dataloader {index}" if several else heading for index in self.averages]
        return summary_table(self.title, columns, self._figures(), self._notes())

    def _figures(self) -> Iterator[tuple[str, list[str]]]:
        """Rows of the table: a figure's name, and its average for each dataloader."""
        for name, (label, form) in _ROWS.items():
            own = [means.get(name) for means in self.averages.values()]
            before = [self._source_of(means, name) for means in self.averages.values()]
            if any(value is not None for value in own):
                yield label, [_pair(a, b, form) for a, b in zip(before, own, strict=True)]
        flips = [means.get("flip_rate") for means in self.averages.values()]
        if any(value is not None for value in flips):
            where = "" if self.monitored == 1 else f", in one of {self.monitored} batches"
            yield f"predictions that differ from the source's{where}", [_pair(None, own, "{:.1%}") for own in flips]

    def _source_of(self, means: Mapping[str, Tensor], name: str) -> Tensor | None:
        return means.get(f"source_{name}") if self.monitored == 1 else None

    def _notes(self) -> Iterator[str]:
        yield f"{_count(self.updates, 'update')} in {_count(self.batches, 'batch', 'es')}"
        if self.skipped_for:
            yield "skipped: " + ", ".join(f"{count} for {reason}" for reason, count in self.skipped_for.items())
        if self.left_out:
            yield f"left out of steps: {_count(self.left_out, 'sample')}"
        done = Counter(event.action for event in self.events)
        if done:
            yield "guard: " + ", ".join(f"{action} {_count(count, 'time')}" for action, count in done.items())
        if self.total > 0:
            yield f"{self.seconds:.1f} s of {self.total:.1f} s spent adapting ({self.seconds / self.total:.0%})"


def _count(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural * (count != 1)}"


def _pair(before: Tensor | None, own: Tensor | None, form: str) -> str:
    """Return a value as text, behind the source's if that is known."""
    if own is None:
        return "-"
    shown = form.format(own.item())
    return shown if before is None else f"{form.format(before.item())} → {shown}"
