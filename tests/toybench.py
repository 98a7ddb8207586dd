"""A benchmark of one's own, as a user writes one: the toy model on made-up data."""

from collections.abc import Sequence

import numpy as np
import torch

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.data.corruptions import Corruption
from tests.toy import AUDIO, CLASSES, MODALITIES, VIDEO, Toy, make_toy


class ToyBench(Benchmark):
    """Noise of the severity's size on either input.

    Args:
        samples: how many.
        fail_at: an index that cannot be read.
    """

    name = "Toy-C"
    sensors = ("audio", "image")
    sources = ("one", "two")
    fusion = "fusion.*.attn"

    def __init__(self, samples: int = 24, fail_at: int = -1) -> None:
        self.kinds = {"image": ("fog", "gaussian_noise"), "audio": ("wind",)}
        self.modalities = MODALITIES
        self.encoders = {"audio": "audio", "image": "video"}
        generator = torch.Generator().manual_seed(1)
        self.audio = torch.randn(samples, AUDIO, 3, generator=generator)
        self.video = torch.randn(samples, VIDEO, 3, generator=generator)
        self.labels = np.arange(samples) % CLASSES
        self.fail_at = fail_at

    def source(self, name: str) -> Toy:
        model = make_toy()
        if name == "two":
            torch.nn.init.normal_(model.head[1].weight, std=1.0, generator=torch.Generator().manual_seed(2))
        return model

    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self.fail_at:
            raise ValueError(f"sample {index} is broken")
        inputs = {"audio": self.audio[index], "image": self.video[index]}
        for corruption in corruptions:
            generator = torch.Generator().manual_seed(index)
            noise = torch.randn(inputs[corruption.modality].shape, generator=generator)
            inputs[corruption.modality] = inputs[corruption.modality] + corruption.severity * noise
        return inputs["audio"], inputs["image"]

    def options(self, method, sensors):
        return {"k": 3 if "audio" in sensors else 2, "memory_samples": 16} if method.startswith("abpem") else {}

    def provenance(self):
        return {"noise": "made up"}
