"""Pictures of a run for loggers that take them, as TensorBoard's: predicted classes, and the fusion's attention."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_picture", "log_pictures"]

log = logging.getLogger(__name__)

_SCALE = 8  # pixels of a score, each way


def log_pictures(
    loggers: Iterable[object], prefix: str, classes: Mapping[str, object], blocks: Any, start: int
) -> None:
    """Hand histograms of the predicted classes, and images of the attention blocks, to every logger that takes them.

    A logger does if its `experiment` has `add_histogram`, or `add_image`. One that fails is warned of.

    Args:
        loggers: the Trainer's.
        prefix: of all names, as "abpem/test".
        classes: how often each class was predicted, by parts of the stream; see `Recorder.pictures`.
        blocks: the attention's, before and after; None for none.
        start: number of the run's first step in the loggers.
    """
    for logger in loggers:
        try:
            experiment: Any = getattr(logger, "experiment", None)
            if callable(getattr(experiment, "add_histogram", None)):
                _add_histograms(experiment, f"{prefix}/predicted_class", classes, start)
            if blocks is not None and callable(getattr(experiment, "add_image", None)):
                for pair in blocks["pairs"]:
                    name = f"{prefix}/attention/{pair['query']}_to_{pair['key']}"
                    experiment.add_image(name, attention_picture(pair), start, dataformats="HW")
        except Exception as error:
            log.warning("%s did not take the pictures of the run: %r", type(logger).__name__, error)


def _add_histograms(experiment: Any, name: str, classes: Mapping[str, Any], start: int) -> None:
    """Add a histogram for each part of the stream, with a bucket for each class."""
    if not classes["names"]:
        return
    names = torch.tensor(classes["names"])
    edges = torch.arange(int(names.max()) + 2) - 0.5
    counts = torch.tensor(classes["counts"][:-1])  # (classes, parts); the last row is of no class here
    for part, first in enumerate(classes["first"]):
        predicted = names.repeat_interleave(counts[:, part])
        if len(predicted):
            experiment.add_histogram(name, predicted, start + first, bins=edges.tolist())


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
