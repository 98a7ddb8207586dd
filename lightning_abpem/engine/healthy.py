"""Samples whose logits are not finite: a step is taken without them where no other sample depends on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_abpem.attention.statistics import Comparison, Pair
from lightning_abpem.engine.batch import Batch
from lightning_abpem.engine.faults import NOT_FINITE, Skips
from lightning_abpem.engine.logits import broken_rows, has_broken_rows
from lightning_abpem.engine.method import Step
from lightning_abpem.engine.ranks import Ranks
from lightning_abpem.modules.tensors import reading_waits

__all__ = ["HealthySamples", "select_rows"]

log = logging.getLogger(__name__)


class HealthySamples:
    """Leaves samples whose logits are not finite out of a step.

    A NaN has no gradient, not even where the loss does not see it. So their rows in the arguments are replaced by
    another sample's, and the forward runs once more, in the same shapes. If the other samples' logits are the same bit
    for bit, none depends on a broken one. Then the step is that of the others alone. Else it is the whole batch's.

    To look at logits means to wait for a GPU. So there, in one process, they are looked at once a step was not finite.

    Args:
        skips: tells if there was such a step.
        ranks: the processes that share every batch, which have looked already; None for one.
        is_possible: False if the method or the model needs whole batches: nothing is left out.

    Attributes:
        left_out: samples so far, of all processes that share a batch.
        left_out_now: those of the last batch.
    """

    def __init__(self, skips: Skips, ranks: Ranks | None, is_possible: bool) -> None:
        self._skips, self._ranks, self._is_possible = skips, ranks, is_possible
        self.left_out = self.left_out_now = 0
        self._is_said = False

    def observe(self, batch: Batch, observe: Callable[[Batch], Step | None]) -> Step | None:
        """Run a forward over memory and batch; leave out what is broken, and change the batch so that others do too."""
        self.left_out_now = 0
        step = observe(batch)
        if step is None or not self._has_broken(step):
            return step
        logits, samples = step.logits.detach(), step.samples
        kept = self._kept(logits, samples)
        if not bool(kept.any()):
            return step
        step = None  # its graph: two are too much where memory is short
        whole = replace(batch)
        _leave_out(batch)
        step = observe(batch)
        if step is not None and torch.equal(step.logits.detach(), logits[kept]):
            self._count(samples - step.samples)
            return step
        step = None
        vars(batch).update(vars(whole))
        return observe(batch)

    def _kept(self, logits: Tensor, samples: int) -> Tensor:
        """Return which rows remain, (B,) bool: healthy samples, and what a process with any of them remembers."""
        sizes = [(len(logits) - samples, samples)] if self._ranks is None else self._ranks.sizes
        healthy = (~broken_rows(logits[-samples:])).split([own for _, own in sizes])
        stored = [own.any().expand(size) for own, (size, _) in zip(healthy, sizes, strict=True)]
        return torch.cat([*stored, *healthy])

    def _has_broken(self, step: Step) -> bool:
        if not self._is_possible or not step.samples:
            return False
        if self._ranks is not None:
            return self._ranks.broken > 0
        if reading_waits(step.logits) and NOT_FINITE not in self._skips.counts:
            return False
        return has_broken_rows(step.logits[-step.samples :])

    def _count(self, samples: int) -> None:
        self.left_out_now = samples
        self.left_out += samples
        if not self._is_said:
            self._is_said = True
            log.warning(
                "%d samples of a batch are left out of its step, for their logits are not finite. The step is that of "
                "the other samples, and the prediction for these is what the model gives. They are counted in "
                "`left_out`.",
                samples,
            )


def _leave_out(batch: Batch) -> None:
    """Replace the broken samples of a process's batch by a healthy one, and note which rows are healthy.

    A batch without a healthy one has no part in the step, and neither has what its process remembers.
    """
    if not batch.is_own or batch.logits is None:
        return
    broken = broken_rows(batch.logits)
    if not bool(broken.any()):
        return
    rows = (~broken).nonzero().flatten()
    if not len(rows):
        batch.has_failed = True
        return

    def replaced(x: Tensor) -> Tensor:
        if x.is_nested or x.layout != torch.strided or not x.dim() or x.shape[0] != len(broken):
            return x
        x, own = x.detach(), x.detach().clone()  # in the same memory layout: another one may round differently
        own[broken.to(x.device)] = x[rows[0].to(x.device)]
        return own

    parts = (batch.args, batch.kwargs, batch.tokens)
    batch.args, batch.kwargs, batch.tokens = tree_map_only(Tensor, replaced, parts)
    batch.rows = rows


def select_rows(
    rows: Tensor, stored: int, logits: Tensor, attention: Mapping[Pair, Sequence[Comparison]]
) -> tuple[Tensor, dict[Pair, list[Comparison]]]:
    """Return a pass's logits and score statistics of the remembered samples, and of these rows of the batch."""
    kept = torch.cat([torch.arange(stored, device=rows.device), rows + stored])

    def of_kept(block: Any) -> Any:
        return type(block)(*(None if x is None else x[kept.to(x.device)] for x in block))

    return logits[kept], {
        pair: [(of_kept(cross), of_kept(own)) for cross, own in layers] for pair, layers in attention.items()
    }
