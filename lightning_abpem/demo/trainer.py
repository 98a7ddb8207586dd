"""Parts that the demo's steps share: the folder of its output, and Trainers that say nothing."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["OUTPUT", "quiet", "silent_trainer"]

OUTPUT = Path("demo/output")


def silent_trainer(**options: object) -> Trainer:
    """A Trainer that writes and shows nothing, unless the options say so."""
    silent: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(**(silent | options))


def quiet() -> None:
    """Silence Lightning's advice on workers and devices, which is not about the demo."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
