"""The source models of DigitsAV-C, trained once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

import lightning_abpem
from lightning_abpem.data.digits import DigitsAV
from lightning_abpem.models.digits import DigitsModel

__all__ = ["train_digits_model"]


def train_digits_model(seed: int = 0, width: int = 64, depth: int = 2) -> Path:
    """Return the checkpoint of a model trained on clean pairs; train it unless the cache has it for this code and data.

    The cache is the user's (``$XDG_CACHE_HOME/lightning_abpem``).
    """
    package = Path(lightning_abpem.__file__).parent
    names = ("models/digits.py", "data/digits.py", "data/filterbank.py", "data/spoken_digits/clips.ogg")
    content = b"".join((package / name).read_bytes() for name in names) + Path(__file__).read_bytes()
    key = hashlib.sha256(content).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_abpem"
    path = folder / f"digits-{key}-seed{seed}-width{width}-depth{depth}.ckpt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _train(path, seed, width, depth)
    return path


def _train(path: Path, seed: int, width: int, depth: int) -> None:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers is not about this
            seed_everything(seed, verbose=False)
            trainer = Trainer(
                accelerator="cpu",
                max_epochs=6,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            trainer.fit(DigitsModel(width=width, depth=depth), DigitsAV(batch_size=64, seed=seed))
    finally:
        logger.setLevel(level)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    trainer.save_checkpoint(partial)
    partial.replace(path)  # so that an interrupted save is not taken for the model
