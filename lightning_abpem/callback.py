"""Test-time adaptation as a Lightning callback: its options, and its hooks in a Trainer's run."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.checkpoint import check_form
from lightning_abpem.engine.describe import changed_options
from lightning_abpem.engine.guard import Event
from lightning_abpem.engine.method import Method, Record
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.state_file import check_saved, read_state, write_state
from lightning_abpem.modules.patches import Changes, check_eval
from lightning_abpem.trainer import options
from lightning_abpem.trainer.notices import Display, say_over
from lightning_abpem.trainer.options import RunOptions, Stage, constructor_signature, documented, refuse_unknown
from lightning_abpem.trainer.reporting import RunReport, report_path, reported
from lightning_abpem.trainer.run import Outcome, Run
from lightning_abpem.trainer.strategies import check_trainer
from lightning_abpem.trainer.summary import Summary
from lightning_abpem.tuning.result import Tuning, expression
from lightning_abpem.tuning.runs import Forward, Labels
from lightning_abpem.tuning.search import RATES, tune

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TestTimeAdaptation"]

log = logging.getLogger(__name__)


@documented
class TestTimeAdaptation(Callback):
    """Adapts a model to each test batch without labels, by a method: what all methods' callbacks are.

    In `test` and `predict` the model's own step sees the adapted logits. Nothing in the LightningModule changes, and
    the source weights return after the run, also after a crash.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        method: which parameters move, and by what loss.
        fusion: for methods that adapt or watch the fusion attention; `ABPEM` documents it.
        modalities: for methods that watch it; `ABPEM` documents them.
        memory_batches: batches that the loss sees, the current one included; 1 is no memory.
        memory_at: the module whose input tokens are remembered.

    Attributes:
        record: figures of the last step, by name.
        summary: counts and averages of the last Trainer's run, which `rich` prints as a table; None before the first.
        updates: steps taken in the last run.
        skipped: steps not taken in the last run: the loss or a gradient was not finite, no sample was fit for one, or
            the batch could not be adapted.
        skipped_for: the same by reason, as counts.
        left_out: samples left out of steps in the last run, for their logits were not finite.
        events: what the guard did in the last run.
        averages: per dataloader, the last run's figures averaged over samples; of a run that failed, this process's.

    Raises:
        ValueError: an argument is out of its range, or does not fit the model (before any weight moves).
        MisconfigurationException: the Trainer is used in a way that cannot work.
    """

    __test__ = False  # no test case, whatever its name starts with
    __signature__: ClassVar[inspect.Signature]
    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = constructor_signature(cls)

    def __new__(cls, *args: object, **given: object) -> Self:
        refuse_unknown(cls, given)
        self = super().__new__(cls)
        self._given = args, given  # of the subclass, as they were written: for the line of `tune`
        return self

    def __init__(
        self,
        method: Method,
        fusion: options.FusionPatterns | None = None,
        modalities: options.Modalities | Sequence[str] = "auto",
        *,
        memory_batches: int = 1,
        memory_at: str | None = None,
        steps: int = 1,
        optimizer: options.OptimizerFactory | None = None,
        target: str | None = None,
        logits: options.Logits | None = None,
        reset: options.Reset = "never",
        restore: bool = True,
        replay: bool = True,
        predicts: options.Predicts | None = None,
        sync: options.Sync = "global",
        projections: options.Projections | None = None,
        learning_rate: options.LearningRate | None = None,
        clip_gradients: float | None = None,
        anchor: float = 0.0,
        max_step: float | None = None,
        max_drift: float | None = None,
        monitor: options.Monitor = 8,
        guard: options.GuardAction = "warn",
        on_error: options.OnError = "predict",
        stages: Sequence[options.Stage] = ("test", "predict"),
        verbose: options.Verbose = 1,
        figures: options.Chosen = "headline",
        report: options.Page | None = None,
    ) -> None:
        given = locals()
        self.settings = Settings(**{own.name: given[own.name] for own in fields(Settings) if own.init})
        run = RunOptions(**{own.name: given[own.name] for own in fields(RunOptions)})
        self.stages, self._report_path = run.stages, report_path(run.report)
        self.display = Display(run.verbose, run.figures)
        self._forget()

    def _forget(self) -> None:
        """Set the state that the callback has before its first run."""
        self.summary: Summary | None = None
        self.averages: dict[int, dict[str, Tensor]] = {}
        self._unshown: Summary | None = None
        self._outcome = Outcome()
        self._report: RunReport | None = None  # of the run under way
        self._logged = 0
        self._state: Mapping[str, Any] = {}  # of the last run
        self._loaded: Mapping[str, Any] | Path | None = None  # what the next one goes on from
        self._run: Run | None = None
        self._attached: Adaptation | None = None

    @property
    def updates(self) -> int:
        return (self._adaptation or self._outcome).updates

    @property
    def skipped(self) -> int:
        return sum(self.skipped_for.values())

    @property
    def skipped_for(self) -> dict[str, int]:
        return dict((self._adaptation or self._outcome).skipped_for)

    @property
    def left_out(self) -> int:
        return (self._adaptation or self._outcome).left_out

    @property
    def record(self) -> Record:
        return dict((self._adaptation or self._outcome).record)

    @property
    def events(self) -> list[Event]:
        return list((self._adaptation or self._outcome).events)

    @property
    def _adaptation(self) -> Adaptation | None:
        """The adaptation of the run, or of the `attach`, that is under way; None before its first batch."""
        return self._attached if self._run is None else self._run.adaptation

    def __repr__(self) -> str:
        return f"{type(self).__name__}({changed_options(self.settings)})"

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[Adaptation]:
        """The same engine without a Trainer: inside the block, calls of `model` (or `target`) adapt it.

        Raises:
            ValueError: what the constructor could not know: names without a match, a model that is in training mode or
                being adapted already, reset="dataloader".
            MisconfigurationException: this callback adapts already, in a Trainer's run or an `attach`.
        """
        if self.settings.reset == "dataloader":
            raise ValueError(
                'reset="dataloader" needs a Trainer. Call reset() on what `attach` gives, between loaders.'
            )
        self._refuse_second_use()
        report = self._new_report("attach")
        recorder = None if report is None else report.open(model)
        adaptation = Adaptation(model, self.settings, report=self.display.say, recorder=recorder)
        check_eval(model)
        # The changes are undone at the latest when this frame is gone.
        with reported(report, self._write), Changes() as changes:
            changes.note(partial(self._detach, adaptation))
            adaptation.__enter__()
            try:
                self.display.begin(adaptation)
                self._resume(adaptation)
                self._attached, self.averages = adaptation, {}
                yield adaptation
                adaptation.end_stream()
                if report is not None:
                    report.see_blocks(adaptation)
            except BaseException:
                adaptation.abandon()
                raise
        self._state = {**self._state, "over": True}
        if adaptation.calls == 0:
            rank_zero_warn("The `with` block ended without a call of the target: nothing was adapted.")

    def tune(
        self,
        model: nn.Module,
        data: object,
        *,
        rates: Sequence[float] = RATES,
        anchors: Sequence[float] | None = None,
        batches: int = 80,
        stage: Stage | None = None,
        forward: Forward | None = None,
        labels: Labels | None = None,
    ) -> Tuning:
        """Find the learning rate for a stream, without labels: each candidate adapts to its first batches.

        The source meets them first, then each candidate, from the source on, in a copy of the model. The model, the
        random number generators and this callback stay as they are. `lightning_abpem.tuning.search.tune` documents the
        arguments; see docs/tune for the rule, and how good it is.
        """
        self._refuse_second_use()
        stage = self.stages[0] if stage is None else stage
        anchors = [self.settings.anchor] if anchors is None else anchors
        return tune(self, model, data, rates, anchors, batches, stage, forward, labels)

    def candidate(self, rate: float, anchor: float, stage: Stage) -> TestTimeAdaptation:
        """Return this callback as it began, with another learning rate and anchor, for `tune`."""
        own = copy.copy(self)
        own._report_path = None  # a candidate's run is none of the user's
        own.settings = replace(self.settings, learning_rate=rate, anchor=anchor, sync="local")
        own.stages = (stage,)
        own.display = Display(verbose=0, figures="all")
        own._forget()
        return own

    def line(self, **changed: float) -> str:
        """Return the expression for this callback with some options changed."""
        args, given = self._given
        return expression(type(self).__name__, args, {**given, **changed})

    def _detach(self, adaptation: Adaptation) -> None:
        """Keep what an `attach` has come to, and close its adaptation; it can be called again."""
        try:
            if self._attached is adaptation:
                own = adaptation
                self._outcome = Outcome.of(own)
                self._state = adaptation.state_dict()
        finally:
            if self._attached is adaptation:
                self._attached = None
            adaptation.close()

    def _new_report(self, stage: Stage | Literal["attach"]) -> RunReport | None:
        """Return what is to be written of a run that begins; None for nothing."""
        return None if self._report_path is None else RunReport(self._report_path, self.settings, stage)

    def _write(
        self, report: RunReport | None, metrics: Mapping[str, object], error: BaseException | None = None
    ) -> None:
        if report is not None:
            report.write(self.updates, self.skipped_for, self.left_out, metrics, error)

    def state_dict(self, memory: bool = True) -> dict[str, Any]:
        """Return what the stream of this run, or of the last one, needs to go on; see `Adaptation.state_dict`.

        Lightning puts it into checkpoints. Empty if nothing was adapted yet. After a run that came to its end `over` is
        True in it.
        """
        if self._adaptation is not None:
            return self._adaptation.state_dict(memory)
        return dict(self._state) if memory or not self._state else {**self._state, "memory": []}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next run, or the next `attach`, go on from a state.

        Raises:
            ValueError: if it is no such state, or one of another method. What depends on the model is seen, and raised,
                when the run begins, before anything changes.
        """
        check_form(state_dict, self.settings.method.name)
        self._loaded = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave a state whose stream is over in its checkpoint: the run of another stream begins at the source."""
        states = checkpoint.get("callbacks", {})
        if states.get(self.state_key, {}).get("over"):
            del states[self.state_key]
            if trainer.state.fn in self.stages:
                say_over(self.settings.method.name, self.state_key)

    def save(self, path: str | Path, memory: bool = True) -> Path:
        """Write `state_dict` to a file, all of it or nothing.

        With several processes each writes its own, beside each other: of state.pt state-0-of-2.pt and state-1-of-2.pt.

        Returns:
            the file that was written.

        Raises:
            ValueError: if nothing was adapted yet.
        """
        state = self.state_dict(memory)
        if not state:
            raise ValueError("Expected a run before `save`, but nothing has been adapted yet.")
        return write_state(state, path)

    def load(self, path: str | Path) -> None:
        """Let the next run, or the next `attach`, go on from what `save` wrote; each process reads its own file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: see `load_state_dict`; also if the file is damaged.
        """
        check_saved(path, self.settings.method.name)
        self._loaded = Path(path)

    def _resume(self, adaptation: Adaptation) -> None:
        """Let an adaptation that begins go on from what was loaded; if that fails it stays loaded."""
        loaded = self._loaded
        if loaded is not None:
            adaptation.load_state_dict(
                read_state(loaded, self.settings.method.name) if isinstance(loaded, Path) else loaded
            )
            self._loaded = None

    # ----------------------------------------------------------------------- the hooks, in the order of a Trainer's run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._refuse_second_use()
        if stage == "fit":  # its checkpoints are of other weights than those that were adapted before
            self._state = {}
        for own_stage in self.stages:  # Lightning's is an enum that is equal to a string, but does not print as one
            if own_stage == stage:
                check_trainer(trainer, own_stage, TestTimeAdaptation)
                self._outcome, self.averages = Outcome(), {}
                self.summary = self._unshown = None
                report = self._new_report(own_stage)
                self._run = Run(trainer, own_stage, self.settings, self.display, self._logged, self._resume, report)
                self._run.start(first=self)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self._run.start_streams()

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        if self._run is not None:
            self._run.start_batch(dataloader_idx)
        elif trainer.state.fn in self.stages:
            raise MisconfigurationException(
                f"This callback does not adapt in this run of `trainer.{trainer.state.fn}`: its `setup` was not "
                "called, or an exception has ended the run already. Give it to the Trainer before the run, and do not "
                "go on after an exception."
            )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._run is not None:
            self._run.end_batch()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self._run.end_streams()
            self._run.see_blocks()
            self._run.log_averages()
            self._end(is_over=True)  # ahead of callbacks that swap weights back, as those of weight averages do

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._run is not None and self._run.trainer is trainer:
            try:
                self._run.start_streams()  # if Lightning skipped the loop, for this process has no batch
            finally:
                self._end()
        if self._unshown is not None:
            self.display.end(self._unshown)
        self._unshown = None
        if self._report is not None and stage in self.stages:
            # The user's own epoch ends, where metrics are logged too, come after this callback's.
            self._write(self._report, {} if stage == "predict" else trainer.callback_metrics)
            self._report = None
        if stage == "fit":
            self._loaded = None  # by a checkpoint that training went on from: of weights that are no more

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        run = self._run
        if run is not None and run.trainer is not trainer:  # of a second one, which was refused
            return
        try:
            try:
                if run is not None:
                    run.abandon()
            finally:
                self._end()
        except Exception as error:  # to raise it would hide the exception that ends the run
            log.warning("Another exception came up while %r ended the run: %r", exception, error)
        finally:
            report, self._report = self._report, None  # also of a run that failed after its last batch
            self._write(report, {}, exception)

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
    on_validation_epoch_end = on_predict_epoch_end = on_test_epoch_end

    def _refuse_second_use(self) -> None:
        """Raise if this callback adapts already; put back what a run left that could not come to its end."""
        run = self._run
        if run is not None and (run.phase == "closing" or run.trainer.state.status != TrainerStatus.RUNNING):
            self._end()
        if self._run is not None or self._attached is not None:
            where = "an `attach`" if self._run is None else f"`trainer.{self._run.stage}`"
            raise MisconfigurationException(
                f"This callback adapts in {where} already, which has not come to its end. Give each Trainer, and each "
                "`attach`, that is to run inside another a callback of its own."
            )

    def _end(self, is_over: bool = False) -> None:
        """Put everything back, unless that is done; keep the run's counts and its state.

        Args:
            is_over: the run came to its end, so that the next one begins at the source.
        """
        run = self._run
        if run is None:
            return
        try:
            run.close()
        finally:
            outcome = run.outcome or Outcome()
            self._outcome, self._logged = outcome._replace(state={}), run.figures.logged
            self.averages = dict(outcome.averages) or self.averages
            self.summary = run.summary()
            self._unshown = self.summary if is_over and run.is_verbose else None
            self._state = {**outcome.state, "over": is_over} if outcome.state else self._state
            self._report = run.report  # to be written in `teardown`
            if run.phase == "closed":
                self._run = None


TestTimeAdaptation.__signature__ = constructor_signature(TestTimeAdaptation)
