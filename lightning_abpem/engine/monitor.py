"""The model against its source while it adapts: compared every so many batches, and guarded by what that shows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_abpem.engine.batch import Batch
from lightning_abpem.engine.forward import Forward
from lightning_abpem.engine.guard import Guard
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.watch import Watch
from lightning_abpem.engine.weights import AdaptedWeights

__all__ = ["Monitor"]


class Monitor:
    """Compares the model with its source, and lets the guard act on what was seen.

    Args:
        settings: how often to compare, and what the guard does.
        weights: the adapted ones.
        forward: runs the source on a batch.

    Attributes:
        weights: those that predict.
        guard: judges what is seen.
    """

    def __init__(self, settings: Settings, weights: AdaptedWeights, forward: Forward) -> None:
        self._settings, self.weights, self._forward = settings, weights, forward
        self._watch, self.guard = Watch(), Guard(settings.guard)
        self._batches = 0  # that took part in steps
        self._has_acted = False  # the guard, before this batch

    def act(self) -> None:
        """Let the guard act on what the last batch showed; after that the running means begin anew."""
        event = self.guard.act(self.weights)
        self._has_acted = event is not None
        if event is not None and self._settings.guard != "warn":
            self._watch.forget()

    def see(self, batch: Batch, loss: Tensor) -> dict[str, Tensor]:
        """Compare the model as it is before the step with the source, if that is due; return the figures.

        The guard judges by them. What it says is read at the next batch.

        Args:
            batch: seen by the model already.
            loss: of the step, on whose device the figures are.
        """
        every, self._batches = self._settings.monitored_batches, self._batches + 1
        if not every or self._batches % every:
            return {}
        ranks, own, source = self._forward.ranks, batch.logits, batch.logits
        if batch.is_own and not self.weights.are_source:
            with self.weights.at_source():
                source = batch.seen_of(self._forward.predict(batch.args, batch.kwargs))
        figures = self._watch.see(own, source, None if ranks is None else ranks.total)
        figures["drift"] = self.weights.drift.to(loss.device)  # of no weights it is on the host
        if self._settings.guard != "off":
            if (means := self._watch.means) is not None:
                self.guard.judge(means)
            figures["guard"] = figures["drift"].new_full((), float(self._has_acted))
        return figures

    def reset(self) -> None:
        """Begin anew with the source's weights."""
        self.guard.reset()
        self._watch.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what a stream needs to go on."""
        return {"watch": self._watch.state(), "guard": self.guard.state_dict(), "monitored": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned, on the device of the weights."""
        self._watch.sums, self._batches = state["watch"], state["monitored"]
        self.guard.load_state_dict(state["guard"], self._watch.means)
