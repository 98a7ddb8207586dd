"""The averages of a run's records, as a torchmetrics metric: states are sums and counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["RecordMean", "merge_means"]


class RecordMean(Metric):
    """Sample-weighted mean of each figure of the steps' records.

    What is not finite, as in a skipped step, is left out, and so are steps whose record does not have the figure.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)  # in several processes `merge_means` does what there is to do
        self.names: list[str] = []
        self.add_state("total", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, record: Mapping[str, Tensor], samples: int) -> None:
        """Add one step: scalars by name, and the number of samples they stand for."""
        self._extend(record)
        if len(record) < len(self.names):
            record = dict.fromkeys(self.names, self.total.new_full((), torch.nan)) | dict(record)
        values = torch.stack([record[name] for name in self.names]).to(self.total)
        finite = values.isfinite()
        self.total = self.total + torch.where(finite, values, 0) * samples
        self.weight = self.weight + finite * samples

    def add(self, other: RecordMean) -> None:
        """Add the steps of another mean, whatever figures it has."""
        self._extend(other.names)
        places = [self.names.index(name) for name in other.names]
        self.total[places] += other.total
        self.weight[places] += other.weight

    def compute(self) -> dict[str, Tensor]:
        """The means by name; NaN where no step had a finite value."""
        return dict(zip(self.names, (self.total / self.weight).float(), strict=True))

    def reset(self) -> None:
        """Forget all figures."""
        super().reset()
        self.names = []

    def _extend(self, names: Iterable[str]) -> None:
        new = [name for name in names if name not in self.names]
        if new:
            self.names += new
            self.total, self.weight = (F.pad(sums, (0, len(new))) for sums in (self.total, self.weight))


def merge_means(
    means: Mapping[int, RecordMean], device: torch.device, skipped: bool
) -> tuple[dict[int, RecordMean], bool]:
    """The means by dataloader over the samples of all processes, of which some may have seen none.

    Args:
        means: this process's.
        device: where the merged ones are wanted.
        skipped: something that this process wants known.

    Returns:
        the merged means, and whether any process was `skipped`.
    """
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, ({key: mean.cpu() for key, mean in means.items()}, skipped))
    merged: dict[int, RecordMean] = {}
    for own, _ in everybody:
        for key, mean in own.items():
            if key in merged:
                merged[key].add(mean)
            else:
                merged[key] = mean
    return {key: merged[key].to(device) for key in sorted(merged)}, any(gone for _, gone in everybody)
