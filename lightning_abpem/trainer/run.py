"""One run of a Trainer's loop with the engine in it, from setup to its end or an exception."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.guard import Event
from lightning_abpem.engine.loss_scale import LossScale
from lightning_abpem.engine.peers import Peers
from lightning_abpem.engine.ranks import Ranks
from lightning_abpem.engine.settings import Settings
from lightning_abpem.modules.patches import Changes
from lightning_abpem.trainer.figures import Figures
from lightning_abpem.trainer.notices import Display, log_options
from lightning_abpem.trainer.options import Stage
from lightning_abpem.trainer.pictures import log_pictures
from lightning_abpem.trainer.reporting import RunReport
from lightning_abpem.trainer.streams import Streams
from lightning_abpem.trainer.summary import Summary

__all__ = ["Outcome", "Run"]

_PATIENCE = 20  # steps without a call of the target


class Outcome(NamedTuple):
    """Result of a run: counts, the guard's events, averages, the last step's figures, seconds, calls, and the state.

    The state is empty if the adaptation never began.
    """

    updates: int = 0
    skipped_for: Mapping[str, int] = {}
    events: Sequence[Event] = ()
    record: Mapping[str, Tensor] = {}
    seconds: float = 0.0
    calls: int = 0
    averages: Mapping[int, dict[str, Tensor]] = {}
    state: Mapping[str, Any] = {}
    left_out: int = 0

    @classmethod
    def of(cls, own: Adaptation) -> Outcome:
        """Return what an adaptation has come to so far."""
        counts = (own.updates, own.skipped_for, own.events, own.record, own.seconds, own.calls)
        return cls(*counts, left_out=own.left_out)


class Run:
    """One run of a Trainer's loop with the engine in it. Nothing changes before `start`.

    Args:
        trainer: the Trainer.
        stage: its function.
        settings: the engine's.
        display: what is shown and said.
        logged: steps handed to the loggers so far, over all runs of the callback.
        resume: called with the adaptation when it begins, to load a state.
        report: what is to be written of the run; None for nothing.

    Attributes:
        adaptation: from the first batch on, until the end.
        figures: what is logged.
        outcome: known once the end has begun.
        phase: "closing" from the first call of `close`, "closed" after one that put everything back.
    """

    def __init__(
        self,
        trainer: Any,
        stage: Stage,
        settings: Settings,
        display: Display,
        logged: int,
        resume: Callable[[Adaptation], None],
        report: RunReport | None = None,
    ) -> None:
        self.trainer, self.stage, self._settings, self._resume = trainer, stage, settings, resume
        self._display, self._without_call, self._began = display, 0, time.perf_counter()
        self.report = report
        self.adaptation: Adaptation | None = None
        compares_all = settings.monitored_batches == 1
        self.figures = Figures(trainer, settings.method.name.lower(), stage, logged, display.figures, compares_all)
        self.outcome: Outcome | None = None
        self._first = logged
        self.phase: Literal["running", "closing", "closed"] = "running"
        self._peers: Peers | None = None  # where each process adapts on its own stream
        self._streams = Streams(getattr(trainer, f"{stage}_loop"), trainer.world_size)
        self._changes = Changes()

    @property
    def is_verbose(self) -> bool:
        """False for `trainer.test(verbose=False)`."""
        return bool(getattr(getattr(self.trainer, f"{self.stage}_loop"), "verbose", True))

    def start(self, first: Callback) -> None:
        """Change the Trainer for the run.

        Raises:
            ValueError: in all processes, if the report cannot be written.

        In normal mode nothing that the loop makes (batches, metrics, lazy buffers) is an inference tensor, which
        autograd refuses.

        Args:
            first: the callback whose hooks come first, so that no other can fail before it has put everything back.
        """
        if self.figures.logged == 0:
            log_options(
                self._settings, self.trainer.loggers
            )  # by now, for Lightning writes them before the first batch
        self._changes.note(self.figures.flush)
        callbacks = sorted(self.trainer.callbacks, key=lambda other: other is not first)
        self._changes.set(self.trainer, "callbacks", callbacks)
        if self.report is not None:
            problem = self.trainer.strategy.broadcast(self.report.problem())  # so that all processes stop
            if problem is not None:
                raise ValueError(problem)
        loop = getattr(self.trainer, f"{self.stage}_loop")
        if hasattr(loop, "inference_mode"):  # no documented name; without it the engine copies what it has to
            self._changes.set(loop, "inference_mode", False)

    def start_streams(self) -> None:
        """Compare the lengths of the dataloaders between processes, if that has not been done.

        Raises:
            RuntimeError: in all processes, if one has no batch of a dataloader of which another has some.
        """
        self._streams.compare_lengths()
        if self._settings.sync == "local" and self._streams.processes > 1 and self._peers is None:
            self._peers = Peers()

    def start_batch(self, dataloader: int | None) -> None:
        """Open the engine at the first batch: by then everybody has loaded their weights and set their modes.

        Args:
            dataloader: the index that Lightning gives to the hooks; None if they get none.
        """
        self._open()
        self._go_on_to(self._streams.place(dataloader))
        self._streams.has_batch = True
        self._show()

    def end_batch(self) -> None:
        """Warn if the first step did not call the target; raise if many have not."""
        assert self.adaptation is not None
        if self.adaptation.calls == 0:
            self._without_call += 1
            if self._without_call == 1:
                rank_zero_warn(f"{self._missing_call()} Steps that skip their batch are waited for.")
            if self._without_call == _PATIENCE:
                raise MisconfigurationException(self._missing_call())
        self._show()
        if self.stage != "predict" and self.adaptation.record:
            self.figures.show_step(self.trainer.lightning_module, self.adaptation.record)

    def _missing_call(self) -> str:
        assert self.adaptation is not None
        target = self.adaptation.settings.target
        return (
            f"{self._without_call} {self.stage} steps ended without calling "
            f"{f'`{target}`' if target else 'the LightningModule'}, so nothing was adapted. Set the callback's "
            "`target` to the name of the module that the step calls with the batch."
        )

    def end_streams(self) -> None:
        """Take part in the other processes' steps until the last of their streams ends.

        Raises:
            MisconfigurationException: if no step has called the target.
        """
        if self._without_call and self.adaptation is not None and self.adaptation.calls == 0:
            raise MisconfigurationException(self._missing_call())
        if self._streams.processes > 1:
            self._go_on_to(self._streams.last)
            self._leave()
            if self._settings.sync == "global":
                self._drain(is_last=True)
            self._streams.awaited = None
        if self.adaptation is not None:
            self.adaptation.end_stream()

    def averages(self) -> dict[int, dict[str, Tensor]]:
        """Return the averages of the figures by dataloader and name."""
        return self.figures.averages()

    def see_blocks(self) -> None:
        """Look at the fusion's attention for the report, and show loggers what was gathered for it."""
        if self.report is None or self.report.recorder is None:
            return
        self.report.see_blocks(self.adaptation)
        classes, blocks = self.report.recorder.pictures()
        prefix = f"{self._settings.method.name.lower()}/{self.stage}"
        log_pictures(self.trainer.loggers, prefix, classes, blocks, self._first)

    def log_averages(self) -> None:
        """Hand the averages that Lightning does not log to the loggers: in predict, where it has no results, all."""
        self.figures.log_averages(self._streams.suffix)

    def summary(self) -> Summary | None:
        """Return what the run came to; None if nothing adapted."""
        if self.outcome is None:
            return None
        own = self.outcome
        return Summary(
            f"{self._settings.method.name} in {self.stage}",
            self.averages(),
            batches=own.calls,
            updates=own.updates,
            skipped_for=own.skipped_for,
            left_out=own.left_out,
            monitored=self._settings.monitored_batches,
            seconds=own.seconds,
            total=time.perf_counter() - self._began,
            events=own.events,
        )

    def abandon(self) -> None:
        """Tell the other processes, where they expect something of this one, that it fails."""
        if self._streams.abandon():
            return
        if self._peers is not None:
            if self._streams.awaited is not None:
                self._peers.abandon()
        elif self.adaptation is not None:
            self.adaptation.abandon()
        elif self._streams.awaited == "batch":  # it has not come to its first one
            Ranks(self.trainer.lightning_module.device).abandon()

    def close(self) -> None:
        """Put everything back, the weights first; to be called again until it raises nothing.

        Raises:
            BaseException: an error on the way, after everything else is put back.
        """
        self.phase = "closing"
        self._changes.close()
        self.phase = "closed"

    def _close_adaptation(self) -> None:
        if self.adaptation is None:
            return
        try:
            if self.outcome is None:  # the second time the weights may be back
                own = self.adaptation
                self.outcome = Outcome.of(own)
                self.outcome = self.outcome._replace(averages=self.averages())
                self.outcome = self.outcome._replace(state=own.state_dict())
        finally:
            self.adaptation.close()
            self.adaptation = None

    def _open(self) -> Adaptation:
        if self.adaptation is None:
            scale = LossScale.like(getattr(self.trainer.precision_plugin, "scaler", None))
            model = self.trainer.lightning_module
            recorder = None if self.report is None else self.report.record(model.device)
            self.adaptation = Adaptation(
                *(model, self._settings, self._on_step, self._display.say, scale), recorder=recorder
            )
            self._changes.note(self._close_adaptation)
            try:
                self.adaptation.__enter__()
            except Exception:  # after which it has closed itself
                self.adaptation = None
                raise
            self._display.begin(self.adaptation)
            self._resume(self.adaptation)
        return self.adaptation

    def _go_on_to(self, dataloader: int) -> None:
        """Leave the dataloaders before this one, each together with all processes."""
        while self._streams.dataloader < dataloader:
            self._leave()
            if self._settings.reset == "dataloader" and self._streams.has_batch:
                adaptation = self._open()
                adaptation.reset() if self._streams.processes == 1 else adaptation.reset_next()
            self._streams.go_on()

    def _leave(self) -> None:
        """Take part in the other processes' steps until none has a batch of the current dataloader."""
        streams = self._streams
        if not streams.is_left and streams.processes > 1:
            streams.is_left = True
            if self._peers is not None:
                device = self.trainer.lightning_module.device
                self.figures.merge(streams.dataloader, streams.has_batch, device, self._peers)
            else:
                self._drain(is_empty=not streams.has_batch)

    def _drain(self, **place: bool) -> None:
        with self.trainer.precision_plugin.forward_context():  # as around a step
            self._open().drain(**place)

    def _show(self) -> None:
        if self.stage != "predict":
            self.figures.show(self.trainer.lightning_module, self._streams.dataloader, self._leave)

    def _on_step(self, record: dict[str, Tensor], samples: int) -> None:
        dataloader = self._streams.dataloader
        if self.report is not None and self.report.recorder is not None:
            self.report.recorder.dataloader = dataloader
        self.figures.add(record, samples, dataloader, self._streams.suffix(dataloader))
