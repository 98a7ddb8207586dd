"""Trainers and strategies under which a model can adapt, checked before anything runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.single_device import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["check_strategy", "check_trainer"]

_INSTEAD = (
    'Use strategy="ddp" (or "ddp_spawn", "ddp_notebook"), ModelParallelStrategy with fully_shard (FSDP2), or one '
    "device."
)


def check_trainer(trainer: object, stage: str, kind: type[Any]) -> None:
    """Raise unless a Trainer can run a callback that adapts.

    Args:
        trainer: the Trainer.
        stage: its function.
        kind: the class of callbacks that adapt, in their `stages`.

    Raises:
        MisconfigurationException: naming what is in the way, and what to do instead.
    """
    if not isinstance(trainer, Trainer):
        raise MisconfigurationException(
            f"This is a callback of `lightning.pytorch`, but got a Trainer from `{type(trainer).__module__}`. Import "
            "Trainer and LightningModule from `lightning.pytorch` (`pytorch_lightning` is a separate copy of it)."
        )
    check_strategy(trainer.strategy)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unannounced
    count = sum(isinstance(callback, kind) and stage in callback.stages for callback in callbacks)
    if count > 1:
        raise MisconfigurationException(
            f"Expected one callback that adapts in `trainer.{stage}`, but the Trainer has {count}: each would adapt "
            "the same model. Name several fusion attentions in one: `fusion` takes a list of patterns."
        )


def check_strategy(strategy: object) -> None:
    """Raise unless the engine can run the model's forward under a strategy, with whole weights.

    Raises:
        MisconfigurationException: naming what the strategy lacks, and what to use instead.
    """
    name = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            f"{name} packs all parameters of a module into flat shards, so there are no q, k and v weights that could "
            f"move by themselves. {_INSTEAD}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"In test and predict {name} runs DeepSpeed's inference engine, which has no gradients. {_INSTEAD}"
        )
    if "xla" in name.lower():
        raise MisconfigurationException(
            f"Under {name} the model runs as compiled graphs, inside which the scores of an attention cannot be seen. "
            f"{_INSTEAD}"
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in ("auto", 1):
        raise MisconfigurationException(
            f"{name} with tensor_parallel_size={strategy._tensor_parallel_size} cuts the projections of an attention "
            "apart, so that no process sees the scores of all heads. Use "
            f"{name}(data_parallel_size=<processes>, tensor_parallel_size=1) and cut modules with fully_shard."
        )
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise MisconfigurationException(f"ABPEM has not been made for {name}. {_INSTEAD}")
