"""The averages of a run's records, as a torchmetrics metric: states are sums and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

__all__ = ["RecordMean", "merge_means"]


class RecordMean(Metric):
    """Sample-weighted mean of each figure of the steps' records; what is not finite, as in a skipped step, is left out.

    Args:
        names: the figures, the same in every record.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(sync_on_compute=False)  # in several processes `merge_means` does what there is to do
        self.names = list(names)
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, record: Mapping[str, Tensor], samples: int) -> None:
        """Add one step: scalars by name, and the number of samples they stand for."""
        values = torch.stack([record[name] for name in self.names]).to(self.total)
        finite = values.isfinite()
        self.total = self.total + torch.where(finite, values, 0) * samples
        self.weight = self.weight + finite * samples

    def compute(self) -> dict[str, Tensor]:
        """The means by name; NaN where no step had a finite value."""
        return dict(zip(self.names, (self.total / self.weight).float(), strict=True))


def merge_means(means: Mapping[int, RecordMean]) -> dict[int, RecordMean]:
    """The means by dataloader over the samples of all processes, of which some may have seen none."""
    everybody: list[dict[int, RecordMean]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, {key: mean.cpu() for key, mean in means.items()})
    merged: dict[int, RecordMean] = {}
    for own in everybody:
        for key, mean in own.items():
            if key in merged:
                merged[key].total, merged[key].weight = merged[key].total + mean.total, merged[key].weight + mean.weight
            else:
                merged[key] = mean
    return dict(sorted(merged.items()))
