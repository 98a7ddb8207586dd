"""The memory of the last batches, as the tokens that entered the fusion block: encoders are frozen, so never stale."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_abpem.spans import Tokens

__all__ = ["TokenMemory"]

log = logging.getLogger(__name__)

_ADVICE = "Name the fusion block with `memory_at`, or set memory_batches=1."


class TokenMemory:
    """First in, first out store of the tokens that entered the fusion block, the current batch included.

    Args:
        block: the fusion block. Everything after it must depend on the batch through its input alone.
        name: its name, for messages.
        batches: batches held, the current one included; at least 2.
    """

    def __init__(self, block: nn.Module, name: str, batches: int) -> None:
        self.block, self.name = block, name
        self._stored: deque[dict[int, Tensor]] = deque(maxlen=batches - 1)
        self._stored_masks: deque[dict[str, Tensor]] = deque(maxlen=batches - 1)
        self._current: dict[int, Tensor] | None = None
        self._predicted: Tensor | None = None
        self._awaits_prediction = self._verified = False

    @contextmanager
    def extend(self) -> Iterator[None]:
        """While it lasts, the fusion block gets the stored tokens, oldest first, with the current ones after them."""
        self._current = None
        handle = self.block.register_forward_pre_hook(self._extend_input, with_kwargs=True)
        try:
            yield
        except Exception as error:
            if self._stored and self._current is not None:
                _add_note(
                    error,
                    f"ABPEM's memory had put {self.samples} stored samples in front of the batch at '{self.name}'. "
                    f"Everything after that module must depend on the batch through its input alone. {_ADVICE}",
                )
            raise
        finally:
            handle.remove()

    def push(self, tokens: Mapping[str, Tokens]) -> None:
        """Store the current batch's tokens and whose they are; the oldest batch goes if the memory is full."""
        if self._current is not None:
            self._stored.append(self._current)
            self._stored_masks.append({name: own.keep for name, own in tokens.items() if own.keep is not None})
            self._predicted, self._awaits_prediction = None, not self._verified

    def clear(self) -> None:
        """Forget all tokens."""
        self._stored.clear()
        self._stored_masks.clear()
        self._current = self._predicted = None
        self._awaits_prediction = False

    def with_past(self, tokens: Mapping[str, Tokens]) -> dict[str, Tokens]:
        """Whose tokens the stored and the current ones are, as `extend` puts them together."""

        def extended(name: str, keep: Tensor) -> Tensor:
            return torch.cat([*(masks[name] for masks in self._stored_masks), keep])

        return {
            name: own if own.keep is None else own._replace(keep=extended(name, own.keep))
            for name, own in tokens.items()
        }

    def expect(self, prediction: Tensor) -> None:
        """The logits that the model gave for the newest stored batch, to be found again by `verify`."""
        if self._awaits_prediction:
            self._predicted, self._awaits_prediction = prediction.detach(), False

    def verify(self, logits: Tensor) -> int:
        """Hold the logits of memory and batch against the sizes and, once, against `expect`; the samples stored.

        Raises:
            ValueError: if what enters the block does not determine the logits, or the block was not called.
        """
        if self._current is None:
            raise ValueError(f"Expected `memory_at` to name a module that the target calls, but got '{self.name}'.")
        stored, size = self.samples, _size(self._current)
        if logits.shape[0] != stored + size:
            raise ValueError(
                f"Expected {stored} stored and {size} current samples to give as many logits, but got "
                f"{logits.shape[0]}: '{self.name}' is not where the joint tokens enter batch-first. {_ADVICE}"
            )
        if self._predicted is not None:
            again = logits[stored - _size(self._stored[-1]) : stored].detach()
            bound = (5e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3) * self._predicted.abs().max()
            if not bool(torch.allclose(again, self._predicted.to(again), rtol=0, atol=bound.item(), equal_nan=True)):
                raise ValueError(
                    f"Expected the tokens that entered '{self.name}' to give the same logits again, but they differ: "
                    f"something bypasses it. {_ADVICE}"
                )
            self._predicted, self._verified = None, True
        return stored

    @property
    def samples(self) -> int:
        """Samples stored."""
        return sum(map(_size, self._stored))

    def _extend_input(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        leaves, spec = tree_flatten((args, kwargs))
        sizes = {i: x.shape[0] for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim()}
        if not sizes:
            raise ValueError(f"Expected '{self.name}' to be called with tokens, but got {leaves}. {_ADVICE}")
        # What has as many rows as the tokens is batched; where one sample makes all look so, the other batches tell.
        size = next(iter(sizes.values()))
        batched = [i for i in sizes if sizes[i] == size]
        self._current = {i: leaves[i].detach().clone() for i in batched}  # a block may edit its input in place
        for i in batched:
            if all(i in batch for batch in self._stored):
                leaves[i] = self._with_past(i, leaves[i])
        new_args, new_kwargs = tree_unflatten(leaves, spec)
        return new_args, new_kwargs

    def _with_past(self, i: int, current: Tensor) -> Tensor:
        past = [batch[i] for batch in self._stored]
        if any(p.shape[1:] != current.shape[1:] for p in past):
            raise ValueError(
                f"Expected every batch to enter '{self.name}' with the same number of tokens, but the memory holds "
                f"{[tuple(p.shape[1:]) for p in past]} and the batch has {tuple(current.shape[1:])}. Pad the batches "
                "alike, or set memory_batches=1."
            )
        return torch.cat([*past, current])


def _size(batch: dict[int, Tensor]) -> int:
    return next(iter(batch.values())).shape[0]


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        log.warning(note)
