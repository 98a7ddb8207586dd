"""A few batches through a model, by its own step in a Trainer or by a call, and sums over what it predicts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from lightning_abpem.engine.logits import read_from_outside
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.watch import Means
from lightning_abpem.functional import entropy, widen
from lightning_abpem.modules.names import named_module
from lightning_abpem.modules.parameters import device_of
from lightning_abpem.trainer.options import Stage

__all__ = [
    "BatchNotes",
    "Forward",
    "Labels",
    "Tally",
    "first_batches",
    "plain_forward",
    "quiet",
    "run_calls",
    "run_stage",
]

Labels = Callable[[Any], Tensor]
"""From a batch to the classes of its samples, (B,)."""
Forward = Callable[[nn.Module, Any], Any]
"""Calls a model with a batch."""


class Tally:
    """Sums over the predictions of a model's target, on the host in float64.

    Args:
        model: the model.
        settings: which module is the target, and where its logits are.
        labels: from a batch to its classes, if they are known.

    Attributes:
        batches: how many were begun.
        samples: how many predictions there were.
        entropy: sum of their entropies, in nats.
        share: (C,), sum of the predictions; None before the first one.
        hits: how many were right.
        labels: as given.
    """

    def __init__(self, model: nn.Module, settings: Settings, labels: Labels | None) -> None:
        self._settings, self.labels, self._batch = settings, labels, None
        self.batches, self.samples, self.entropy, self.hits = 0, 0, 0.0, 0
        self.share: Tensor | None = None
        target = model if settings.target is None else named_module(model, settings.target, "target")
        self._handle = target.register_forward_hook(lambda module, args, output: self._see(output))

    def start_batch(self, batch: Any) -> None:
        """Say which batch the next calls are of."""
        self._batch = batch
        self.batches += 1

    def means(self, source: Tally) -> Means:
        """Return the means of these predictions, beside those of the source's.

        Raises:
            ValueError: the target was not called.
        """
        if self.share is None or source.share is None:
            raise ValueError("The target was not called: set `target` to the module that the step calls with a batch.")
        share, source_share = self.share / self.samples, source.share / source.samples
        own_entropy, source_entropy = (torch.tensor(own.entropy / own.samples) for own in (self, source))
        return Means(own_entropy, source_entropy, share, source_share, torch.tensor(self.samples))

    def close(self) -> None:
        """Watch the model no more."""
        self._handle.remove()

    def _see(self, output: object) -> None:
        logits = widen(read_from_outside(output, self._settings.logits))
        share = logits.softmax(-1).sum(0).double().cpu()
        self.share = share if self.share is None else self.share + share
        self.entropy += entropy(logits).sum().item()
        self.samples += len(logits)
        if self.labels is not None:
            labels = torch.as_tensor(self.labels(self._batch)).to(logits.device)
            if labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"Expected `labels` to return a class for each of {len(logits)} samples, ({len(logits)},), but got "
                    f"{tuple(labels.shape)}."
                )
            self.hits += int((logits.argmax(-1) == labels).sum())


def first_batches(data: Iterable[object], count: int) -> list[Any]:
    """Return the first batches of an iterable.

    Raises:
        ValueError: it is none, has no batch, or holds loaders in place of batches.
    """
    try:
        kept = list(islice(data, count))
    except TypeError as error:
        raise ValueError(f"Expected `data` to be an iterable of batches, but got a {type(data).__name__}.") from error
    if not kept:
        raise ValueError("Expected `data` to have a batch, but got none.")
    if isinstance(kept[0], DataLoader):
        raise ValueError("Expected `data` to be one loader, but got several: tune on each by itself.")
    return kept


def plain_forward(model: nn.Module, batch: object) -> Any:
    """Call a model with a batch: a tuple or list as its arguments, a dict as those by name, else as the only one."""
    device = device_of(model.parameters())
    batch = move_data_to_device(batch, device)
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


@torch.no_grad()
def run_calls(model: nn.Module, batches: Iterable[object], forward: Forward, tally: Tally) -> None:
    """Call a model with every batch, without gradients."""
    for batch in batches:
        own = _cloned(batch)
        tally.start_batch(own)
        forward(model, own)


def run_stage(
    model: LightningModule, data: object, stage: Stage, callbacks: Sequence[Any], batches: int
) -> dict[str, float]:
    """Run the first batches of every loader through a LightningModule's own step; return what it logged.

    Args:
        model: the model.
        data: a LightningDataModule or a loader; or batches in a list.
        stage: whose step.
        callbacks: of the Trainer.
        batches: how many of each loader.
    """
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_test_batches=batches,
        limit_predict_batches=batches,
        limit_val_batches=batches,
    )
    if isinstance(data, list):
        data = DataLoader(_Kept(data), batch_size=None, collate_fn=_as_it_is)
    options = {"return_predictions": False} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(model, data, **options)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class BatchNotes(Callback):
    """Tells a tally which batch a step is of."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tally.start_batch(batch)

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what a Trainer's run and the callback report of themselves."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_abpem")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.pytorch.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Kept(Dataset[Any]):
    """Batches that are kept, each as it was at first whatever became of it in a step."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return _cloned(self._batches[index])


def _cloned(batch: object) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, batch)


def _as_it_is(batch: object) -> Any:
    return batch
