"""A process's place in the dataloaders of a run, which all processes pass together."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist

from lightning_abpem.engine.ranks import refuse_empty

__all__ = ["Streams"]


class Streams:
    """The process's place in the dataloaders of a run, which all processes leave together.

    Lightning and the engine both exchange numbers between processes, so all processes have to come to these exchanges
    in the same order. That holds while each has a batch of every dataloader.

    Args:
        loop: the Trainer's.
        processes: their number.

    Attributes:
        dataloader: the index of the current one.
        has_batch: this process had a batch of it.
        is_left: no process has a batch of it any more.
        awaited: what the others expect of this process next.
    """

    def __init__(self, loop: Any, processes: int) -> None:
        self.processes = processes
        self.dataloader, self.has_batch, self.is_left = 0, False, False
        self.awaited: Literal["lengths", "batch"] | None = "lengths" if processes > 1 else None
        self._loop, self._earlier = loop, loop.max_batches  # Lightning makes a new list when all dataloaders are there
        self._are_sequential = True

    @property
    def last(self) -> int:
        """The index of the last dataloader; several that are drawn together count as one."""
        return max(len(self._loop.max_batches), 1) - 1 if self._are_sequential else 0

    def suffix(self, dataloader: int) -> str:
        """Return what Lightning appends to a dataloader's names if there are several, one after the other."""
        return f"/dataloader_idx_{dataloader}" if self.last else ""

    def place(self, dataloader: int | None) -> int:
        """Return a batch's dataloader; None, from several, means that they are drawn together."""
        self._are_sequential = dataloader is not None
        return dataloader or 0

    def go_on(self) -> None:
        """Begin with the next dataloader."""
        self.dataloader += 1
        self.has_batch = self.is_left = False

    def compare_lengths(self) -> None:
        """Compare the numbers of batches between processes, once, after Lightning has asked for the dataloaders."""
        if self._awaits_lengths:
            self._exchange(self._loop.max_batches)
            self.awaited = "batch"

    def abandon(self) -> bool:
        """Tell the other processes that this one fails, if they wait for its lengths; return True if they did."""
        awaits = self._awaits_lengths
        if awaits:
            self._exchange(None)
        return awaits

    @property
    def _awaits_lengths(self) -> bool:
        lengths = self._loop.max_batches
        return self.awaited == "lengths" and lengths is not self._earlier and len(lengths) == self._loop.num_dataloaders

    def _exchange(self, own: list[int | float] | None) -> None:
        self.awaited = None  # whatever comes of it, the others do not wait for this process after it
        everybody: list[Any] = [None] * self.processes
        dist.all_gather_object(everybody, own)
        if own is None:
            return
        if None in everybody:
            raise RuntimeError(
                f"Process {everybody.index(None)} stopped with an error before its first batch, which it has reported."
            )
        for dataloader, lengths in enumerate(zip(*everybody, strict=True)):
            refuse_empty([length > 0 for length in lengths], dataloader)
