"""The base class of benchmarks: labelled data whose sensors can fail, and source models trained on clean data."""

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
    """The data and source models of `abpem bench`. Subclass it for your own: ``abpem bench my_package.MyBenchmark``.

    The constructor's arguments become options of the command, and every process makes one benchmark.

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
        """Make what all processes need for these source models, once, before they start. The default makes nothing."""
        return

    @abstractmethod
    def source(self, name: str) -> LightningModule:
        """Return a new source model of that name, on the CPU, in eval mode."""

    def load(self, corruptions: Sequence[Corruption]) -> None:
        """Make ready for samples under these corruptions. The default does nothing.

        It is called with all corruptions of a run before it begins, so that missing files are reported then. It is
        called again for each stream, before the processes that load its samples start.
        """
        return

    @abstractmethod
    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[Tensor, ...]:
        """Return the model's inputs for one sample, without a batch dimension, under these corruptions."""

    def options(self, method: str, sensors: Sequence[Sensor]) -> Mapping[str, Any]:
        """Return a method's hyper-parameters on this benchmark when those sensors fail. Default: the package's."""
        return {}

    def provenance(self) -> Mapping[str, Any]:
        """Return facts that belong with the results, such as the origins of `noise` and `frost`. The default has none.

        A run is resumed in a folder only if they are the same. The tables' notes mention a `noise` or `frost` that is
        "procedural", and the number `skipped`.
        """
        return {}

    def published(self) -> Mapping[tuple[str, str], Mapping[str, float]]:
        """Return published averages in percent at severity 5, by (protocol, failing sensor), by method: none here."""
        return {}
