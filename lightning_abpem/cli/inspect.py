"""``abpem inspect``: a LightningModule and a batch, from import paths and a config."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.cli.model_and_data import add_model_and_data, instantiate
from lightning_abpem.inspection import Inspected, Inspection, copy_to_try, inspecting
from lightning_abpem.trainer.options import Stage
from lightning_abpem.tuning.runs import quiet, run_stage

__all__ = ["add_arguments", "inspect_step", "run"]

_EPILOG = """examples:
  abpem inspect my_package.MyModel --data my_package.MyData --model.width 256
  abpem inspect --config config.yaml --trust-config        (of a LightningCLI with class paths)
  abpem inspect my_package.MyModel --config config.yaml    (of a LightningCLI of that class)
  abpem inspect my_package.MyModel --data my_package.MyData --print_config        (their arguments as YAML)
  abpem inspect my_package.MyModel --batch batch.pt        (torch.save of one batch)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; those of the model and the data are read later."""
    parser.epilog = _EPILOG
    add_model_and_data(parser)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Show every attention call of one step, and the ABPEM(...) line that fits."""
    model, data = instantiate("abpem inspect", options, rest)
    Console().print(inspect_step(model, data, options.stage))


class _Inspecting(Callback):
    """Watches the first step of a run."""

    def __init__(self) -> None:
        self.result: Inspected | None = None
        self._stack = ExitStack()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.result = self._stack.enter_context(inspecting(pl_module))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stack.close()

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start
    on_predict_batch_end = on_validation_batch_end = on_test_batch_end


def inspect_step(model: LightningModule, data: object, stage: Stage) -> Inspection:
    """Inspect one step of a LightningModule, and try what fits in a second run.

    Raises:
        ValueError: there is no batch.
    """
    watching = _Inspecting()
    run_stage(model, data, stage, [watching], batches=1)
    if watching.result is None:
        raise ValueError(f"the {stage} loader gave no batch")

    def attempt(callback: TestTimeAdaptation) -> None:
        callback.stages = (stage,)
        with quiet():
            run_stage(copy_to_try(model, callback), data, stage, [callback], batches=1)

    return watching.result.inspection(attempt)
