"""The recorded runs of the authors' programs in tests/golden, and the CAV-MAE and inputs that they were made with."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_abpem import ABPEM
from lightning_abpem.models import CAVMAE

FOLDER = Path(__file__).parent / "golden"
RUNS = ["abpem_nocache", "abpem_cache2"]
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5}
"""The largest difference from a recorded number, by precision."""


class Golden(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """One recorded run; as a data set it holds the batches, each whole, with a dummy label."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.record = np.load(FOLDER / f"{name}.npz")
        self.config: dict[str, Any] = json.loads(str(self.record["config"]))
        self.dtype = dtype

    def __len__(self) -> int:
        return self.config["steps"]

    def __getitem__(self, step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        if step >= len(self):
            raise IndexError(step)
        sizes = self.config["batch_sizes"]
        size = sizes[step % len(sizes)]
        rng = np.random.default_rng([self.config["seed"], step])
        arrays = rng.standard_normal((size, 1024, 128)), rng.standard_normal((size, 3, 224, 224))
        audio, video = (torch.from_numpy(array).to(self.dtype) for array in arrays)
        return (audio, video), torch.zeros(size, dtype=torch.long)

    def loader(self, labels: bool) -> DataLoader[Any]:
        data: Any = self if labels else [self[step][0] for step in range(len(self))]
        return DataLoader(data, batch_size=None)

    def expected(self, name: str) -> Tensor:
        return torch.from_numpy(self.record[name])

    def model(self) -> CAVMAE:
        config = self.config
        model = CAVMAE(config["num_classes"], config["embed_dim"], config["num_heads"])
        return model.load_published(published_weights()).to(self.dtype).eval()

    def abpem(self, **changes: Any) -> ABPEM:
        config = self.config
        options: dict[str, Any] = {
            "k": config["k"],
            "attention_weight": config["attn_weight"],
            "balance": "marginal",
            "memory_batches": max(config["cache_batches"], 1),
            "optimizer": partial(torch.optim.Adam, lr=config["lr"]),
        }
        return ABPEM("blocks_u.*.attn", CAVMAE.modalities, **(options | changes))


def published_weights() -> dict[str, Tensor]:
    with np.load(FOLDER / "weights_seed0.npz") as weights:
        return {key: torch.from_numpy(weights[key]) for key in weights.files}
