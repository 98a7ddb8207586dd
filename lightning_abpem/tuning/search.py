"""The search: every candidate adapts a copy of the model to the same batches, after the source has met them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_abpem.engine.checks import check_integer
from lightning_abpem.engine.guard import harm
from lightning_abpem.engine.settings import Settings
from lightning_abpem.functional import entropy_of
from lightning_abpem.modules.randomness import RandomState
from lightning_abpem.trainer.options import Stage
from lightning_abpem.tuning.result import Candidate, Tuning, choose
from lightning_abpem.tuning.runs import (
    BatchNotes,
    Forward,
    Labels,
    Tally,
    first_batches,
    plain_forward,
    quiet,
    run_calls,
    run_stage,
)

__all__ = ["RATES", "tune"]

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


class Adapter(Protocol):
    """A callback, as far as the search needs it; for a LightningModule's own step it is one of Lightning's."""

    settings: Settings

    @property
    def updates(self) -> int: ...

    def attach(self, model: nn.Module) -> Any: ...


class Tunable(Adapter, Protocol):
    """A callback that makes candidates of itself, and can say how it is written."""

    def candidate(self, rate: float, anchor: float, stage: Stage) -> Adapter: ...

    def line(self, **changed: float) -> str: ...


@dataclass(frozen=True)
class _Stream:
    """The batches, and how they enter the model."""

    data: Any  # batches in a list, or a LightningDataModule
    batches: int
    stage: Stage
    forward: Forward | None  # None for the LightningModule's own step
    labels: Labels | None


def tune(
    own: Tunable,
    model: nn.Module,
    data: object,
    rates: Sequence[float],
    anchors: Sequence[float],
    batches: int,
    stage: Stage,
    forward: Forward | None,
    labels: Labels | None,
) -> Tuning:
    """Run the source and all candidates on the first batches of a stream.

    Args:
        own: the callback whose learning rate is looked for.
        model: a LightningModule, whose own step runs in a Trainer, or any module, which is called.
        data: a loader or another iterable of batches, of which the first are kept in memory. A LightningDataModule
            makes them anew for each candidate, from the same random numbers.
        rates: candidates of `learning_rate`.
        anchors: candidates of `anchor`, each with all rates; None for this callback's own.
        batches: how many of the stream; of each dataloader, if the LightningDataModule has several.
        stage: whose step of a LightningModule runs; None for the first of `stages`.
        forward: calls the model with a batch. Default: the LightningModule's step; of another module
            ``model(*batch)``, by name if a batch is a dict, on the model's device.
        labels: from a batch to its (B,) classes; with it there is an accuracy in the table. It decides nothing.

    Returns:
        Rows, the best one, and its line. Printed it is a table.

    Raises:
        ValueError: an argument is out of its range, the model cannot be copied, the source itself fails, or no
            candidate can adapt. What stops some candidates alone is in their rows.
    """
    if own.settings.steps == 0:
        raise ValueError("Expected `steps` >= 1 to tune a learning rate, but got 0, which moves no weight.")
    check_integer("batches", batches, 1)
    if isinstance(rates, str) or not rates or not anchors:
        raise ValueError(f"Expected `rates` and `anchors` to hold numbers, but got {rates!r} and {anchors!r}.")
    candidates = [(rate, anchor, own.candidate(rate, anchor, stage)) for anchor, rate in product(anchors, rates)]
    if forward is None and not isinstance(model, LightningModule):
        forward = plain_forward
    stream = _Stream(_kept(data, batches, forward), batches, stage, forward, labels)
    random = RandomState(model)
    try:
        with quiet():
            tally, logged = _run(model, candidates[0][2], stream, adapts=False)
            rows = [_row(tally, tally, logged)]
            for rate, anchor, callback in candidates:
                random.restore()
                rows.append(_try(model, callback, stream, tally, Candidate(rate, anchor)))
    finally:
        random.restore()
    if all(row.error for row in rows[1:]):
        raise ValueError(f"No candidate could adapt: {rows[1].error}")
    best = choose(rows, len(tally.means(tally).share))
    notes = [*_notes(rows, best), *_few_classes(tally)]
    if best.learning_rate is None:
        return Tuning(rows, best, None, tally.batches, notes)
    changed = {"learning_rate": best.learning_rate} | ({"anchor": best.anchor} if len(set(anchors)) > 1 else {})
    return Tuning(rows, best, own.line(**changed), tally.batches, notes)


def _kept(data: Any, batches: int, forward: Forward | None) -> Any:
    """Return the first batches, to be met by each candidate; a LightningDataModule makes them anew."""
    if not isinstance(data, LightningDataModule):
        return first_batches(data, batches)
    if forward is not None:
        raise ValueError(
            "Expected `data` to be an iterable of batches for a model that is called, but got a LightningDataModule; "
            "data.setup('test') and data.test_dataloader() give one."
        )
    return data


def _try(model: nn.Module, callback: Adapter, stream: _Stream, source: Tally, options: Candidate) -> Candidate:
    """Run a candidate; its errors become its row."""
    try:
        tally, logged = _run(model, callback, stream, adapts=True)
        row = _row(tally, source, logged, callback.updates, options)
    except Exception as error:  # of the engine, of torch, or of the model with such weights
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return replace(options, error=words)
    return row if math.isfinite(row.information) else replace(options, error="Its predictions are not finite.")


def _run(model: nn.Module, callback: Adapter, stream: _Stream, adapts: bool) -> tuple[Tally, Mapping[str, float]]:
    """Let a copy of the model predict on the stream, adapted or not; return sums and what its step logged."""
    own = _copied(model)
    tally = Tally(own, callback.settings, stream.labels)
    try:
        if stream.forward is not None:
            own.eval()
            with callback.attach(own) if adapts else nullcontext():
                run_calls(own, stream.data, stream.forward, tally)
            return tally, {}
        callbacks = [BatchNotes(tally), *([callback] if adapts else [])]
        logged = run_stage(own, stream.data, stream.stage, callbacks, stream.batches)  # type: ignore[arg-type]
    finally:
        tally.close()
    mine = f"{callback.settings.method.name.lower()}/"
    return tally, {name: value for name, value in logged.items() if not name.startswith(mine)}


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model without the Trainer that it was in.

    Raises:
        ValueError: it cannot be copied.
    """
    trainer = getattr(model, "_trainer", None)
    try:
        return copy.deepcopy(model, {} if trainer is None else {id(trainer): None})
    except Exception as error:
        raise ValueError(
            f"Expected a model that can be copied, for each candidate adapts a copy, but copy.deepcopy raises "
            f"{type(error).__name__}: {error}"
        ) from error


def _row(
    tally: Tally, source: Tally, logged: Mapping[str, float], updates: int = 0, options: Candidate | None = None
) -> Candidate:
    """Return the figures of a run."""
    means = tally.means(source)
    return replace(
        Candidate(None) if options is None else options,
        samples=tally.samples,
        updates=updates,
        information=(entropy_of(means.share) - means.entropy).item(),
        entropy=means.entropy.item(),
        harm=harm(means).item(),
        accuracy=None if tally.labels is None else tally.hits / tally.samples,
        logged=logged,
    )


def _notes(rows: Sequence[Candidate], best: Candidate) -> list[str]:
    """Say what the choice does not tell by itself."""
    if best.learning_rate is None:
        return ["No rate gains anything over the source by these figures: leave the model as it is on such a stream."]
    largest = max(row.learning_rate or 0 for row in rows)
    if best.learning_rate == largest and len(rows) > 2:
        return ["It is the largest of `rates`: larger ones may do better."]
    return []


def _few_classes(source: Tally) -> list[str]:
    """Say if the source predicts few classes, for which the stream or the source may be the cause."""
    share = source.means(source).share
    used, classes = entropy_of(share).exp().item(), len(share)
    if used > classes / 2:
        return []
    return [
        f"The source predicts as few as {used:.1f} of {classes} classes evenly. If it is the stream that has so few, "
        "the figures do not tell help from harm: tune on batches of many classes."
    ]
