"""The source model of the demo: trained on clean pairs, once."""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

import lightning_abpem.data.digits
from demo.model import DigitsModel
from lightning_abpem.data.digits import DigitsAV

OUTPUT = Path("demo/output")


def train_source() -> Path:
    """The source model's checkpoint: trained now, or the last time if neither model, data nor training has changed."""
    data = Path(lightning_abpem.data.digits.__file__)
    clips = data.parent / "spoken_digits" / "clips.ogg"
    sources = (data, clips, Path(__file__).with_name("model.py"), Path(__file__))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    path = OUTPUT / f"source-{key}.ckpt"
    if not path.exists():
        OUTPUT.mkdir(parents=True, exist_ok=True)
        seed_everything(0, verbose=False)
        trainer = silent_trainer(max_epochs=6, enable_progress_bar=True)
        trainer.fit(DigitsModel(), DigitsAV(batch_size=64))
        trainer.save_checkpoint(partial := path.with_suffix(".partial"))
        partial.rename(path)  # so that an interrupted save is not taken for the model
    return path


def silent_trainer(**options: Any) -> Trainer:
    """A Trainer that writes and shows nothing, unless the options say so."""
    silent = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", **(silent | options))


def quiet() -> None:
    """Only the demo's own output: Lightning's advice on workers and devices is not about it."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
