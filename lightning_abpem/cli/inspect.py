"""``abpem inspect``: a LightningModule and a batch, from import paths and a config."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.cli.importing import import_object
from lightning_abpem.inspection import Inspected, Inspection, copy_to_try, inspecting
from lightning_abpem.trainer.run import Stage

__all__ = ["add_arguments", "run"]

_EPILOG = """examples:
  abpem inspect my_package.MyModel --data my_package.MyData --model.width 256
  abpem inspect --config config.yaml --trust-config        (of a LightningCLI with class paths)
  abpem inspect my_package.MyModel --config config.yaml    (of a LightningCLI of that class)
  abpem inspect my_package.MyModel --batch batch.pt        (torch.save of one batch)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; those of the model and the data are read later."""
    parser.epilog = _EPILOG
    parser.add_argument("model", nargs="?", help="import path of the LightningModule; its arguments as --model.NAME")
    parser.add_argument("--data", help="import path of the LightningDataModule; its arguments as --data.NAME")
    parser.add_argument("--config", help="YAML of a LightningCLI; its sections `model` and `data` are read")
    parser.add_argument("--trust-config", action="store_true", help="run the classes that the config names: it is code")
    parser.add_argument("--batch", help="a file with one batch, saved by torch.save, instead of data")
    parser.add_argument("--stage", choices=["test", "predict", "validate"], default="test", help="whose step is run")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Show every attention call of one step, and the ABPEM(...) line that fits."""
    model, data = _instantiate(options, rest)
    Console().print(_inspect_step(model, data, options.stage))


def _instantiate(options: argparse.Namespace, rest: list[str]) -> tuple[LightningModule, Any]:
    """The LightningModule and a data module, or a loader of the one batch."""
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError("this needs jsonargparse: pip install 'lightning_abpem[cli]'") from error

    if options.data is options.config is options.batch is None:
        raise ValueError("no data: give --data, or --batch, or --config with a section `data`")
    parser = jsonargparse.ArgumentParser(prog="abpem inspect", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    _add(parser, "model", options.model, LightningModule)
    if options.batch is None:
        _add(parser, "data", options.data, LightningDataModule)
    sections = [] if options.config is None else _read_sections(options)
    try:
        config = parser.parse_args([*sections, *rest])
    except jsonargparse.ArgumentError as error:
        raise ValueError(error) from error
    made = parser.instantiate(config)
    if options.batch is None:
        return made.model, made.data
    return made.model, DataLoader([_load_batch(options.batch)], batch_size=None)  # type: ignore[arg-type]


def _load_batch(path: str) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected {path} to be a file of one batch, but there is none.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on archives of TorchScript, which it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reads words that are no pickle as far as they go
        raise ValueError(
            f"Expected {path} to be one batch saved by torch.save, of tensors, numbers, strings, lists, tuples and "
            f"dicts, for nothing else is loaded, but it is damaged or holds more ({type(error).__name__})."
        ) from error


def _add(parser: Any, name: str, path: str | None, base: type) -> None:
    """Arguments of the class at the path, or of whichever subclass the config names."""
    if path is None:
        parser.add_subclass_arguments(base, name, required=True)
        return
    found = import_object(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"Expected {path} to be a {base.__name__}, but it is {found!r}.")
    parser.add_class_arguments(found, name)


_NO_PATH = "#" * 256  # a comment, longer than any file's name: what is given as a config may be taken for its path


def _read_sections(options: argparse.Namespace) -> list[str]:
    """Return what the config says of the model and the data, as arguments; all else in it is left out."""
    import yaml

    from lightning_abpem.cli.untrusted import read_config, read_trusted, refuse_code

    path = Path(options.config)
    config = (read_trusted if options.trust_config else read_config)(path)
    if "model" not in config and isinstance(config.get(options.stage), dict):
        config = config[options.stage]
    wanted = ("model",) if options.batch is not None else ("model", "data")
    sections = {name: config[name] for name in wanted if name in config}
    if not sections:
        raise ValueError(f"{options.config} has none of the sections {wanted}, but {sorted(config)}")
    if not options.trust_config:
        refuse_code(sections, path)
    return ["--config", f"{_NO_PATH}\n{yaml.safe_dump(sections)}"]


class _Inspecting(Callback):
    """Watches the first step of a run."""

    def __init__(self) -> None:
        self.result: Inspected | None = None
        self._stack = ExitStack()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.result = self._stack.enter_context(inspecting(pl_module))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stack.close()

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start
    on_predict_batch_end = on_validation_batch_end = on_test_batch_end


def _inspect_step(model: LightningModule, data: Any, stage: Stage) -> Inspection:
    """Inspect one step, and try what fits in a second run."""
    watching = _Inspecting()
    _run_step(model, data, stage, watching)
    if watching.result is None:
        raise ValueError(f"the {stage} loader gave no batch")

    def attempt(callback: TestTimeAdaptation) -> None:
        callback.stages = (stage,)
        with _quiet():
            _run_step(copy_to_try(model, callback), data, stage, callback)

    return watching.result.inspection(attempt)


def _run_step(model: LightningModule, data: Any, stage: Stage, callback: Callback) -> None:
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_test_batches=1,
        limit_predict_batches=1,
        limit_val_batches=1,
    )
    quietly = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(model, data, **quietly)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a run reports of itself."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
