"""Which of Lightning's strategies the adaptation can run under, said before anything runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.single_device import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["check_strategy"]

_INSTEAD = (
    'Use strategy="ddp" (or "ddp_spawn", "ddp_notebook"), ModelParallelStrategy with fully_shard (FSDP2), or one '
    "device."
)


def check_strategy(strategy: Any) -> None:
    """Hold a Trainer's strategy against what the engine needs: a model whose forward it can run, with whole weights.

    Raises:
        MisconfigurationException: saying what the strategy lacks, and what to use instead.
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
