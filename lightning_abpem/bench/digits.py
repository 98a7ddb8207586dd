"""DigitsAV-C: digits seen and heard, with 21 kinds of corruption and four source models trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.digits_source import train_digits_model
from lightning_abpem.bench.protocols import Kinds
from lightning_abpem.data.audio_corruptions import AUDIO_KINDS
from lightning_abpem.data.corruptions import Corruption, Sensor
from lightning_abpem.data.digits import DigitsPairs, Split
from lightning_abpem.data.image_corruptions import HELD_OUT_IMAGE_KINDS, IMAGE_KINDS
from lightning_abpem.models.digits import DigitsModel

__all__ = ["DigitsAVC"]

_SIZES: dict[str, dict[str, int]] = {
    **{f"small-{seed}": {"seed": seed} for seed in range(3)},
    "large": {"seed": 0, "width": 128, "depth": 4},
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "tent": {"learning_rate": 1e-3},
    "eata": {"learning_rate": 1e-3, "redundancy": 0.4},  # 0.05 is for 1,000 classes
    "sar": {"learning_rate": 1e-3},
    "mmtta": {"learning_rate": 1e-4},
    "sumi": {"learning_rate": 1e-4},
    "read": {"learning_rate": 1e-3},
    "abpem": {"learning_rate": 1e-3, "memory_samples": 32},
    "abpem-published": {"learning_rate": 1e-3, "memory_samples": 32},
}
"""Chosen on the held-out corruptions, scans and voices: benchmarks/experiments/choose.yaml, docs/results."""


class DigitsAVC(Benchmark):
    """The package's own benchmark: it needs no download, and a run takes minutes.

    Args:
        split: "test" for results, "dev" for choosing hyper-parameters.
        pairs: how many pairs a pass has, >= 1.
        held_out_kinds: corrupt by the four held-out kinds of ImageNet-C instead of the 21.

    Raises:
        ValueError: `pairs` is less than 1.
    """

    name = "DigitsAV-C"
    sensors = ("audio", "image")
    sources = tuple(_SIZES)
    fusion = "fusion.self_attn"

    def __init__(self, split: Split = "test", pairs: int = 640, held_out_kinds: bool = False) -> None:
        if pairs < 1:
            raise ValueError(f"Expected `pairs` to be an integer >= 1, but got {pairs}.")
        self.modalities = {"audio": 32, "image": 16}
        self.encoders = {"audio": "audio", "image": "image"}
        all_kinds: Kinds = {"image": IMAGE_KINDS, "audio": AUDIO_KINDS}
        self.kinds = {"image": HELD_OUT_IMAGE_KINDS} if held_out_kinds else all_kinds
        self._pairs = DigitsPairs(split, pairs)
        self.labels = self._pairs.labels

    def prepare(self, sources: Sequence[str]) -> None:
        for name in sources:
            train_digits_model(**_SIZES[name])

    def source(self, name: str) -> LightningModule:
        path = train_digits_model(**_SIZES[name])
        try:
            return DigitsModel.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
        except Exception as error:  # torch reads words that are no pickle as far as they go
            raise ValueError(
                f"Expected {path} to be the model that this package trained, but it is damaged or another's "
                f"({type(error).__name__}). Delete it, and it is trained anew."
            ) from error

    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[Tensor, Tensor]:
        return self._pairs.sample(index, corruptions)

    def options(self, method: str, sensors: Sequence[Sensor]) -> Mapping[str, Any]:
        return _OPTIONS.get(method, {})

    def provenance(self) -> Mapping[str, Any]:
        return {"noise": "procedural", "frost": "procedural"}
