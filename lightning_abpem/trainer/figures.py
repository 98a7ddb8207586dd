"""The figures of a run: every step's for the loggers, averages by dataloader for the Trainer's results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_abpem.trainer.metrics import Figure, RecordMean, merge_mean, new_mean

__all__ = ["Figures"]


class Figures:
    """The figures of a run.

    Args:
        trainer: the Trainer, for its loggers.
        prefix: of all names: the method and the stage, as "abpem/test".
        logged: steps handed to the loggers so far.

    Attributes:
        logged: the same, with this run's.
    """

    def __init__(self, trainer: Any, prefix: str, logged: int) -> None:
        self.logged = logged
        self._trainer, self._prefix = trainer, prefix
        self._means: dict[int, RecordMean] = {}
        self._pending: list[tuple[str, dict[str, Tensor]]] = []
        self._shown: set[tuple[int, str]] = set()

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
        if self._trainer.loggers and self._trainer.log_every_n_steps > 0:
            self._pending.append((suffix, record))
            if len(self._pending) >= self._trainer.log_every_n_steps:
                self.flush()

    def show(self, module: Any, dataloader: int, before: Callable[[], None]) -> None:
        """Let Lightning log the averages of the current dataloader, under its own names, in the dataloader's result.

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

        names = ["updated", *(self._means[dataloader].names if dataloader in self._means else [])]
        for name in names:
            if (dataloader, name) not in self._shown and not self._trainer.barebones:
                self._shown.add((dataloader, name))
                figure = Figure(partial(average, name))
                module.log(f"{self._prefix}/{name}", figure, on_step=False, on_epoch=True, metric_attribute="abpem")

    def merge(self, dataloader: int, has_batch: bool, device: torch.device) -> None:
        """Average a dataloader's figures over processes; see `merge_mean`."""
        merged = merge_mean(self._means.pop(dataloader, None), has_batch, dataloader, device)
        if merged is not None:
            self._means[dataloader] = merged

    def averages(self) -> dict[int, dict[str, Tensor]]:
        """Return the means of the figures so far, by dataloader and name."""
        return {dataloader: self._averages_of(dataloader) for dataloader in sorted(self._means)}

    def log_averages(self, suffix: Callable[[int], str]) -> None:
        """Hand the averages to the loggers after the last step, where Lightning has no results.

        Args:
            suffix: from a dataloader's index to the end of its names.
        """
        self.flush()
        figures = {
            f"{self._prefix}/{name}{suffix(dataloader)}": value.item()
            for dataloader, means in self.averages().items()
            for name, value in means.items()
        }
        for logger in self._trainer.loggers:
            logger.log_metrics(figures, step=self.logged)

    def flush(self) -> None:
        """Hand each pending step to the loggers: one copy from the device for all of them."""
        pending, self._pending = self._pending, []  # first: a logger that raises gets none of them again
        if not pending:
            return
        values = iter(torch.stack([value.float() for _, record in pending for value in record.values()]).tolist())
        for suffix, record in pending:
            figures = {f"{self._prefix}/{name}_step{suffix}": next(values) for name in record}
            self.logged += 1
            for logger in self._trainer.loggers:
                logger.log_metrics(figures, step=self.logged - 1)

    def _averages_of(self, dataloader: int) -> dict[str, Tensor]:
        return self._means[dataloader].compute() if dataloader in self._means else {}
