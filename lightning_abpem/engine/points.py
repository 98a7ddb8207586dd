"""The course of a stream's figures in a limited number of points: of long streams neighbours are averaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Point", "Points"]


class Point:
    """One step, or several neighbours: means weighted by samples, and the predicted classes.

    Attributes:
        first: index of the first step.
        steps: how many.
        samples: how many, of all steps.
        classes: by class, of how many samples it was the predicted one.
    """

    def __init__(self, first: int) -> None:
        self.first, self.steps, self.samples = first, 0, 0
        self.classes: Counter[int] = Counter()
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, figures: Mapping[str, float], samples: int, classes: Iterable[int]) -> None:
        """Add a step. Figures that are not finite, as in a skipped step, do not count."""
        self.steps, self.samples = self.steps + 1, self.samples + samples
        self.classes.update(classes)
        for name, value in figures.items():
            total, weight = self._sums.get(name, (0.0, 0))
            counts = samples if math.isfinite(value) else 0
            self._sums[name] = (total + (value * counts if counts else 0.0), weight + counts)

    def join(self, other: Point) -> None:
        """Add the steps of another point."""
        self.steps, self.samples = self.steps + other.steps, self.samples + other.samples
        self.classes.update(other.classes)
        for name, (total, weight) in other._sums.items():
            own = self._sums.get(name, (0.0, 0))
            self._sums[name] = (own[0] + total, own[1] + weight)

    @property
    def means(self) -> dict[str, float | None]:
        """The figures by name; None where no step had a finite one."""
        return {name: total / weight if weight else None for name, (total, weight) in self._sums.items()}


class Points:
    """A course of at most `most` points. When they are too many, each two neighbours become one.

    Attributes:
        every: steps of a point.
    """

    def __init__(self, most: int) -> None:
        self._most, self.every = most, 1
        self._points: list[Point] = []
        self.steps = 0

    def add(self, figures: Mapping[str, float], samples: int, classes: Iterable[int]) -> None:
        """Add a step."""
        if not self._points or self._points[-1].steps >= self.every:
            if len(self._points) >= self._most:
                self._points, self.every = _halved(self._points), 2 * self.every
            if not self._points or self._points[-1].steps >= self.every:
                self._points.append(Point(self.steps))
        self._points[-1].add(figures, samples, classes)
        self.steps += 1

    def columns(self) -> dict[str, Any]:
        """Return the course for a record: `every`, `first`, `samples` and, by name, `figures`."""
        means = [point.means for point in self._points]
        names = list(dict.fromkeys(name for own in means for name in own))
        return {
            "every": self.every,
            "first": [point.first for point in self._points],
            "samples": [point.samples for point in self._points],
            "figures": {name: [own.get(name) for own in means] for name in names},
        }

    def classes(self, most: int, kept: int) -> dict[str, Any]:
        """Return how often each class was predicted, in at most `most` parts of the stream, for a record.

        Args:
            most: parts.
            kept: classes with a row of their own, the most frequent ones; the others share one.

        Returns:
            `first`, the index of each part's first step; `names`, the classes' indices; `counts`, a row for each, and
            a last one for all others.
        """
        parts = self._points
        while len(parts) > most:
            parts = _halved(parts)
        total = sum((part.classes for part in parts), Counter[int]())
        names = sorted(name for name, _ in total.most_common(kept))
        rows = [[part.classes[name] for part in parts] for name in names]
        others = [part.classes.total() - sum(part.classes[name] for name in names) for part in parts]
        return {"first": [part.first for part in parts], "names": names, "counts": [*rows, others], "used": len(total)}


def _halved(points: list[Point]) -> list[Point]:
    """Return half as many points, each of two neighbours; they are new ones."""
    joined = []
    for i in range(0, len(points), 2):
        pair = Point(points[i].first)
        for point in points[i : i + 2]:
            pair.join(point)
        joined.append(pair)
    return joined
