"""One global batch out of the batches of several processes, so that all of them take the step that one would.

Every process computes the method's loss on the logits and the score statistics of all samples, of which its own carry
gradients. So the sum of the processes' gradients is the gradient of the global batch, whatever the loss and however
uneven the batches. Per forward that is an exchange of six integers and one of a row per sample, per step one flat sum
of the gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_abpem.attention.statistics import Comparison, Pair
from lightning_abpem.engine.logits import broken_rows
from lightning_abpem.functional import ScoreStatistics

__all__ = ["GlobalBatch", "Ranks", "process", "refuse_empty", "several_processes"]

log = logging.getLogger(__name__)
_GONE, _OUT, _EMPTY, _BATCH, _FAILED = range(5)
_COLUMNS = 6  # of a comparison: mean, deviation and whether it is seen, of the cross and of the self block


class GlobalBatch(NamedTuple):
    """Logits of all processes' samples, the remembered ones first; how many are current; their attention."""

    logits: Tensor
    samples: int
    attention: dict[Pair, list[Comparison]]


class _Form(NamedTuple):
    """The form of a batch: a process that has never seen one has to know it."""

    classes: int
    layers: dict[Pair, int]
    is_double: bool

    @classmethod
    def of(cls, logits: Tensor, attention: Mapping[Pair, Sequence[Comparison]]) -> _Form:
        layers = {pair: len(own) for pair, own in attention.items()}
        return cls(logits.shape[1], layers, logits.dtype == torch.float64)

    @property
    def width(self) -> int:
        return self.classes + _COLUMNS * sum(self.layers.values())


def several_processes() -> bool:
    """Return True if torch.distributed runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if several_processes() else (0, 1)


def refuse_empty(has_batch: Sequence[bool], dataloader: int | None = None) -> None:
    """Raise if some processes have a batch of a dataloader and others have none.

    Args:
        has_batch: one answer for each process, the same list in all of them.
        dataloader: its index, if that is known.

    Raises:
        RuntimeError: naming the processes without a batch.
    """
    without = [rank for rank, has in enumerate(has_batch) if not has]
    if 0 < len(without) < len(has_batch):
        which = "a dataloader" if dataloader is None else f"dataloader {dataloader}"
        raise RuntimeError(
            f"Expected every process to have a batch of {which}, but got none in process "
            f"{', '.join(map(str, without))}. Give each process at least one, as Lightning's own sampler does."
        )


class Ranks:
    """The processes of the default process group, each with a stream of its own.

    All of them call `global_batch` and `sum` in the same order. A process without further batches calls them too, with
    nothing, until no process has one. One that fails calls `abandon` where the others expect its next batch.

    Args:
        device: where the model is, and what is exchanged.

    Attributes:
        rank: this process's number.
        size: the number of processes.
        is_idle: no process had a batch in the last exchange.
        done: no process will have a batch any more, or one has failed.
        updates: the number of steps taken, which is the same in all processes; set by the stepper.
        broken: samples of all processes in the last exchange whose logits are not finite.
        sizes: by process, its remembered samples and its current ones in the last exchange.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._form: _Form | None = None
        self._without = _OUT  # what this process is while it has no batch
        self._in_step = False
        self.updates = self.broken = 0
        self.sizes: list[tuple[int, int]] = []
        self.is_idle = self.done = False

    def global_batch(
        self,
        logits: Tensor | None,
        samples: int = 0,
        attention: Mapping[Pair, Sequence[Comparison]] | None = None,
    ) -> GlobalBatch | None:
        """The global batch: in the order of ranks, first what each remembers, then what is current.

        Args:
            logits: (B, C) of this process, remembered samples first; None if it has no batch.
            samples: how many of them are current.
            attention: of the same samples; see `Objective`.

        Returns:
            None if no process has a batch. One without samples if all that there are have none.

        Raises:
            RuntimeError: if another process failed or has taken other steps, or one has no batch of a dataloader.
        """
        attention, status = attention or {}, self._without if logits is None else _BATCH
        if samples == 0:  # of an empty batch nothing is known, not even how many figures it has
            logits = None
        if logits is not None and self._form is None:
            self._form = _Form.of(logits, attention)
        stored = 0 if logits is None else logits.shape[0] - samples
        broken = None if logits is None else broken_rows(logits.detach()[stored:]).sum()
        header = self._exchange(status, samples, stored, self._form is not None, self.updates, broken)
        statuses = self._statuses(header)
        self.broken, self.sizes = sum(row[5] for row in header), [(row[2], row[1]) for row in header]
        self.is_idle, self.done = _BATCH not in statuses, max(statuses) <= _GONE
        if self.is_idle:
            return None
        self.done = self.done or _EMPTY in statuses
        refuse_empty([status != _EMPTY for status in statuses])
        if not any(current for _, current in self.sizes):
            return GlobalBatch(torch.empty(0, 0, device=self._device), 0, {})
        self._in_step = True
        if not all(row[3] for row in header):
            self._share_form()
        return self._joined(logits, attention)

    def _joined(self, logits: Tensor | None, attention: Mapping[Pair, Sequence[Comparison]]) -> GlobalBatch:
        """Return the batches of all processes, whose `sizes` are known, as one."""
        assert self._form is not None
        parts = self._gather(self._packed(logits, attention), [stored + current for stored, current in self.sizes])
        remembered = [part[:stored] for part, (stored, _) in zip(parts, self.sizes, strict=True)]
        own = [part[stored:] for part, (stored, _) in zip(parts, self.sizes, strict=True)]
        rows = torch.cat([*remembered, *own])
        samples = sum(current for _, current in self.sizes)
        return GlobalBatch(rows[:, : self._form.classes], samples, self._unpacked(rows))

    def _statuses(self, header: list[list[int]]) -> list[int]:
        """Return what each process is; raise if one has failed, or they have taken different numbers of steps."""
        statuses, updates = [row[0] for row in header], [row[4] for row in header]
        if _FAILED in statuses:
            self.done = True
            raise RuntimeError(
                f"Process {statuses.index(_FAILED)} stopped with an error, which it has reported; the steps of this "
                f'one, {self.rank}, need its batches. With sync="local" each process adapts on its own stream.'
            )
        if len(set(updates)) > 1:
            self.done = True
            raise RuntimeError(
                f"The processes have taken different numbers of steps, {updates}, so their weights are not the same: "
                "were the states that they go on from saved at different times?"
            )
        return statuses

    @property
    def is_in_step(self) -> bool:
        """True between the first exchange of a step and its last."""
        return self._in_step

    def end_step(self) -> None:
        """All exchanges of a step are made; the next is that of the next batch."""
        self._in_step = False

    def leave(self, is_last: bool = False, is_empty: bool = False) -> None:
        """Take part without a batch from now on: the next exchanges are those of the other processes' batches.

        Args:
            is_last: this process will have no batch any more.
            is_empty: it had no batch of this dataloader, which is an error if another process has one.
        """
        self._without = _EMPTY if is_empty else _GONE if is_last else _OUT
        self.is_idle = False

    def refuse_uneven(self, has_batch: bool) -> None:
        """Compare the processes' streams before a forward that needs all processes.

        Raises:
            RuntimeError: in all of them, if some have a batch and some have none, or one has failed.
        """
        statuses = [row[0] for row in self._exchange(_BATCH if has_batch else _OUT)]
        if len(set(statuses)) > 1:
            self.done = True
            without = [rank for rank, status in enumerate(statuses) if status != _BATCH]
            raise RuntimeError(
                f"Process {without} had no batch, or failed, while others had one, but the model is cut into shards, "
                "so that every forward needs all processes. Give each as many batches, as Lightning's own sampler does."
            )

    def sum(self, gradients: Sequence[Sequence[Tensor | None]], params: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """The gradients of several losses, summed over processes: one flat exchange for all of them.

        Args:
            gradients: by loss, one for each parameter, None where the loss does not reach it; empty lists where this
                process has no samples.
            params: the parameters.

        Returns:
            the same, None where the loss of no process reaches the parameter.
        """
        local = [g for own in gradients for g in (own or [None] * len(params))]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        every = list(params) * len(gradients)
        zeros = partial(torch.zeros, dtype=dtype, device=self._device)
        flat = torch.cat(
            [zeros(p.numel()) if g is None else g.to(dtype).flatten() for g, p in zip(local, every, strict=True)]
            + [torch.tensor([g is not None for g in local], device=self._device).to(dtype)]
        )
        dist.all_reduce(flat)
        *parts, reached = flat.split([*(p.numel() for p in every), len(every)])
        summed = [
            part.view(p.shape) if there else None for part, p, there in zip(parts, every, reached.tolist(), strict=True)
        ]
        return [summed[i : i + len(params)] for i in range(0, len(summed), len(params))]

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' values, (N,); a process without any has none, (0,)."""
        sizes = [row[0] for row in self._exchange(len(values))]
        own = values.to(self._device, torch.float64) if len(values) else None
        flat = torch.zeros(max(sizes), dtype=torch.float64, device=self._device) if own is None else own
        dist.all_reduce(flat)
        return flat

    def abandon(self) -> None:
        """Tell the others, where they expect a batch, that there will be none: an error here must not hang them.

        In the middle of a step they expect something else; they stop when they lose the connection to this one.
        """
        if not self.done:
            self.done = True
            try:
                if not self._in_step:
                    self._exchange(_FAILED)
            except RuntimeError as error:  # the error that brought it here says more
                log.warning("The other processes could not be told that this one fails: %s", error)

    def _exchange(
        self,
        status: int,
        samples: int = 0,
        stored: int = 0,
        has_form: bool = True,
        updates: int = 0,
        broken: Tensor | None = None,
    ) -> list[list[int]]:
        own = torch.tensor([status, samples, stored, int(has_form), updates, 0], device=self._device)
        if broken is not None:
            own[5] = broken  # on the device, without waiting for it
        everybody = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everybody, own)
        return torch.stack(everybody).tolist()

    def _share_form(self) -> None:
        forms: list[Any] = [None] * self.size
        dist.all_gather_object(forms, self._form)
        self._form = next(form for form in forms if form is not None)

    def _packed(self, logits: Tensor | None, attention: Mapping[Pair, Sequence[Comparison]]) -> Tensor:
        """A row for each sample: logits, then the statistics of every comparison."""
        assert self._form is not None
        dtype = torch.float64 if self._form.is_double else torch.float32
        if logits is None:
            return torch.empty(0, self._form.width, dtype=dtype, device=self._device)
        columns = [logits]
        for block in (block for layers in attention.values() for comparison in layers for block in comparison):
            seen = torch.ones_like(block.mean) if block.seen is None else block.seen
            columns += [column.unsqueeze(1) for column in (block.mean, block.std, seen)]
        return torch.cat([column.to(dtype) for column in columns], 1)

    def _unpacked(self, rows: Tensor) -> dict[Pair, list[Comparison]]:
        assert self._form is not None
        columns = iter(rows[:, self._form.classes :].unbind(1))

        def block() -> ScoreStatistics:
            mean, std, seen = next(columns), next(columns), next(columns)
            return ScoreStatistics(mean, std, seen > 0)

        return {pair: [(block(), block()) for _ in range(layers)] for pair, layers in self._form.layers.items()}

    def _gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The rows of all processes; this one's with their gradients."""
        padded = own.new_zeros(max(sizes), own.shape[1])
        padded[: own.shape[0]] = own.detach()
        everybody = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everybody, padded)
        return [
            own if r == self.rank else part[:size] for r, (part, size) in enumerate(zip(everybody, sizes, strict=True))
        ]
