"""A LightningModule and its data, from import paths and a config: what `abpem inspect` and `abpem tune` share."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from lightning_abpem.cli.importing import import_object

__all__ = ["add_model_and_data", "instantiate", "load_checkpoint"]


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model and which data; those of their classes are read later."""
    parser.add_argument("model", nargs="?", help="import path of the LightningModule; its arguments as --model.NAME")
    parser.add_argument("--data", help="import path of the LightningDataModule; its arguments as --data.NAME")
    parser.add_argument("--config", help="YAML of a LightningCLI; its sections `model` and `data` are read")
    parser.add_argument("--trust-config", action="store_true", help="run the classes that the config names: it is code")
    parser.add_argument("--batch", help="a file with one batch, saved by torch.save, instead of data")
    parser.add_argument("--stage", choices=["test", "predict", "validate"], default="test", help="whose step is run")


def instantiate(command: str, options: argparse.Namespace, rest: list[str]) -> tuple[LightningModule, Any]:
    """Make the LightningModule, and a data module or a loader of the one batch.

    Args:
        command: its name, for messages.
        options: what `add_model_and_data` added.
        rest: the other words of the command line: arguments of the two classes.

    Raises:
        ImportError: there is no such module, or jsonargparse is missing.
        ValueError: a class is missing or no such class, no data is given, or the arguments do not fit.
    """
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError("this needs jsonargparse: pip install 'lightning_abpem[cli]'") from error

    model = None if options.model is None else _imported(options.model, LightningModule)
    data = None if options.data is None else _imported(options.data, LightningDataModule)
    if options.data is options.config is options.batch is None:
        raise ValueError("no data: give --data, or --batch, or --config with a section `data`")
    parser = jsonargparse.ArgumentParser(prog=command, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    _add(parser, "model", model, LightningModule)
    if options.batch is None:
        _add(parser, "data", data, LightningDataModule)
    sections = [] if options.config is None else _read_sections(options)
    try:
        config = parser.parse_args([*sections, *rest])
    except jsonargparse.ArgumentError as error:
        raise ValueError(error) from error
    made = parser.instantiate(config)
    if options.batch is None:
        return made.model, made.data
    return made.model, DataLoader([_load_batch(options.batch)], batch_size=None)  # type: ignore[arg-type]


def load_checkpoint(model: LightningModule, path: str) -> None:
    """Load the weights of a checkpoint of Lightning, or of a saved `state_dict()`, into a model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or those of another model.
    """
    content = _load(path, "weights", "a checkpoint of Lightning or a `state_dict()`")
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"Expected {path} to hold the weights of {type(model).__name__}, but: {words}") from error


def _load_batch(path: str) -> Any:
    return _load(path, "one batch", "one batch saved by torch.save")


def _load(path: str, what: str, wanted: str) -> Any:
    """Return the plain values of a file of torch."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected {path} to be a file of {what}, but there is none.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on archives of TorchScript, which it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reads words that are no pickle as far as they go
        raise ValueError(
            f"Expected {path} to be {wanted}, of tensors, numbers, strings, lists, tuples and dicts, for nothing else "
            f"is loaded, but it is damaged or holds more ({type(error).__name__})."
        ) from error


def _imported(path: str, base: type) -> type:
    """Return the class at an import path."""
    found = import_object(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"Expected {path} to be a {base.__name__}, but it is {found!r}.")
    return found


def _add(parser: Any, name: str, found: type | None, base: type) -> None:
    """Add the arguments of a class, or of whichever subclass the config names."""
    if found is None:
        parser.add_subclass_arguments(base, name, required=True)
    else:
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
