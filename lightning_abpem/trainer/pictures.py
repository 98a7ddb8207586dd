"""Pictures of a run for loggers that take them: predicted classes, and the fusion's attention."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor

__all__ = ["attention_picture", "log_pictures"]

log = logging.getLogger(__name__)

_SCALE = 8  # pixels of a score, each way
_BUCKETS = 512  # of a histogram, at most: W&B takes no more


def log_pictures(
    loggers: Iterable[object], prefix: str, classes: Mapping[str, object], blocks: Any, start: int
) -> None:
    """Hand histograms of the predicted classes, and images of the attention blocks, to every logger that takes them.

    W&B takes both, MLflow images alone. Of other loggers those do whose `experiment` has `add_histogram`, or
    `add_image`, as TensorBoard's. One that fails is warned of.

    Args:
        loggers: the Trainer's.
        prefix: of all names, as "abpem/test".
        classes: how often each class was predicted, by parts of the stream; see `Recorder.pictures`.
        blocks: the attention's, before and after; None for none.
        start: number of the run's first step in the loggers.
    """
    for logger in loggers:
        try:
            for first, predicted, edges in _predicted(classes):
                _log_histogram(logger, f"{prefix}/predicted_class", predicted, edges, start + first)
            for pair in [] if blocks is None else blocks["pairs"]:
                name = f"{prefix}/attention/{pair['query']}_to_{pair['key']}"
                _log_image(logger, name, attention_picture(pair), start)
        except Exception as error:
            log.warning("%s did not take the pictures of the run: %r", type(logger).__name__, error)


def _predicted(classes: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each part of the stream: its first step, the predicted classes (N,), the edges of a bucket for each."""
    if not classes["names"]:
        return
    names = torch.tensor(classes["names"])
    edges = torch.arange(int(names.max()) + 2) - 0.5
    counts = torch.tensor(classes["counts"][:-1])  # (classes, parts); the last row is of no class here
    for part, first in enumerate(classes["first"]):
        predicted = names.repeat_interleave(counts[:, part])
        if len(predicted):
            yield first, predicted, edges


def _log_histogram(logger: Any, name: str, values: Tensor, edges: Tensor, step: int) -> None:
    if isinstance(logger, WandbLogger):
        import wandb

        if len(edges) > _BUCKETS + 1:
            edges = torch.linspace(edges[0], edges[-1], _BUCKETS + 1)
        counts, _ = torch.histogram(values.float(), edges)
        histogram: Any = wandb.Histogram(np_histogram=(counts.int().numpy(), edges.numpy()))
        logger.log_metrics({name: histogram}, step)
        return
    experiment = getattr(logger, "experiment", None)
    if callable(add := getattr(experiment, "add_histogram", None)):
        add(name, values, step, bins=edges.tolist())


def _log_image(logger: Any, name: str, image: Tensor, step: int) -> None:
    """Log an image (height, width) in [0, 1]."""
    pixels = (image * 255).round().to(torch.uint8).numpy()
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [pixels], step)
        return
    experiment: Any = getattr(logger, "experiment", None)
    if isinstance(logger, MLFlowLogger):
        experiment.log_image(logger.run_id, pixels, key=name, step=step)
    elif callable(add := getattr(experiment, "add_image", None)):
        add(name, image, step, dataformats="HW")


def attention_picture(pair: Mapping[str, object]) -> Tensor:
    """Return a pair's blocks as one picture in [0, 1], (height, width): samples from top to bottom, before and after.

    Scores of the pair share one scale, from its least to its largest one. What a mask hides is black.
    """
    before, after = (_matrix(pair[when]) for when in ("before", "after"))
    both = torch.cat((before, after), 2)
    known = both.isfinite()
    low, high = both.where(known, torch.inf).min(), both.where(known, -torch.inf).max()
    shown = torch.where(known, (both - low) / (high - low).clamp(min=1e-12), 0)
    framed = F.pad(shown.unflatten(2, (2, -1)), (0, 1)).flatten(2)  # a black line behind each block
    framed = F.pad(framed, (0, 0, 0, 1)).flatten(0, 1)
    return framed.repeat_interleave(_SCALE, 0).repeat_interleave(_SCALE, 1)


def _matrix(scores: Any) -> Tensor:
    return torch.tensor([[[torch.nan if x is None else x for x in row] for row in sample] for sample in scores])
