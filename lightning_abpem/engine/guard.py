"""A guard over the adapted weights: it sees, without labels, that adapting does harm, and takes it back."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_abpem.engine.flags import DeviceFlags
from lightning_abpem.engine.options import GuardAction
from lightning_abpem.engine.watch import Means
from lightning_abpem.engine.weights import AdaptedWeights
from lightning_abpem.functional import entropy_of

__all__ = ["Event", "Guard", "harm", "is_harm"]

log = logging.getLogger(__name__)

LIMIT, CREDIT = 0.03, 0.1
"""Harm that is too much, and how much of it evener classes can make up for: shares of ln C. Chosen on the
development split of the digits; docs/reliability has what they reach on the test split."""
_LEAST, _LEAST_PER_CLASS = 32, 3  # samples, the fewer of both: with less than that the means say little
_PERIOD, _KEPT = 8, 3  # batches between two copies of good weights, and how many are kept
_SLOWER = 0.3  # of the learning rate is left after weights were taken back


@dataclass(frozen=True)
class Event:
    """One time that the guard acted.

    Args:
        batch: how many batches had been compared with the source, in this run.
        update: how many steps had been taken.
        action: what it did.
        cause: what it saw, in words and numbers.
    """

    batch: int
    update: int
    action: str
    cause: str


def harm(means: Means) -> Tensor:
    """Return how much less sure than the source the adapted model is, as a share of ln C: a scalar.

    (H - H_source - min(G, 0.1 ln C)) / ln C. H is the mean entropy of a prediction. G is how much larger the entropy of
    the mean prediction is than the source's. A model that spreads over more classes may be less sure, up to a point.
    Where a sensor fails the source may predict one class for all. Collapse makes G negative, which counts in full.
    """
    unit = math.log(len(means.share))
    evener = (entropy_of(means.share) - entropy_of(means.source_share)).clamp(max=CREDIT * unit)
    return (means.entropy - means.source_entropy - evener) / unit


def is_harm(means: Means) -> Tensor:
    """Return a bool scalar: True if that is more than 0.03."""
    return harm(means) > LIMIT


class Guard:
    """Judges the running means after each batch, and acts at the next one if they say harm.

    Args:
        action: "rollback" puts the last good weights back, the source's if there are none, and goes on with less of the
            learning rate. "reset" puts the source's back. "freeze" does so and takes no more steps. "warn" only says
            so.

    Attributes:
        events: what it did in this run.
        is_frozen: True after "freeze", until a reset.
    """

    def __init__(self, action: GuardAction) -> None:
        self.action = action
        self.events: list[Event] = []
        self.is_frozen = self._is_warned = False
        self._batches = self._since_copy = 0
        self._good: deque[list[Tensor]] = deque(maxlen=_KEPT)
        self._seen: tuple[DeviceFlags, Means] | None = None

    def judge(self, means: Means) -> None:
        """Take in the running means after a batch. Nothing here waits for the device."""
        self._batches += 1
        self._look(means)

    def _look(self, means: Means) -> None:
        least = min(_LEAST, _LEAST_PER_CLASS * len(means.share))
        self._seen = DeviceFlags(is_harm(means), means.samples >= least), means

    def act(self, weights: AdaptedWeights) -> Event | None:
        """Act on what the last batch said; return what was done. The weights are those that the batch has left."""
        seen, self._seen = self._seen, None
        if seen is None or self.is_frozen:
            return None
        flags, means = seen
        is_harm, is_known = flags.read()
        if not is_known:
            return None
        if not is_harm:
            self._keep(weights)
            self._is_warned = False
            return None
        if weights.are_source or (self.action == "warn" and self._is_warned):
            return None
        event = Event(self._batches, weights.updates, self.action, _cause(means))
        self.events.append(event)
        log.warning("Adapting does harm: %s. %s", event.cause, self._take_back(weights))
        return event

    def reset(self) -> None:
        """Begin anew with the source's weights, not frozen."""
        self.is_frozen = self._is_warned = False
        self._since_copy, self._seen = 0, None
        self._good.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a stream needs to go on: good weights, events and counts."""
        return {
            "good": [list(values) for values in self._good],
            "events": [asdict(event) for event in self.events],
            "counts": [self._batches, self._since_copy],
            "flags": [self.is_frozen, self._is_warned, self._seen is not None],
        }

    def load_state_dict(self, state: Mapping[str, Any], means: Means | None) -> None:
        """Go on with what `state_dict` returned, and the running means of that time."""
        self.reset()
        self._good.extend([list(values) for values in state["good"]])
        self.events = [Event(**event) for event in state["events"]]
        self._batches, self._since_copy = state["counts"]
        self.is_frozen, self._is_warned, is_judged = state["flags"]
        if is_judged and means is not None:
            self._look(means)

    def _keep(self, weights: AdaptedWeights) -> None:
        self._since_copy += 1
        if self.action == "rollback" and self._since_copy >= _PERIOD:
            self._since_copy = 0
            self._good.append(weights.copied())

    def _take_back(self, weights: AdaptedWeights) -> str:
        """Do what the action says; return it in words."""
        self._is_warned, self._since_copy = True, 0
        if self.action == "warn":
            return "The weights stay as they are: see `guard`."
        if self.action == "rollback" and self._good:
            weights.go_back(self._good[0], _SLOWER)
            self._good.clear()
            return f"Earlier weights are back, and {_SLOWER:g} of the learning rate goes on."
        weights.go_back(None, _SLOWER if self.action == "rollback" else 1)
        self.is_frozen = self.action == "freeze"
        if self.is_frozen:
            return "The source's weights are back, and no step is taken until a reset."
        slower = f", and {_SLOWER:g} of the learning rate goes on" if self.action == "rollback" else ""
        return f"The source's weights are back{slower}."


def _cause(means: Means) -> str:
    used, source = entropy_of(means.share).exp().item(), entropy_of(means.source_share).exp().item()
    return (
        f"over the last {means.samples.item():.0f} samples the entropy is {means.entropy.item():.2f} nats, the "
        f"source's {means.source_entropy.item():.2f}, with as many as {used:.1f} classes predicted evenly, the "
        f"source's {source:.1f}"
    )
