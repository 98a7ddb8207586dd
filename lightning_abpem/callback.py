"""Test-time adaptation as a Lightning callback: the engine's lifecycle in a Trainer's run, its log, its averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_abpem.adaptation import Adaptation
from lightning_abpem.fusion import FusionPatterns
from lightning_abpem.method import Method, Predicts
from lightning_abpem.metrics import RecordMean
from lightning_abpem.settings import OptimizerFactory, Reset, Settings, default_optimizer
from lightning_abpem.spans import Modalities

__all__ = ["Options", "Stage", "TestTimeAdaptation"]

Stage = Literal["test", "predict", "validate"]


class Options(TypedDict, total=False):
    """The options that all methods share; `TestTimeAdaptation` documents them."""

    steps: int
    optimizer: OptimizerFactory
    target: str | None
    logits: Callable[..., Any] | None
    reset: Reset
    restore: bool
    stages: Sequence[Stage]
    replay: bool
    predicts: Predicts | None


class TestTimeAdaptation(Callback):
    """Adapts a model to each test batch without labels, by a method: what all methods' callbacks are.

    In `test` and `predict` the model's own step sees the adapted logits; nothing in the LightningModule changes, and
    the source weights return after the run, also after a crash.

    Args:
        method: which parameters move, and by what loss.
        fusion: for methods that adapt or watch the fusion attention; `ABPEM` documents it.
        modalities: for methods that watch it; `ABPEM` documents them.
        memory_batches: batches that the loss sees, the current one included; 1 is no memory.
        memory_at: the module whose input tokens are remembered.
        steps: updates per call; 0 observes only: all figures are recorded and no weight moves.
        optimizer: from parameters to a torch optimizer. Default: Adam, lr 1e-4.
        target: the module whose call adapts. Default: the LightningModule itself; set it if the step calls a submodule
            directly.
        logits: from the target's output to (B, C) logits, where it is not a tensor, `.logits`, `["logits"]` or a
            tuple's only (B, C) tensor.
        reset: when the source model returns: "never" within a run, before each "batch" (episodic), at each new
            "dataloader", or after that many updates.
        restore: put the source weights back after the run; False keeps the adapted ones.
        stages: the Trainer's functions that adapt: "test", "predict", "validate". Never inside `fit`.
        replay: compute the frozen part of the model once per batch; False computes it in every pass.
        predicts: whether the step sees predictions from "after" the update to its batch or from "before" it. Default:
            as the method's paper has it.

    Attributes:
        updates: steps taken in the last run.
        skipped: steps not taken in the last run, because the loss or a gradient was not finite.
        averages: per dataloader, the last run's figures averaged over samples.

    Raises:
        ValueError: an argument is out of its range, or does not fit the model (before any weight moves).
        MisconfigurationException: the Trainer is used in a way that cannot work.
    """

    __test__ = False  # no test case, whatever its name starts with

    def __init__(
        self,
        method: Method,
        fusion: FusionPatterns | None = None,
        modalities: Modalities | Sequence[str] = "auto",
        *,
        memory_batches: int = 1,
        memory_at: str | None = None,
        steps: int = 1,
        optimizer: OptimizerFactory = default_optimizer,
        target: str | None = None,
        logits: Callable[..., Any] | None = None,
        reset: Reset = "never",
        restore: bool = True,
        stages: Sequence[Stage] = ("test", "predict"),
        replay: bool = True,
        predicts: Predicts | None = None,
    ) -> None:
        self.settings = Settings(
            method=method,
            fusion=fusion,
            modalities=modalities,
            memory_batches=memory_batches,
            memory_at=memory_at,
            steps=steps,
            optimizer=optimizer,
            target=target,
            logits=logits,
            reset=reset,
            restore=restore,
            replay=replay,
            predicts=predicts,
        )
        unknown = set(stages) - {"test", "predict", "validate"}
        if unknown or not stages or isinstance(stages, str):
            raise ValueError(f'Expected `stages` to hold some of "test", "predict", "validate", but got {stages!r}.')
        self.stages = tuple(stages)
        self._counts = (0, 0)
        self.averages: dict[int, dict[str, Tensor]] = {}
        self._logged = 0
        self._run: _Run | None = None

    @property
    def updates(self) -> int:
        return self._counts[0] if self._run is None else self._run.counts[0]

    @property
    def skipped(self) -> int:
        return self._counts[1] if self._run is None else self._run.counts[1]

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[Adaptation]:
        """The same engine without a Trainer: inside the block, calls of `model` (or `target`) adapt it.

        Raises:
            ValueError: what the constructor could not know: names without a match, a model that is in training mode or
                being adapted already, reset="dataloader".
        """
        if self.settings.reset == "dataloader":
            raise ValueError(
                'reset="dataloader" needs a Trainer. Call reset() on what `attach` gives, between loaders.'
            )
        with Adaptation(model, self.settings, report=rank_zero_info) as adaptation:
            yield adaptation
            if adaptation.calls == 0:
                rank_zero_warn("The `with` block ended without a call of the target: nothing was adapted.")

    # ----------------------------------------------------------------------- the hooks, in the order of a Trainer's run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()  # a run that crashed before it could
        for own_stage in self.stages:  # Lightning's is an enum that is equal to a string, but does not print as one
            if own_stage == stage:
                _check_trainer(trainer)
                self._counts, self.averages = (0, 0), {}
                self._run = _Run(trainer, pl_module, own_stage, self.settings.method.name.lower(), self._logged)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._run is not None:
            self._run.start_batch(self.settings, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._run is not None:
            self._run.end_batch()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self.averages = self._run.averages()
            if self._run.stage == "predict":  # there Lightning has no results and refuses to log
                self._run.log(self._run.named(self.averages))
            else:
                pl_module.log_dict(self._run.named(self.averages), add_dataloader_idx=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
    on_validation_epoch_end = on_predict_epoch_end = on_test_epoch_end

    def _end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()
            self._counts, self._logged = run.counts, run.logged


class _Run:
    """One run of a Trainer's loop with the engine in it, from setup to teardown or an exception."""

    def __init__(self, trainer: Any, module: LightningModule, stage: Stage, prefix: str, logged: int) -> None:
        self.trainer, self.module, self.stage, self._prefix = trainer, module, stage, prefix
        self.logged = logged  # steps handed to the loggers, over all runs of the callback
        self.adaptation: Adaptation | None = None
        self._means: dict[int, RecordMean] = {}
        self._pending: list[dict[str, Tensor]] = []
        self._dataloader = 0
        self._training = {m: m.training for m in module.modules()}
        # First in line, so that an exception in another callback's on_exception cannot keep this one from restoring.
        self._callbacks = trainer.callbacks
        trainer.callbacks = sorted(trainer.callbacks, key=lambda callback: not isinstance(callback, TestTimeAdaptation))
        # In normal mode from the start, nothing the loop makes (batches, metrics, lazy buffers) is an inference tensor.
        self._loop: Any = getattr(trainer, f"{stage}_loop")
        self._inference_mode = getattr(self._loop, "inference_mode", None)
        if self._inference_mode is not None:
            self._loop.inference_mode = False

    def start_batch(self, settings: Settings, dataloader: int) -> None:
        """Open the engine at the first batch: by then everybody has loaded their weights and set their modes."""
        if self.adaptation is None:
            self.adaptation = Adaptation(self.module, settings, self._on_step, rank_zero_info).__enter__()
        elif dataloader != self._dataloader and settings.reset == "dataloader":
            self.adaptation.reset()
        self._dataloader = dataloader

    def end_batch(self) -> None:
        """Hold the step against what it should have done: to call the target."""
        assert self.adaptation is not None
        if self.adaptation.calls == 0:
            target = self.adaptation.settings.target
            raise MisconfigurationException(
                f"The {self.stage} step ended without calling {f'`{target}`' if target else 'the LightningModule'}, so "
                "nothing was adapted. Set the callback's `target` to the name of the module that the step calls with "
                "the batch, and call it as a function, not by its `.forward`."
            )

    @property
    def counts(self) -> tuple[int, int]:
        """The updates taken and the steps skipped so far."""
        return (0, 0) if self.adaptation is None else (self.adaptation.updates, self.adaptation.skipped)

    def averages(self) -> dict[int, dict[str, Tensor]]:
        """The figures' means so far, by dataloader."""
        return {dataloader: mean.compute() for dataloader, mean in self._means.items()}

    def log(self, figures: dict[str, Tensor]) -> None:
        """Hand figures to the loggers, after the last step."""
        self._flush()
        for logger in self.trainer.loggers:
            logger.log_metrics({name: value.item() for name, value in figures.items()}, step=self.logged)

    def named(self, averages: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The averages under the names of the result dict, with the dataloader's where the run has several."""
        batches = {"test": "num_test_batches", "predict": "num_predict_batches", "validate": "num_val_batches"}
        several = len(getattr(self.trainer, batches[self.stage])) > 1
        return {
            f"{self._prefix}/{name}" + (f"/dataloader_idx_{dataloader}" if several else ""): value
            for dataloader, means in averages.items()
            for name, value in means.items()
        }

    def close(self) -> None:
        """Put everything back."""
        self.trainer.callbacks = self._callbacks
        if self._inference_mode is not None:
            self._loop.inference_mode = self._inference_mode
        for module, training in self._training.items():
            module.training = training
        if self.adaptation is not None:
            self.adaptation.close()
            self._flush()

    def _on_step(self, record: dict[str, Tensor], samples: int) -> None:
        if self._dataloader not in self._means:
            self._means[self._dataloader] = _new_mean(record)
        self._means[self._dataloader].update(record, samples)
        if self.trainer.loggers and self.trainer.log_every_n_steps > 0:
            self._pending.append(record)
            if len(self._pending) >= self.trainer.log_every_n_steps:
                self._flush()

    def _flush(self) -> None:
        """Hand each pending step to the loggers: one copy from the device for all of them."""
        if not self._pending:
            return
        names = list(self._pending[0])
        table = torch.stack([torch.stack([record[n].float() for n in names]) for record in self._pending])
        for row in table.tolist():
            figures = {f"{self._prefix}/{name}_step": value for name, value in zip(names, row, strict=True)}
            for logger in self.trainer.loggers:
                logger.log_metrics(figures, step=self.logged)
            self.logged += 1
        self._pending.clear()


def _new_mean(record: dict[str, Tensor]) -> RecordMean:
    mean = RecordMean(list(record))
    device = record["loss"].device
    if device.type == "mps":  # which has no float64
        mean.set_dtype(torch.float32)
    return mean.to(device)


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"This is a callback of `lightning.pytorch`, but got a Trainer from `{type(trainer).__module__}`. Import "
            "Trainer and LightningModule from `lightning.pytorch` (`pytorch_lightning` is a separate copy of it)."
        )
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"Adaptation runs in one process so far, but the Trainer runs {trainer.world_size}: their weights would "
            "part ways. Use devices=1, num_nodes=1."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unannounced
    count = sum(isinstance(callback, TestTimeAdaptation) for callback in callbacks)
    if count > 1:
        raise MisconfigurationException(
            f"Expected one callback that adapts, but the Trainer has {count}: each would adapt the same model. Name "
            "several fusion attentions in one: `fusion` takes a list of patterns."
        )
