"""The memory of the last batches, as the tokens that entered the fusion block: encoders are frozen, so never stale."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_abpem.attention.spans import Tokens
from lightning_abpem.engine.checkpoint import SAVED
from lightning_abpem.engine.outputs import find_odd
from lightning_abpem.modules.names import named_module
from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.refusals import ModelError, add_note

__all__ = ["ADVICE", "RememberedBatch", "TokenMemory", "find_memory"]

log = logging.getLogger(__name__)

_BY_VALUE = (*SAVED, slice, range, torch.device, MethodType)
_UNKNOWN: Any = object()  # in place of an object that a saved state cannot hold
ADVICE = "Name the fusion block with `memory_at`, or set memory_batches=1."


@dataclass(eq=False)
class RememberedBatch:
    """One batch as it entered the block: its tensors by their place among the arguments.

    `places` are those of all tensors, `tensors` those with a row for each sample; `masks` say whose tokens they are.
    `others` are the arguments that are no tensors, such as lengths, in the order of their places.
    """

    places: frozenset[int]
    tensors: dict[int, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    others: list[Any] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def fits(self, other: RememberedBatch) -> bool:
        """Return True if both have the same arguments and numbers of tokens, so that they can be one batch."""
        common = self.tensors.keys() & other.tensors.keys()
        alike = all(self.tensors[i].shape[1:] == other.tensors[i].shape[1:] for i in common)
        same = len(self.others) == len(other.others) and all(map(_is_same, self.others, other.others))
        return self.places == other.places and alike and same


class TokenMemory:
    """First in, first out store of the tokens that entered the fusion block, the current batch included.

    A stored batch with other numbers of tokens than the current one is left out of its step. So is one with other
    arguments that are no tensors, and one without a mask where the current one has one.

    Args:
        block: the fusion block. Everything after it must depend on the batch through its input alone.
        name: its name, for messages.
        batches: batches held, the current one included; at least 2.
    """

    def __init__(self, block: nn.Module, name: str, batches: int) -> None:
        self.block, self.name = block, name
        self._stored: deque[RememberedBatch | None] = deque(maxlen=batches - 1)
        self._past: list[RememberedBatch] = []  # those of the stored batches that fit the current one
        self.current: RememberedBatch | None = None
        self._predicted: Tensor | None = None
        self.verified = self._warned = False

    def attach(self, changes: Changes, tokens: Mapping[str, Tokens]) -> None:
        """Let the block get the stored tokens, oldest first, with the current ones after them.

        Args:
            changes: undo that.
            tokens: the tokens of each modality in the current batch.
        """
        self.current, self._past = None, []
        changes.wrap_call(self.block, "forward", self._run, tokens)

    def tokens_of_all(self, tokens: Mapping[str, Tokens]) -> dict[str, Tokens]:
        """Return the tokens of each modality in all batches at once, if they are `tokens` in the current one."""
        batches = [*self._past, *([] if self.current is None else [self.current])]
        return {
            name: own if own.keep is None else own._replace(keep=torch.cat([batch.masks[name] for batch in batches]))
            for name, own in tokens.items()
        }

    def add_note(self, error: Exception) -> None:
        """Say in an error of a forward that the memory had a part in it, if it had."""
        if self.samples:
            shapes = [] if self.current is None else [tuple(x.shape) for x in self.current.tensors.values()]
            note = (
                f"ABPEM's memory had put {self.samples} stored samples in front of the batch at '{self.name}', in its "
                f"arguments of shape {', '.join(map(str, shapes))}: each of them is taken to have a row for each "
                "sample. If one of them has not, compute it inside that module. Everything after that module must "
                f"depend on the batch through its input alone. {ADVICE}"
            )
            add_note(error, note)

    def _run(
        self, tokens: Mapping[str, Tokens], forward: Callable[..., object], /, *args: object, **kwargs: object
    ) -> Any:
        """Run the block over the stored tokens and those of the batch.

        Raises:
            ValueError: if the pass has called the block before, or with a container that cannot hold all tokens.
        """
        if self.current is not None:
            raise ModelError(
                f"Expected '{self.name}' to be called once in a forward, when memory_batches > 1, but it was called "
                "again: the memory holds the tokens of one call for each batch. Name with `memory_at` a module around "
                "all of these calls, which is called once, or set memory_batches=1."
            )
        leaves, spec = tree_flatten((args, kwargs))
        *past, current = self.enter(leaves, tokens)
        if not past:
            return forward(*args, **kwargs)
        if (odd := find_odd((args, kwargs))) is not None:
            raise ModelError(
                f"Expected '{self.name}' to be called with containers that can be made anew of their items, but got a "
                f"{type(odd).__name__}, which has attributes or a constructor of its own. Give the block its items "
                f"instead. {ADVICE}"
            )
        for i in current.tensors:
            if all(i in batch.tensors for batch in past):
                leaves[i] = torch.cat([*(batch.tensors[i] for batch in past), leaves[i]])
        args, kwargs = tree_unflatten(leaves, spec)
        return forward(*args, **kwargs)

    def enter(self, leaves: Sequence[Any], tokens: Mapping[str, Tokens]) -> list[RememberedBatch]:
        """Let the current batch enter the block as the leaves of its arguments; return all that pass, oldest first.

        Args:
            leaves: what the block is called with.
            tokens: whose tokens are whose.

        Raises:
            ValueError: if there is no tensor among them.
        """
        sizes = {i: x.shape[0] for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and _has_rows(x)}
        if not sizes:
            raise ValueError(f"Expected '{self.name}' to be called with tokens, but got {leaves}. {ADVICE}")
        # What has as many rows as the tokens is batched; where one sample makes all look so, the other batches tell.
        wide = [sizes[i] for i in sizes if sizes[i] > 1 and leaves[i].dim() > 2]
        size = next(iter([*wide, *sizes.values()]))
        # A copy, for a block may edit its input in place.
        tensors = {i: leaves[i].detach().clone() for i in sizes if sizes[i] == size}
        masks = {name: own.keep for name, own in tokens.items() if own.keep is not None}
        others = [x for x in leaves if not isinstance(x, Tensor)]
        self.current = RememberedBatch(frozenset(sizes), tensors, masks, others)
        stored = [batch for batch in self._stored if batch is not None]
        self._past = [batch for batch in stored if batch.fits(self.current)]
        if len(self._past) < len(stored) and not self._warned:
            self._warned = True
            log.warning(
                "Stored batches entered '%s' with other numbers of tokens, with other arguments that are no tensors, "
                "or with a mask where this one has none: they are left out of its step. Pad the batches alike for a "
                "full memory, and give lengths as a tensor.",
                self.name,
            )
        return [*self._past, self.current]

    def keep(self, rows: Tensor) -> None:
        """Let go of the samples of the current batch that are not among these rows, before it is stored."""
        if self.current is not None:
            size, batch = self.current.samples, self.current
            batch.tensors = {i: x[rows.to(x.device)] for i, x in batch.tensors.items()}
            batch.masks = {k: x[rows.to(x.device)] if len(x) == size else x for k, x in batch.masks.items()}

    def push(self) -> None:
        """Store the current batch; the oldest one goes if the memory is full."""
        if self.current is not None:
            self._stored.append(self.current)

    def push_nothing(self) -> None:
        """Store a mark of a batch that other processes alone had."""
        self._stored.append(None)

    def skip(self) -> None:
        """Forget the prediction for a batch that is not stored."""
        self._predicted = None

    def drop(self) -> None:
        """Let go of a pass that failed; what is stored stays."""
        self.current, self._past = None, []

    def shrink(self) -> int:
        """Hold from now on half as many batches as were in front of the current one; return how many with it."""
        self._stored = deque(self._stored, maxlen=len(self._past) // 2)
        return len(self._past) // 2 + 1

    def state_dict(self) -> list[dict[str, Any]]:
        """The stored batches, oldest first; without places, that of others alone."""
        nothing = RememberedBatch(frozenset(), {})
        stored = [batch or nothing for batch in self._stored]
        return [
            {
                "places": sorted(batch.places),
                "tensors": batch.tensors,
                "masks": batch.masks,
                "others": [[x] if isinstance(x, SAVED) else [] for x in batch.others],
            }
            for batch in stored
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Store these batches instead, the newest of them if there is not room for all."""
        self.clear()
        for batch in state:
            tensors, masks = dict(batch["tensors"]), dict(batch["masks"])
            others = [x[0] if x else _UNKNOWN for x in batch["others"]]
            own = RememberedBatch(frozenset(batch["places"]), tensors, masks, others)
            self._stored.append(own if own.places else None)

    def clear(self) -> None:
        """Forget all tokens."""
        self._stored.clear()
        self._past.clear()
        self.current = self._predicted = None

    def expect(self, prediction: Tensor) -> None:
        """The logits that the model gave for the current batch, which `verify` finds again once it is stored."""
        if not self.verified and len(prediction):
            self._predicted = prediction.detach().clone()  # the caller may edit its own

    def verify(self, logits: Tensor, drew: Callable[[], bool] = bool) -> int:
        """Hold the logits of memory and batch against the sizes and, once, against `expect`; return the samples stored.

        Logits over another number of classes tell nothing: later ones are compared.

        Args:
            logits: those of a pass.
            drew: returns True if the pass drew random numbers.

        Raises:
            ValueError: if what enters the block does not determine the logits, or the block was not called.
        """
        if self.current is None:
            raise ValueError(f"Expected `memory_at` to name a module that the target calls, but got '{self.name}'.")
        stored, size = self.samples, self.current.samples
        if logits.shape[0] != stored + size:
            raise ValueError(
                f"Expected {stored} stored and {size} current samples to give as many logits, but got "
                f"{logits.shape[0]}: '{self.name}' is not where the joint tokens enter batch-first. {ADVICE}"
            )
        is_next = bool(self._past) and self._past[-1] is self._stored[-1]
        if self._predicted is not None and is_next and self._predicted.shape[1:] == logits.shape[1:]:
            again = logits[stored - self._past[-1].samples : stored].detach()
            largest = self._predicted.masked_fill(self._predicted.isinf(), 0).abs().max()  # -inf: no class
            bound = (5e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3) * largest
            if not bool(torch.allclose(again, self._predicted.to(again), rtol=0, atol=bound.item(), equal_nan=True)):
                why = (
                    "the forward draws random numbers"
                    if drew()
                    else "something bypasses it, or differs from call to call"
                )
                raise ModelError(
                    f"Expected the tokens that entered '{self.name}' to give the same logits again, but they differ: "
                    f"{why}. {ADVICE}"
                )
            self._predicted, self.verified = None, True
        return stored

    @property
    def samples(self) -> int:
        """Stored samples in front of the current ones."""
        return sum(batch.samples for batch in self._past)


def _has_rows(x: Tensor) -> bool:
    """Return False for a parameter or a part of one, such as a position embedding: no row of it is a sample's.

    One that is expanded over the samples has rows. Of a single row nobody can tell.
    """
    is_own = isinstance(x, nn.Parameter) or (isinstance(x._base, nn.Parameter) and x.stride(0) != 0)
    return x.shape[0] == 1 or not is_own


def _is_same(x: Any, y: Any) -> bool:
    return x is y or x is _UNKNOWN or y is _UNKNOWN or (type(x) is type(y) and isinstance(x, _BY_VALUE) and x == y)


def find_memory(
    model: nn.Module, target: nn.Module, attentions: Sequence[str], at: str | None, batches: int
) -> TokenMemory:
    """The memory at the block named `at` or, if None, at the one around the fusion attentions.

    Several layers may get masks from the module that calls them, so it is that one: the innermost around all. Around a
    single attention it is the innermost numbered module, as in a ModuleList, or else its parent.

    Raises:
        ValueError: if there is no such block, or an attention is outside it.
    """
    name = at or _around(model, attentions) or _layer_of(attentions[0])
    block = named_module(model, name, "memory_at")
    if block is target or block is model:
        raise ValueError(
            f"Expected `memory_at` to name the module that the joint tokens enter, when memory_batches > 1, but "
            f"'{attentions[0]}' has no block of its own around it. Wrap the attention, its residual and what follows "
            "in a module, or set memory_batches=1."
        )
    inside = set(block.modules())
    if outside := [attention for attention in attentions if model.get_submodule(attention) not in inside]:
        raise ValueError(
            f"Expected '{outside[0]}' to attend over stored samples too, but it is outside '{name}', where the memory "
            "adds them. Name with `memory_at` a module that holds all attentions of `fusion`, or set memory_batches=1."
        )
    return TokenMemory(block, name, batches)


def _around(model: nn.Module, attentions: Sequence[str]) -> str:
    """The innermost module around several attentions; empty if it is the model, or there is one attention alone."""
    if len(attentions) == 1:
        return ""
    columns = zip(*(name.split(".") for name in attentions), strict=False)
    parts = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    while parts and isinstance(model.get_submodule(".".join(parts)), nn.ModuleList | nn.ModuleDict):
        parts.pop()  # which nobody calls
    return ".".join(parts)


def _layer_of(attention: str) -> str:
    parts = attention.split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts[:-1])
