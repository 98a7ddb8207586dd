"""``abpem tune``: the learning rate for a model and a stream, found without labels."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from rich.console import Console
from torch import Tensor

from lightning_abpem import methods
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.cli.inspect import inspect_step
from lightning_abpem.cli.model_and_data import add_model_and_data, instantiate, load_checkpoint
from lightning_abpem.trainer.options import Stage
from lightning_abpem.tuning import RATES

__all__ = ["add_arguments", "run"]

_EPILOG = """examples:
  abpem tune my_package.MyModel --checkpoint model.ckpt --data my_package.MyData
  abpem tune my_package.MyModel --data my_package.MyData --rates 1e-4,1e-3 --anchors 0,0.01 --batches 40
  abpem tune my_package.MyModel --data my_package.MyData --callback 'READ("fusion.*.attn", target="net")'
  abpem tune --config config.yaml --trust-config --labels 2      (batches are (audio, video, labels))
Numbers that the step logs stand in the table too. They decide nothing, nor do labels.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; those of the model and the data are read later."""
    parser.epilog = _EPILOG
    add_model_and_data(parser)
    parser.add_argument("--checkpoint", metavar="FILE", help="the model's trained weights; by default as it is made")
    parser.add_argument("--callback", metavar="LINE", help="as Python has it; by default what `abpem inspect` finds")
    rates = ",".join(f"{rate:g}" for rate in RATES)
    parser.add_argument("--rates", default=rates, help="learning rates with commas; %(default)s")
    parser.add_argument("--anchors", help="values of `anchor` with commas, each with all rates; the callback's own")
    parser.add_argument("--batches", type=int, default=80, help="of the stream, for each candidate; %(default)s")
    parser.add_argument("--labels", metavar="KEY", help="where in a batch its classes are, for accuracies: 2, or label")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Show the candidates, and the line with the best of them."""
    rates = _numbers("rates", options.rates)
    anchors = None if options.anchors is None else _numbers("anchors", options.anchors)
    given = None if options.callback is None else _callback(options.callback)
    model, data = instantiate("abpem tune", options, rest)
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint)
    callback = _found(model, data, options.stage) if given is None else given
    console = Console()
    with console.status("tuning"):
        tuning = callback.tune(
            model,
            data,
            rates=rates,
            anchors=anchors,
            batches=options.batches,
            stage=options.stage,
            labels=None if options.labels is None else _labels(options.labels),
        )
    console.print(tuning)


def _found(model: LightningModule, data: object, stage: Stage) -> TestTimeAdaptation:
    """Return the callback of the line that `abpem inspect` shows."""
    inspection = inspect_step(model, data, stage)
    if inspection.line is None:
        reasons = " ".join(inspection.notes)
        raise ValueError(f"Expected `--callback`, for no line was found that fits the model. {reasons}")
    return _callback(inspection.line)


def _callback(line: str) -> TestTimeAdaptation:
    """Return the callback that a line of Python makes: a call of one of this package's methods.

    Raises:
        ValueError: it is something else, or the method refuses its arguments.
    """
    names = {name: getattr(methods, name) for name in methods.__all__ if name != "Objective"}
    wanted = f'Expected `--callback` to call one of {", ".join(names)}, as in ABPEM("fusion.*.attn"), but got {line!r}'
    try:
        called = ast.parse(line, mode="eval").body
        root = called.func if isinstance(called, ast.Call) else None
        name = getattr(root.value if isinstance(root, ast.Attribute) else root, "id", None)  # or ABPEM.published(...)
        if name not in names:
            raise ValueError(f"{wanted}.")
        made = eval(line, dict(names))
    except (SyntaxError, TypeError, NameError, AttributeError) as error:
        raise ValueError(f"{wanted}: {error}") from error
    assert isinstance(made, TestTimeAdaptation)
    return made


def _labels(key: str) -> Callable[[Any], Tensor]:
    """Return a function from a batch to what it has at an index or under a name."""
    place = int(key) if key.lstrip("-").isdigit() else key

    def labels(batch: Any) -> Tensor:
        try:
            return batch[place]
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"Expected `--labels` to be in a batch, but {key!r} is in no {type(batch).__name__}."
            ) from error

    return labels


def _numbers(name: str, words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"Expected `--{name}` to be numbers with commas, but got {words!r}.") from None
