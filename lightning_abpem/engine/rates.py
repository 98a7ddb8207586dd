"""Several learning rates side by side: each has a course of its own, and the best one predicts.

All courses meet the same batches, and the frozen encoders run once for all of them. Which one predicts the next batch
is told by predictions alone, as they are before each step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_abpem.engine.course import Course
from lightning_abpem.engine.flags import DeviceFlags
from lightning_abpem.engine.guard import is_harm
from lightning_abpem.engine.watch import SAMPLES_PER_CLASS, Means
from lightning_abpem.functional import entropy, information_of, widen

__all__ = ["Rates", "batch_sums", "scores"]

log = logging.getLogger(__name__)

AGREEMENT = 0.5
"""The weight of agreement, beside information as a share of ln C. Chosen on the development split of the digits, as
are the rates of "auto"."""
_LEAST = 16  # samples, before which the first rate predicts
_NO_ENTROPY = 1e6  # in nats, for each sample of a batch for which a course predicts nothing that is finite


class Rates:
    """The courses of several learning rates, and the choice between them.

    Samples count as in `Watch`: with n samples after it and C classes, one counts by exp(-n / (5 C)).

    Args:
        rates: the learning rates, ascending. The first one predicts until enough samples have been seen.
        courses: one for each.

    Attributes:
        leader: the place of the course that predicts.
        sums: over the last samples, as `batch_sums` has them; None before the first batch.
    """

    def __init__(self, rates: Sequence[float | None], courses: Sequence[Course]) -> None:
        self.rates, self.courses, self.leader = [rate for rate in rates if rate is not None], list(courses), 0
        self.sums: Tensor | None = None
        self._best: DeviceFlags | None = None

    @property
    def followers(self) -> list[Course]:
        """The courses that do not predict."""
        return [course for i, course in enumerate(self.courses) if i != self.leader]

    def choose(self) -> Course:
        """Return the course that predicts, by what the batches so far have shown."""
        best, self._best = self._best, None
        flags = [] if best is None else best.read()
        if True in flags and not flags[self.leader]:
            self.leader = flags.index(True)
            log.info("The learning rate %g predicts from here on.", self.rates[self.leader])
        return self.courses[self.leader]

    def see(
        self, logits: Sequence[Tensor | None], source: Tensor | None, total: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Take in a batch. Nothing here waits for the device.

        Args:
            logits: (B, C) of each course, as it was before its step; None if this process has no batch.
            source: (B, C) of the source model.
            total: sums over processes; None for one.
        """
        there = [widen(own) for own in logits if own is not None]
        batch = torch.zeros(0)
        if source is not None and len(there) == len(self.courses):
            batch = batch_sums(torch.stack(there), widen(source))
        if total is not None:
            batch = total(batch.flatten()).view(len(self.courses) + 1, -1)
        if not batch.numel():
            return
        classes = batch.shape[1] - 2
        kept = (-batch[0, 0] / (SAMPLES_PER_CLASS * classes)).exp()
        is_known = self.sums is not None and self.sums.shape == batch.shape
        before = self.sums.to(batch) if self.sums is not None and is_known else torch.zeros_like(batch)
        self.sums = torch.where(batch[0].isfinite().all(), kept * before + _without_broken(batch), before)
        self._look()

    def reset(self) -> None:
        """Begin anew, with the source's weights in every course; none of them is in the model."""
        for course in self.courses:
            course.reset()
            course.weights.leave()
        self.leader, self.sums, self._best = 0, None, None

    def state_dict(self) -> dict[str, Any]:
        """Return what a stream needs to go on, but for the course that predicts."""
        others = [course.state_dict() for course in self.followers]
        return {"leader": self.leader, "sums": self.sums, "others": others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the leader and the sums of what `state_dict` returned."""
        self.leader, self.sums, self._best = state["leader"], state["sums"], None
        if self.sums is not None:
            self._look()

    def _look(self) -> None:
        assert self.sums is not None
        own, is_known = scores(self.sums), self.sums[0, 0] >= _LEAST
        self._best = DeviceFlags(*((own == own.max()) & is_known).unbind())


def batch_sums(logits: Tensor, source: Tensor) -> Tensor:
    """Return what a batch adds to the running sums.

    Args:
        logits: (K, B, C) of K courses.
        source: (B, C) of the source model.

    Returns:
        (K + 1, C + 2). The first row is the source's: samples, entropy, and its predictions. The others are the
        courses': agreement, entropy, predictions. Agreement is the probability that the source and all courses, on
        average, give to the class that a course predicts. Those that predict NaN have no part in it.
    """
    every = torch.cat([source.unsqueeze(0).to(logits), logits])
    p = every.softmax(-1)
    together = p.nanmean(0).expand_as(logits)
    agreed = together.gather(-1, logits.argmax(-1, keepdim=True)).sum((1, 2))
    first = torch.cat([agreed.new_full((1,), source.shape[0]), agreed])
    return torch.cat([torch.stack([first, entropy(every).sum(1)], 1), p.sum(1)], 1)


def _without_broken(batch: Tensor) -> Tensor:
    """Return the same with finite rows of courses that predict NaN: they tell nothing of any sample."""
    is_finite = batch.isfinite().all(1, keepdim=True)
    nothing = torch.zeros_like(batch)
    nothing[:, 1] = _NO_ENTROPY * batch[0, 0]
    return torch.where(is_finite, batch, nothing)


def scores(sums: Tensor) -> Tensor:
    """Return how good each course's predictions look, without labels: (K,).

    It is information as a share of ln C, and half of the mean agreement. A course whose harm is above the guard's limit
    has -inf, but for the first one.

    Args:
        sums: (K + 1, C + 2), as `batch_sums` has them, over several batches.
    """
    samples, means = sums[0, 0], sums[:, 1:] / sums[0, 0]
    unit = math.log(sums.shape[1] - 2)
    own = [Means(row[0], means[0, 0], row[1:], means[0, 1:], samples) for row in means[1:]]
    information = torch.stack([information_of(x.share, x.entropy) for x in own]) / unit
    is_out = torch.stack([is_harm(x) for x in own])
    is_out[0] = False
    return (information + AGREEMENT * sums[1:, 0] / samples).masked_fill(is_out, -math.inf)
