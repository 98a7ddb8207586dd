"""What `abpem bench` runs on: labelled data whose sensors can fail, and source models trained on its clean form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor

from lightning_abpem.attention.fusion import FusionPatterns
from lightning_abpem.attention.spans import Modalities
from lightning_abpem.bench.protocols import Kinds
from lightning_abpem.data.corruptions import Corruption, Sensor

__all__ = ["Benchmark"]


class Benchmark(ABC):
    """A benchmark of one's own is a subclass: ``abpem bench my_package.MyBenchmark``.

    Its constructor's arguments become options of the command; every process makes one.

    Attributes:
        name: shown in tables.
        sensors: the model's positional inputs, as the modalities they come from.
        kinds: the kinds of corruption per modality, in the order of the tables.
        sources: names of the source models.
        fusion: name pattern(s) of the fusion attention, as `ABPEM` takes them.
        modalities: their tokens, as `ABPEM` takes them.
        encoders: by modality, the name of the module whose output tokens are its features; SuMi wants them.
        labels: the classes of the test samples (N,).
        batch_size: samples per batch, where the run does not say.
        num_workers: processes that load samples, for every process that adapts.
        immaterial: the constructor's arguments that change no number, so that a run may go on with others.
    """

    name: str
    sensors: Sequence[Sensor]
    kinds: Kinds
    sources: Sequence[str]
    fusion: FusionPatterns
    modalities: Modalities
    encoders: Mapping[str, str]
    labels: NDArray[np.int64]
    batch_size: int = 8
    num_workers: int = 0
    immaterial: Sequence[str] = ()

    def prepare(self, sources: Sequence[str]) -> None:
        """Make what all processes need for these source models, once, before they start: nothing."""
        return

    @abstractmethod
    def source(self, name: str) -> LightningModule:
        """The source model of that name: a fresh one, on the CPU, in eval mode."""

    def load(self, corruptions: Sequence[Corruption]) -> None:
        """Make ready for samples under these corruptions: nothing.

        Called with all of a run before it begins, so that what is missing is told then; and with those of each stream
        before processes that load its samples begin.
        """
        return

    @abstractmethod
    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[Tensor, ...]:
        """The model's inputs for one sample, without a batch dimension, under these corruptions."""

    def options(self, method: str, sensors: Sequence[Sensor]) -> Mapping[str, Any]:
        """The hyper-parameters of a method on this benchmark when those sensors fail: the package's own."""
        return {}

    def provenance(self) -> Mapping[str, Any]:
        """What else a reader of the results has to know, such as where `noise` and `frost` come from: nothing.

        A run in one folder goes on only where it is the same. "procedural" is said below the tables, and how many
        samples are `skipped`.
        """
        return {}

    def published(self) -> Mapping[tuple[str, str], Mapping[str, float]]:
        """Published averages, in percent, at severity 5: by (protocol, sensor that fails), by method. None."""
        return {}
