"""Batches that cannot be adapted: by what reasons, how many, and which errors end the run all the same."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.modules.refusals import ModelError

__all__ = [
    "NOT_FINITE",
    "NOT_FIT",
    "ON_ERROR",
    "Fault",
    "Faults",
    "OnError",
    "Skips",
    "explained_gradients",
    "is_out_of_memory",
]

log = logging.getLogger(__name__)

OnError = Literal["predict", "raise"]
ON_ERROR = get_args(OnError)

NOT_FINITE = "not finite"
NOT_FIT = "not fit"
OUT_OF_MEMORY = "out of memory"
MISFIT = "does not fit"
_LONGEST = 400  # characters of an error that are said
_ALLOCATORS = (  # what torch's allocators say in a plain RuntimeError
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class Fault(NamedTuple):
    """The reason for which a batch was not adapted, and what was seen.

    Args:
        reason: under which it is counted.
        seen: in words.
        error: raised after the call, if that does not raise its own; None to go on. Its frames are cleared, for they
            hold the tensors of the pass that failed.
    """

    reason: str
    seen: str
    error: BaseException | None = None


class Skips:
    """Steps that were not taken.

    Args:
        speaks: warn of the first one for each reason.

    Attributes:
        counts: how many, by reason.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.counts: dict[str, int] = {}
        self._speaks, self._said = speaks, set[str]()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def count(self, reason: str, said: str) -> None:
        """Count a step under a reason; the first time `said` is a warning."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if reason not in self._said:
            self._said.add(reason)
            if self._speaks:
                log.warning("%s", said)


class _TooLargeError(Exception):
    """A batch is as large as one for which the memory did not suffice."""


class Faults:
    """Tells the faults of a batch from errors that end the run.

    An error is a batch's own once the configuration has proven itself, that is once a batch has adapted. If tokens of
    earlier batches are in front of this one, a batch has to have adapted with some in front. Too little memory is so
    from the first batch on. An error that says that the model does not fit, whatever the batch, never is.

    Args:
        on_error: "predict" without adapting to such a batch, or "raise".
        memory: the tokens of earlier batches, which are given up first where memory is short.
        skips: what counts.
    """

    def __init__(self, on_error: OnError, memory: TokenMemory | None, skips: Skips) -> None:
        self._on_error, self._memory, self._skips = on_error, memory, skips
        self._is_proven = self._is_memory_proven = False
        self._bound: int | None = None  # values in the arguments of the smallest batch that was too large

    def prove(self) -> None:
        """Note that a step was computed."""
        self._is_proven = True
        self._is_memory_proven = self._is_memory_proven or self._stored > 0

    @property
    def proven(self) -> list[bool]:
        """True each if a batch has adapted, and if one has with stored samples in front: of the state."""
        return [self._is_proven, self._is_memory_proven]

    @proven.setter
    def proven(self, proven: Sequence[bool]) -> None:
        self._is_proven, self._is_memory_proven = proven

    def refuse_size(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Raise if a batch is as large as one for which the memory did not suffice."""
        if self._bound is not None and _size(args, kwargs) >= self._bound:
            raise _TooLargeError(f"The batch is no smaller than one that was too large, {self._bound:,} values.")

    def of(self, error: Exception, args: tuple[object, ...], kwargs: dict[str, object]) -> Fault | None:
        """Return the fault of a batch by the error that its adapting passes raised; None if it has to be raised.

        Where memory was short, later batches will take less.
        """
        if self._on_error == "raise" or isinstance(error, ModelError):
            return None
        seen = f"{type(error).__name__}: {error}"
        seen = seen if len(seen) <= _LONGEST else f"{seen[:_LONGEST]}..."
        if isinstance(error, _TooLargeError):
            return Fault(OUT_OF_MEMORY, str(error))
        if is_out_of_memory(error):
            return Fault(OUT_OF_MEMORY, f"{seen} {self._take_less(args, kwargs)}")
        if not self._is_proven or (self._stored and not self._is_memory_proven):
            return None
        return Fault(MISFIT if isinstance(error, ValueError) else type(error).__name__, seen)

    def count(self, fault: Fault) -> None:
        """Count a batch that was predicted all the same."""
        self._skips.count(
            fault.reason,
            f"A batch could not be adapted, and is predicted by the weights as they are: {fault.seen} Such batches are "
            f'counted in `skipped_for`, under {fault.reason!r}. To stop at one, set on_error="raise".',
        )

    def drop(self, fault: Fault) -> None:
        """Let go of what a pass that failed has left."""
        if self._memory is not None:
            self._memory.drop()
        if fault.reason == OUT_OF_MEMORY:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    @property
    def _stored(self) -> int:
        return 0 if self._memory is None else self._memory.samples

    def _take_less(self, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        """Have later batches take less memory; return in which way."""
        if self._memory is not None and self._stored:
            return f"From now on the loss sees {self._memory.shrink()} batches."
        self._bound = _size(args, kwargs) or None
        if self._bound is None:
            return "The next batch is tried again."
        return f"No step is tried for batches as large, {self._bound:,} values, from now on."


@contextmanager
def explained_gradients() -> Iterator[None]:
    """Say of torch's errors in a backward what the forward does that gradients cannot go through.

    Raises:
        ValueError: in their place.
    """
    try:
        yield
    except CheckpointError as error:
        raise ValueError(
            "Expected a fusion that runs as in its pass, but torch.utils.checkpoint runs a part of it again in "
            "backward, where nothing is captured and no stored sample enters. Switch checkpointing off "
            "(gradient_checkpointing_disable() in Hugging Face transformers), or set memory_batches=1."
        ) from error
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise ValueError(
                "Expected a forward that gradients can go back through, but it edits a tensor in place that they "
                "need: torch's error above says which kind. Edit it out of place (x = x + 1, not x += 1), or use a "
                "clone of it in what follows."
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocator has failed, of the host or of a device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS)


def _size(args: tuple[object, ...], kwargs: dict[str, object]) -> int:
    """Return the number of values in the tensors of a call's arguments; 0 if none is found."""
    return sum(x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_nested)
