"""One run of a Trainer's loop with the engine in it: opening and closing it, its log, its averages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.loss_scale import LossScale
from lightning_abpem.engine.ranks import Ranks
from lightning_abpem.engine.settings import Settings
from lightning_abpem.modules.patches import substituted
from lightning_abpem.trainer.metrics import RecordMean, merge_means

__all__ = ["Run", "Stage"]

Stage = Literal["test", "predict", "validate"]


class Run:
    """One run of a Trainer's loop with the engine in it, from setup to teardown or an exception.

    Args:
        trainer: the Trainer.
        module: what it runs.
        stage: the function of the Trainer's.
        settings: the engine's.
        first: the callback that is to come first.
        logged: steps handed to the loggers so far.
        resume: called with the adaptation when it begins, for what was loaded.

    Attributes:
        state: the adaptation's after the run, as it can be saved; empty if it never began.
    """

    def __init__(
        self,
        trainer: Any,
        module: LightningModule,
        stage: Stage,
        settings: Settings,
        first: Callback,
        logged: int,
        resume: Callable[[Adaptation], None],
    ) -> None:
        self.trainer, self.module, self.stage, self._settings = trainer, module, stage, settings
        self._prefix = settings.method.name.lower()
        self.logged = logged  # steps handed to the loggers, over all runs of the callback
        self._resume = resume
        self.adaptation: Adaptation | None = None
        self.state: dict[str, Any] = {}
        self._means: dict[int, RecordMean] = {}
        self._pending: list[dict[str, Tensor]] = []
        self._processes = trainer.world_size
        self._dataloader, self._is_left, self._is_over, self._is_awaited = 0, False, False, False
        self._training = {m: m.training for m in module.modules()}
        self._loop: Any = getattr(trainer, f"{stage}_loop")
        self._changes = ExitStack()
        # First in line, so that an exception in another callback's on_exception cannot keep this one from restoring.
        callbacks = sorted(trainer.callbacks, key=lambda callback: callback is not first)
        self._change(trainer, "callbacks", callbacks)
        # In normal mode from the start, nothing the loop makes (batches, metrics, lazy buffers) is an inference tensor.
        if hasattr(self._loop, "inference_mode"):
            self._change(self._loop, "inference_mode", False)
        if self._processes > 1:
            self._stay_with_others()

    def start_batch(self, dataloader: int) -> None:
        """Open the engine at the first batch: by then everybody has loaded their weights and set their modes."""
        self._opened()
        self._go_on_to(dataloader)

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

    def end_stream(self, skipped: bool = False) -> bool:
        """See the other processes through to the end of their streams, also if this one never had a batch.

        Args:
            skipped: whether Lightning has skipped the loop of this process, and exchanges nothing after it.

        Returns:
            whether all processes will take part in what Lightning exchanges after it.
        """
        self._is_over = True
        if self._processes == 1:
            return True
        self._go_on_to(len(self._loop.max_batches) - 1)
        all_follow = self._drain(is_last=True, skipped=skipped)
        if self._settings.sync == "local":
            self._means, some_skipped = merge_means(self._means, self.module.device, skipped)
            all_follow = not some_skipped
        return all_follow

    def abandon(self) -> None:
        """This process fails: the others must not wait for it."""
        if self.adaptation is not None:
            self.adaptation.abandon()
        elif self._is_awaited and self._settings.sync == "global":  # it has not come to its first batch
            Ranks(self.module.device).abandon()

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
        self._changes.close()
        for module, training in self._training.items():
            module.training = training
        if self.adaptation is not None:
            try:
                self.state = self.adaptation.state_dict()
            finally:
                self.adaptation.close()
            self._flush()

    def _change(self, owner: Any, attribute: str, value: Any) -> None:
        self._changes.enter_context(substituted(owner, attribute, value))

    def _stay_with_others(self) -> None:
        """Be there for the others' steps where Lightning has no hook."""
        run, reset = self._loop.run, self._loop.reset
        store: Any = getattr(self._loop, "_store_dataloader_outputs", None)

        def run_or_follow() -> Any:
            result = run()
            if not self._is_over and self._loop.max_batches:  # no batch here, so that Lightning skipped the loop
                self.module.eval()  # as the loop would have
                self.end_stream(skipped=True)
            return result

        def reset_last() -> None:
            self._is_awaited = True  # all dataloaders are there: the next thing to exchange is a batch
            reset()

        def store_last() -> None:
            self._leave()  # Lightning reduces metrics now: no process may be behind
            store()

        self._change(self._loop, "run", run_or_follow)
        self._change(self._loop, "reset", reset_last)
        if store is not None:  # predict has no metrics
            self._change(self._loop, "_store_dataloader_outputs", store_last)

    def _leave(self) -> None:
        """See the other processes through the rest of this dataloader."""
        if not self._is_left:
            self._drain()
            self._is_left = True

    def _go_on_to(self, dataloader: int) -> None:
        """Leave those before it one by one, each when all processes do: also those that had no batch for this one."""
        while self._dataloader < dataloader:
            self._leave()
            if self._settings.reset == "dataloader" and self._dataloader in self._means:  # which had batches
                adaptation = self._opened()
                adaptation.reset() if self._processes == 1 else adaptation.reset_next()
            self._dataloader += 1
            self._is_left = False

    def _drain(self, is_last: bool = False, skipped: bool = False) -> bool:
        with self.trainer.precision_plugin.forward_context():  # as around a step
            return self._opened().drain(is_last, skipped)

    def _opened(self) -> Adaptation:
        if self.adaptation is None:
            scale = LossScale.like(getattr(self.trainer.precision_plugin, "scaler", None))
            self.adaptation = Adaptation(self.module, self._settings, self._on_step, rank_zero_info, scale).__enter__()
            self._resume(self.adaptation)
        return self.adaptation

    def _on_step(self, record: dict[str, Tensor], samples: int) -> None:
        if self._dataloader not in self._means:
            self._means[self._dataloader] = _new_mean(record["loss"].device)
        self._means[self._dataloader].update(record, samples)
        if self.trainer.loggers and self.trainer.log_every_n_steps > 0:
            self._pending.append(record)
            if len(self._pending) >= self.trainer.log_every_n_steps:
                self._flush()

    def _flush(self) -> None:
        """Hand each pending step to the loggers: one copy from the device for all of them."""
        if not self._pending:
            return
        values = torch.stack([value.float() for record in self._pending for value in record.values()]).tolist()
        rest = iter(values)
        for record in self._pending:
            figures = {f"{self._prefix}/{name}_step": next(rest) for name in record}
            for logger in self.trainer.loggers:
                logger.log_metrics(figures, step=self.logged)
            self.logged += 1
        self._pending.clear()


def _new_mean(device: torch.device) -> RecordMean:
    mean = RecordMean()
    if device.type == "mps":  # which has no float64
        mean.set_dtype(torch.float32)
    return mean.to(device)
