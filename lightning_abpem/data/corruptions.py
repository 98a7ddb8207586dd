"""Faults of a sensor, and their random numbers.

Kinds, severities and parameters are those of ImageNet-C and of Kinetics50-C / VGGSound-C.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_abpem.data.audio_corruptions import AUDIO_KINDS
from lightning_abpem.data.image_corruptions import HELD_OUT_IMAGE_KINDS, IMAGE_KINDS

__all__ = ["KINDS", "Corruption", "Sensor", "sample_rng"]

Sensor = Literal["audio", "image"]

KINDS: dict[Sensor, tuple[str, ...]] = {"audio": AUDIO_KINDS, "image": (*IMAGE_KINDS, *HELD_OUT_IMAGE_KINDS)}
"""The kinds of each sensor."""


@dataclass(frozen=True, order=True)
class Corruption:
    """One sensor fault.

    Args:
        modality: the sensor that it hits, "audio" or "image".
        kind: one of `AUDIO_KINDS`, or of `IMAGE_KINDS` and `HELD_OUT_IMAGE_KINDS`.
        severity: 1 to 5.

    Raises:
        ValueError: there is no such fault.
    """

    modality: Sensor
    kind: str
    severity: int

    def __post_init__(self) -> None:
        if self.modality not in KINDS:
            raise ValueError(f'Expected `modality` to be "audio" or "image", but got {self.modality!r}.')
        if self.kind not in KINDS[self.modality]:
            known = ", ".join(KINDS[self.modality])
            raise ValueError(f"Expected `kind` of {self.modality} to be one of {known}, but got {self.kind!r}.")
        if isinstance(self.severity, bool) or self.severity not in range(1, 6):
            raise ValueError(f"Expected `severity` to be an integer in [1, 5], but got {self.severity!r}.")

    def __str__(self) -> str:
        return f"{self.modality}: {self.kind.replace('_', ' ')}"


def sample_rng(seed: int, corruption: Corruption, key: str) -> np.random.Generator:
    """Return the random generator of one sample under one corruption, the same in any order and any process.

    Args:
        seed: of the whole data set, >= 0.
        corruption: that of the sample.
        key: the sample's name.
    """
    words = (corruption.modality, corruption.kind, key)
    return np.random.default_rng([seed, corruption.severity, *(zlib.crc32(word.encode()) for word in words)])
