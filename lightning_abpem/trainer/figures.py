"""The figures of a run: in the progress bar, in the loggers, and their averages in the Trainer's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_abpem.engine.peers import Peers
from lightning_abpem.engine.points import Point
from lightning_abpem.trainer import options
from lightning_abpem.trainer.metrics import Figure, RecordMean, merge_mean, new_mean

__all__ = ["HEADLINE", "Figures"]

HEADLINE = ("entropy", "attention_gap", "flip_rate", "updated")


class _Logged(NamedTuple):
    """A step that the loggers have not got yet: the end of its names, its figures, how many samples it is of."""

    suffix: str
    record: Mapping[str, Tensor]
    samples: int


class Figures:
    """The figures of a run.

    Args:
        trainer: the Trainer, for its loggers.
        method: the prefix of all names in lower case, as "abpem".
        stage: what follows it, as "test".
        logged: steps handed to the loggers so far.
        chosen: names of the figures that go to Lightning's results; the others' averages go to the loggers alone.
        compares_all: every batch is compared with the source. If not, a process may never come to a comparison, and
            the headline has no `flip_rate`: all processes need the same names.

    Attributes:
        logged: the same, with this run's.
    """

    def __init__(
        self,
        trainer: Any,
        method: str,
        stage: str,
        logged: int,
        chosen: options.Chosen = "headline",
        compares_all: bool = True,
    ) -> None:
        self.logged = logged
        self._headline = HEADLINE if compares_all else tuple(name for name in HEADLINE if name != "flip_rate")
        self._trainer, self._method, self._prefix, self._chosen = trainer, method, f"{method}/{stage}", chosen
        self._means: dict[int, RecordMean] = {}
        self._pending: list[_Logged] = []
        self._shown: set[tuple[int, str]] = set()
        self._updates: Tensor | int = 0

    def add(self, record: dict[str, Tensor], samples: int, dataloader: int, suffix: str) -> None:
        """Add a step: scalars by name.

        Args:
            record: the step's.
            samples: how many it is of.
            dataloader: its index.
            suffix: of the names in the loggers.
        """
        if dataloader not in self._means:
            self._means[dataloader] = new_mean(record["loss"].device)
        self._means[dataloader].update(record, samples)
        self._updates = self._updates + record["updated"]
        if self._trainer.loggers and self._trainer.log_every_n_steps > 0:
            if self._pending and self._pending[-1].suffix != suffix:
                self.flush()
            self._pending.append(_Logged(suffix, record, samples))
            if len(self._pending) >= self._trainer.log_every_n_steps:
                self.flush()

    def show_step(self, module: Any, record: Mapping[str, Tensor]) -> None:
        """Let Lightning show the last step's headline in its progress bar, if it has one: to log takes a millisecond.

        Args:
            module: the LightningModule.
            record: the step's figures.
        """
        bar = self._trainer.progress_bar_callback
        if bar is None or not getattr(bar, "is_enabled", True):
            return
        shown = {
            f"{self._method}/{name}": value for name in HEADLINE[:-1] if (value := _figure(record, name)) is not None
        }
        updates = {f"{self._method}/updates": self._updates}
        for name, figure in {**shown, **updates}.items():  # Lightning's `log`, whatever the module has in its place
            LightningModule.log(module, name, figure, on_step=True, on_epoch=False, prog_bar=True, logger=False)

    def show(self, module: Any, dataloader: int, before: Callable[[], None]) -> None:
        """Let Lightning log averages of the current dataloader, under its own names, in the dataloader's result.

        `updated` comes first, before the first step. Lightning computes metrics in the order in which they were logged,
        so `before` is called before Lightning averages anything of this dataloader over processes.

        Args:
            module: the LightningModule.
            dataloader: the index of the current one.
            before: called when Lightning asks for a figure.
        """

        def average(name: str) -> Tensor:
            before()
            return self._averages_of(dataloader).get(name, torch.tensor(torch.nan))

        if self._trainer.barebones:
            return
        for name in ["updated", *self._names_of(dataloader)]:
            if (dataloader, name) not in self._shown and (name == "updated" or self._is_chosen(name)):
                self._shown.add((dataloader, name))
                figure = Figure(partial(average, name))
                full = f"{self._prefix}/{name}"
                LightningModule.log(module, full, figure, on_step=False, on_epoch=True, metric_attribute="abpem")

    def merge(self, dataloader: int, has_batch: bool, device: torch.device, peers: Peers) -> None:
        """Average a dataloader's figures over processes; see `merge_mean`."""
        merged = merge_mean(self._means.pop(dataloader, None), has_batch, dataloader, device, peers)
        if merged is not None:
            self._means[dataloader] = merged

    def averages(self) -> dict[int, dict[str, Tensor]]:
        """Return the means of the figures so far, by dataloader and name."""
        return {dataloader: self._averages_of(dataloader) for dataloader in sorted(self._means)}

    def log_averages(self, suffix: Callable[[int], str]) -> None:
        """Hand the averages that are not among Lightning's results to the loggers, after the last step.

        Args:
            suffix: from a dataloader's index to the end of its names.

        Raises:
            Exception: the first one of a logger, after the others have theirs.
        """
        figures = {
            f"{self._prefix}/{name}{suffix(dataloader)}": value.item()
            for dataloader, means in self.averages().items()
            for name, value in means.items()
            if (dataloader, name) not in self._shown
        }
        row = self._take_pending()
        self._log([(row, self.logged - 1), (figures, self.logged)])

    def flush(self) -> None:
        """Hand the means over the pending steps to the loggers, at the last one: one copy from the device for all.

        Raises:
            Exception: the first one of a logger, after the others have theirs.
        """
        row = self._take_pending()
        self._log([(row, self.logged - 1)])

    def _take_pending(self) -> dict[str, float]:
        """Return the means over the steps that no logger has yet; one that raises gets none of them again."""
        pending, self._pending = self._pending, []
        if not pending:
            return {}
        self.logged += len(pending)
        rows = [list(step.record.values()) for step in pending]
        values = iter(torch.stack([value.float() for row in rows for value in row]).tolist())
        steps = Point(0)
        for step in pending:
            steps.add({name: next(values) for name in step.record}, step.samples, ())
        suffix = pending[0].suffix
        return {f"{self._prefix}/{name}_step{suffix}": x for name, x in steps.means.items() if x is not None}

    def _log(self, rows: Sequence[tuple[dict[str, float], int]]) -> None:
        """Hand rows, each with the number of its step, to every logger."""
        failure: Exception | None = None
        for logger in self._trainer.loggers:
            try:
                for figures, step in rows:
                    if figures:
                        logger.log_metrics(figures, step=step)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _is_chosen(self, name: str) -> bool:
        names = self._headline if self._chosen == "headline" else self._chosen
        return self._chosen == "all" or name in names

    def _names_of(self, dataloader: int) -> list[str]:
        names = self._means[dataloader].names if dataloader in self._means else []
        has_pairs = any(name.startswith("attention_gap/") for name in names)
        return [*names, *(["attention_gap"] if has_pairs else [])]

    def _averages_of(self, dataloader: int) -> dict[str, Tensor]:
        means = self._means[dataloader].compute() if dataloader in self._means else {}
        gap = _figure(means, "attention_gap")
        return means if gap is None else {**means, "attention_gap": gap}


def _figure(record: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a figure; where it is of each pair of modalities, its mean over them; None if there is none."""
    pairs = [value for key, value in record.items() if key.startswith(f"{name}/")]
    return record.get(name) if not pairs else torch.stack(pairs).mean()
