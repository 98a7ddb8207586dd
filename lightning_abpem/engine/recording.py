"""Gathers what a report shows of an adaptation, with one copy from the device for many steps."""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_abpem.attention.blocks import ScoreBlock
from lightning_abpem.engine.clock import Clock
from lightning_abpem.engine.guard import Event
from lightning_abpem.engine.points import Point, Points

__all__ = ["Recorder"]

log = logging.getLogger(__name__)

_PENDING = 256  # steps between two copies from the device
_POINTS, _PARTS, _CLASSES = 1024, 48, 8
_MARKS = 2000  # resets whose steps are kept
SAMPLES = 3  # whose attention is shown


class _Pending(NamedTuple):
    record: Mapping[str, Tensor]
    samples: int
    dataloader: int
    classes: Tensor | None


class _Kept(NamedTuple):
    """A call of the target, to be made again, and the precision that it ran in."""

    args: Any
    kwargs: Any
    autocast: tuple[str, bool, torch.dtype]


class Recorder:
    """Gathers steps, marks, times, and a batch for the attention blocks. Nothing here waits for the device but `flush`.

    Args:
        device: where the model is.

    Attributes:
        clock: of the time spent adapting, which the adaptation keeps.
        dataloader: the index of the current one.
        known_events: how many of the guard's events are known already, as those of a loaded state.
    """

    def __init__(self, device: torch.device) -> None:
        self.clock, self.dataloader = Clock(device), 0
        self._device, self._began = device, time.perf_counter()
        self._pending: list[_Pending] = []
        self._points, self._loaders = Points(_POINTS), dict[int, Point]()
        self._loader_starts: dict[int, int] = {}
        self._seen: Tensor | None = None  # the last batch's logits
        self._steps = self._resets = 0
        self._reset_steps: list[int] = []
        self._events: list[dict[str, Any]] = []
        self.known_events = 0
        self._keeps = True
        self._kept: _Kept | None = None
        self._blocks: dict[str, Any] | None = None
        self._no_blocks = "The run did not come to its end, or the method watches no attention."

    def keep(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Keep a copy of the first batch, for the attention blocks."""
        if self._keeps:
            self._keeps = False
            kind = self._device.type
            precision = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._kept = _Kept(*copy.deepcopy((args, kwargs)), precision)
            except Exception as error:  # whatever the batch is made of
                self._no_blocks = f"The first batch cannot be copied: {error}"
                log.warning("The report will have no attention blocks. %s", self._no_blocks)

    def add(
        self, record: Mapping[str, Tensor], samples: int, logits: Tensor | None, events: Sequence[Event], resets: int
    ) -> None:
        """Add a step.

        Args:
            record: its figures, scalars on the device.
            samples: how many it is of.
            logits: (B, C) of its batch; the same tensor for further steps of the same batch.
            events: what the guard has done so far.
            resets: how often the source model has come back.
        """
        for event in events[self.known_events :]:
            self._events.append({"step": self._steps, "action": event.action, "cause": event.cause})
        self.known_events = len(events)
        if resets > self._resets and len(self._reset_steps) < _MARKS:
            self._reset_steps.append(self._steps)
        self._resets = resets
        self._loader_starts.setdefault(self.dataloader, self._steps)
        is_new = logits is not None and logits is not self._seen
        self._seen = logits
        classes = logits.argmax(-1) if is_new and logits is not None else None
        self._pending.append(_Pending(record, samples, self.dataloader, classes))
        self._steps += 1
        if len(self._pending) >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Copy the pending steps to the host, all at once."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = iter(torch.stack([x.float() for step in pending for x in step.record.values()]).tolist())
        own = [step.classes for step in pending if step.classes is not None]
        predicted = iter(torch.cat(own).tolist() if own else [])
        for step in pending:
            figures = {name: next(values) for name in step.record}
            classes = [next(predicted) for _ in range(0 if step.classes is None else len(step.classes))]
            self._points.add(figures, step.samples, classes)
            self._loaders.setdefault(step.dataloader, Point(0)).add(figures, step.samples, classes)

    def see_blocks(self, adaptation: Any) -> None:
        """Run the kept batch through the model twice, at the source's weights and at the adapted ones."""
        kept, self._kept = self._kept, None
        if kept is None:
            return
        kind, enabled, dtype = kept.autocast
        try:
            with torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False):
                before, after = adaptation.score_blocks(kept.args, kept.kwargs, SAMPLES)
            self._blocks = {"pairs": [_pair(*both) for both in zip(before, after, strict=True)]}
        except Exception as error:  # a figure of the report is no reason to lose the run
            self._no_blocks = f"The first batch could not be run again: {error}"
            log.warning("The report will have no attention blocks. %s", self._no_blocks)

    def pictures(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return how often each class was predicted, as `Points.classes` has it, and the blocks; None without."""
        self.flush()
        return self._points.classes(_PARTS, sys.maxsize), self._blocks

    def result(self) -> dict[str, Any]:
        """Return all that was gathered, as a report's record has it: plain numbers, lists and names."""
        try:
            self.flush()
            adapting: float | None = self.clock.read()
        except RuntimeError as error:  # of a device that failed: what came before is still there
            log.warning("The report lacks the last steps: %s", error)
            adapting = None
        return {
            "steps": self._points.columns(),
            "classes": self._points.classes(_PARTS, _CLASSES),
            "events": self._events,
            "resets": self._reset_steps,
            "dataloaders": [
                {"index": i, "first": self._loader_starts[i], "samples": point.samples, "figures": point.means}
                for i, point in sorted(self._loaders.items())
            ],
            "counts": {"steps": self._points.steps, "resets": self._resets},
            "seconds": {"total": time.perf_counter() - self._began, "adapting": adapting},
            "blocks": self._blocks,
            "no_blocks": self._no_blocks,
        }


def _pair(before: ScoreBlock, after: ScoreBlock) -> dict[str, Any]:
    names = {name: getattr(before, name) for name in ("query", "key", "attention", "queries", "keys")}
    return {**names, "before": _plain(before.scores), "after": _plain(after.scores)}


def _plain(scores: Tensor) -> list[Any]:
    """Return (S, rows, columns) as lists of numbers with five digits; None for what is not finite."""
    return [[[float(f"{x:.5g}") if x - x == 0 else None for x in row] for row in sample] for sample in scores.tolist()]
