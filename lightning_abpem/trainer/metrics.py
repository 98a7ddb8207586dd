"""The averages of a run's records, as a torchmetrics metric: states are sums and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_abpem.engine.peers import Peers
from lightning_abpem.engine.ranks import refuse_empty

__all__ = ["Figure", "RecordMean", "merge_mean", "new_mean"]


class RecordMean(Metric):
    """Sample-weighted mean of each figure of the steps' records.

    Values that are not finite, as in a skipped step, are left out. So are steps without the figure in their record.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)  # `merge_mean` does it
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


class Figure(Metric):
    """One figure of a dataloader, as a metric that Lightning can log: it is computed when Lightning asks for it.

    Args:
        value: return the figure, a scalar on any device.
    """

    full_state_update = False

    def __init__(self, value: Callable[[], Tensor]) -> None:
        super().__init__(sync_on_compute=False)
        self._value = value
        self.update()  # torchmetrics warns of a metric that is computed without an update

    def update(self) -> None:
        """Do nothing: the records are added elsewhere."""

    def compute(self) -> Tensor:
        """Return the figure."""
        return self._value()


def new_mean(device: torch.device) -> RecordMean:
    """Return an empty mean on a device."""
    mean = RecordMean()
    if device.type == "mps":  # which has no float64
        mean.set_dtype(torch.float32)
    return mean.to(device)


def merge_mean(
    mean: RecordMean | None, has_batch: bool, dataloader: int, device: torch.device, peers: Peers
) -> RecordMean | None:
    """Return a dataloader's mean over the samples of all processes that are not lost; they have to call this.

    Args:
        mean: this process's; None if no step was computed.
        has_batch: this process had a batch of the dataloader.
        dataloader: its index.
        device: where the merged one is wanted.
        peers: the processes.

    Raises:
        RuntimeError: in all processes, if some had a batch and others none.
    """
    everybody = peers.exchange((has_batch, None if mean is None else mean.cpu()))
    refuse_empty([everybody.get(rank, (has_batch, None))[0] for rank in range(peers.size)], dataloader)
    means = [own.to(device) for _, own in everybody.values() if own is not None]
    for other in means[1:]:
        means[0].add(other)
    return means[0] if means else None
