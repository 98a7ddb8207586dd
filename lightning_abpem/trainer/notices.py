"""Words that a run prints: a few lines when it begins, a table when it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_abpem.display import show
from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.describe import list_tensors, options_of, package_version
from lightning_abpem.engine.settings import Settings
from lightning_abpem.trainer.options import Chosen, Verbose
from lightning_abpem.trainer.summary import Summary

__all__ = ["Display", "log_options", "say_over"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Display:
    """Shows a run, in the first process alone.

    Args:
        verbose: see `RunOptions`.
        figures: see `RunOptions`.
    """

    verbose: Verbose = 1
    figures: Chosen = "headline"

    def say(self, message: str) -> None:
        """Log a message of the run's start."""
        if self.verbose:
            rank_zero_info(message)

    def begin(self, adaptation: Adaptation) -> None:
        """Say more of an adaptation that begins, if that is wanted."""
        if self.verbose == 2 and adaptation.params:
            self.say(list_tensors(adaptation.params))

    def end(self, summary: Summary) -> None:
        """Print what the run came to."""
        if self.verbose:
            _print(summary)


@rank_zero_only
def _print(summary: Summary) -> None:
    show(summary)


def say_over(method: str, key: str) -> None:
    """Say that the stream of a checkpoint's state is over, and how to go on from it."""
    rank_zero_info(
        f"{method} begins at the source: the stream whose state the checkpoint holds is over. To go on from it, give "
        f'its state to `load_state_dict` before the run: torch.load(PATH, weights_only=True)["callbacks"]["{key}"].'
    )


def log_options(settings: Settings, loggers: Iterable[Any]) -> None:
    """Hand all options, and the package's version, to the loggers as hyper-parameters.

    A logger that refuses them, as MLflow's does if they differ from an earlier run's, is warned of.
    """
    name = settings.method.name.lower()
    options = {"version": package_version("lightning_abpem"), **options_of(settings)}
    for logger in loggers:
        try:
            logger.log_hyperparams({f"{name}/{key}": value for key, value in options.items()})
        except Exception as error:
            log.warning("%s did not take the options as hyper-parameters: %r", type(logger).__name__, error)
