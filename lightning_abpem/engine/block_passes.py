"""The fusion block's passes over memory and batch: all at once or, where batches are large, each by itself.

By itself a batch has the size that the model works on anyway, and what is computed on the way takes as little memory.
The newest of the stored batches needs no pass at all: its prediction, after the last step, was one by the weights of
now. So that pass is made with gradients, and kept for the step that follows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from lightning_abpem.attention.calls import AttentionCall
from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.projections import FusionAttention
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.engine.memory import ADVICE, RememberedBatch, TokenMemory
from lightning_abpem.modules.carried import CarriedState
from lightning_abpem.modules.footprints import call_hooks, kept_by, precision, versions
from lightning_abpem.modules.inputs import OwnInputs, as_constants
from lightning_abpem.modules.patches import Uncopied, substituted

__all__ = ["LARGE", "BlockPasses", "Pass", "is_large"]

log = logging.getLogger(__name__)

LARGE = 2**20
"""Bytes of tokens from which on a batch passes the block by itself: below, the calls cost more than they spare.

Measured on a CPU (docs/performance); elsewhere, where a call costs launches, sixteen times that, by arithmetic.
"""

_AUDITED_PASSES = 2


class Pass(NamedTuple):
    """What is seen of one pass through the fusion: its attention calls, whose tokens are whose, its samples.

    `samples` is None for all of the forward's.
    """

    calls: list[AttentionCall]
    tokens: dict[str, Tokens]
    samples: int | None = None


class _Passed(NamedTuple):
    """A pass of the block: the attention calls, what it put out and, of one that is kept, what else that depends on."""

    calls: list[AttentionCall]
    output: Any
    condition: tuple[Any, ...] = ()


class BlockPasses(Uncopied):
    """Stands in for the forward of the memory's block, in the engine's passes and in predictions.

    Batches go together if the block cannot take them one by one: it edits its input, its input has a gradient, or it
    puts out several tensors of which it cannot be told which have a row for each sample.

    Args:
        memory: the stored batches.
        watched: the attentions, all inside the block.
        parts: whether batches may pass by themselves, if they are large.
        keeps: whether the pass of a prediction may be kept. It is if, besides, the block carries nothing from call to
            call, leaves nothing behind but its output, and nobody's hooks are inside.
    """

    def __init__(self, memory: TokenMemory, watched: Sequence[FusionAttention], parts: bool, keeps: bool) -> None:
        self.memory, self._watched, self._parts, self._keeps = memory, watched, parts, keeps
        self._block = memory.block
        self._inputs, self._carried = OwnInputs(), CarriedState(self._block)
        self._inner = list(self._block.modules())
        self._hooks = [hooks for module in self._inner if module is not self._block for hooks in call_hooks(module)]
        self._unaudited = _AUDITED_PASSES
        self._standing = ExitStack()  # in the block's forward, while a prediction is expected

    @contextmanager
    def over(self, tokens: Mapping[str, Tokens]) -> Iterator[list[Pass]]:
        """While it lasts, the block gets the stored tokens, oldest first, with the current ones after them.

        Args:
            tokens: whose tokens are whose in the current batch.

        Yields:
            what was seen, in the order of the samples.
        """
        self.memory.begin()
        passes: list[Pass] = []
        stand_in = partial(self._run, self._block.forward, tokens, passes)
        try:
            with substituted(self._block, "forward", stand_in):
                yield passes
        except Exception as error:
            if self.memory.samples:
                _add_note(
                    error,
                    f"ABPEM's memory had put {self.memory.samples} stored samples in front of the batch at "
                    f"'{self.memory.name}'. Everything after that module must depend on the batch through its input "
                    f"alone. {ADVICE}",
                )
            raise

    def start_prediction(self, is_trusted: Callable[[], bool]) -> None:
        """The current batch is predicted next, with the same arguments; keep that pass if it can be of use.

        Args:
            is_trusted: asked at the block's call, whether the same arguments give the same tokens.
        """
        batch = self.memory.current
        if batch is None or not (self._keeps and self._parts and self.memory.verified and _any_large(batch)):
            return
        if not (self._carried.moves or self._unaudited or any(self._hooks) or torch.is_grad_enabled()):
            stand_in = partial(self._predict, self._block.forward, batch, is_trusted)
            self._standing.enter_context(substituted(self._block, "forward", stand_in))

    def end_prediction(self) -> None:
        """The call of the target is over, or was broken off some time ago."""
        self._standing.close()

    # ------------------------------------------------------------------------------------------- the block's forward

    def _run(
        self, forward: Callable[..., Any], tokens: Mapping[str, Tokens], passes: list[Pass], *args: Any, **kwargs: Any
    ) -> Any:
        """Of an engine's pass: over memory and batch."""
        leaves, spec = tree_flatten((args, kwargs))
        batches = self.memory.enter(leaves, tokens)
        apart = self._one_by_one(forward, leaves, spec, batches) if self._can_part(leaves) else None
        for batch in batches:
            batch.prediction = None
        if apart is None:
            every = [self._pass(forward, *_arguments(leaves, spec, batches[-1], batches))]
            output, groups = every[0].output, [batches]
        else:
            output, every = apart
            groups = [[batch] for batch in batches]
        seen = [
            Pass(own.calls, _tokens_of(group, tokens), sum(batch.samples for batch in group))
            for own, group in zip(every, groups, strict=True)
        ]
        if passes:  # called again in the same forward: only all at once can be told from the other call
            self._parts = False
            seen = [_one_forward(*pair) for pair in zip(passes, seen, strict=True)]
        passes[:] = seen
        return output

    def _one_by_one(
        self, forward: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec, batches: Sequence[RememberedBatch]
    ) -> tuple[Any, list[_Passed]] | None:
        """The output for all batches and their passes; None if the block turns out not to take them so."""
        *past, current = batches
        before = kept_by(self._inner) if self._unaudited else None
        # The newest one first, whose pass may be that of its prediction: gradients are summed in the order of passes.
        passed = {
            batch: self._kept(batch) or self._own_pass(forward, *_arguments(leaves, spec, current, [batch]))
            for batch in batches[-2:]
        }
        if before is not None:
            self._unaudited -= 1
            # The first passes may make what the block keeps from then on.
            self._keeps = self._keeps and (self._unaudited > 0 or before == kept_by(self._inner))
        self._parts = not self._inputs.edited
        if not past:
            return passed[current].output, [passed[current]]
        if not self._parts:
            return None
        passed |= {batch: self._pass(forward, *_arguments(leaves, spec, current, [batch])) for batch in batches[:-2]}
        every = [passed[batch] for batch in batches]
        output = _joined([own.output for own in every], [batch.samples for batch in batches])
        self._parts = output is not None
        return (output, every) if self._parts else None

    def _predict(
        self,
        forward: Callable[..., Any],
        batch: RememberedBatch,
        is_trusted: Callable[[], bool],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Of the prediction: with gradients, which the caller does not see."""
        self._standing.close()
        if is_trusted():
            torch.clear_autocast_cache()  # of casts without gradients before, and with them after
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    passed = self._pass(forward, *as_constants(args, kwargs))
                batch.prediction = passed._replace(condition=self._condition())
            except RuntimeError as error:  # such as of tensors made in inference mode that it gets from elsewhere
                self._keeps = False
                log.debug("'%s' is not run with gradients in predictions: %s", self.memory.name, error)
            else:
                # A copy, for who gets it may edit it in place.
                return tree_map_only(Tensor, lambda x: x.detach().clone(), passed.output)
            finally:
                torch.clear_autocast_cache()
        return forward(*args, **kwargs)

    def _own_pass(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> _Passed:
        """A pass on copies, if the block edits its input or that is not known yet."""
        with self._inputs.of(args, kwargs) as (args, kwargs):
            return self._pass(forward, args, kwargs)

    def _pass(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> _Passed:
        """The forward, watched; what it carries along stays as it was."""
        carried = self._carried.kept() if self._carried.moves else nullcontext()
        with carried, capture_attention(self._watched) as calls:
            return _Passed(calls, forward(*args, **kwargs))

    # ------------------------------------------------------------------------------------------------- what is known

    def _can_part(self, leaves: Sequence[Any]) -> bool:
        assert self.memory.current is not None
        is_constant = not any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        return self._parts and is_constant and _any_large(self.memory.current)

    def _kept(self, batch: RememberedBatch) -> _Passed | None:
        """The pass of the batch's prediction, if one made now would be the same."""
        passed: _Passed | None = batch.prediction
        return passed if passed is not None and passed.condition == self._condition() else None

    def _condition(self) -> tuple[Any, ...]:
        """What a pass depends on besides its input: weights and buffers, and how torch computes."""
        state = list(chain(self._block.parameters(), self._block.buffers()))
        return precision(state), versions(state), [x.data_ptr() for x in state]


def is_large(tokens: Tensor) -> bool:
    """Whether a batch of these tokens is one to pass by itself."""
    return tokens.nbytes >= LARGE * (1 if tokens.device.type == "cpu" else 16)


def _any_large(batch: RememberedBatch) -> bool:
    return any(map(is_large, batch.tensors.values()))


def _arguments(
    leaves: Sequence[Any], spec: TreeSpec, current: RememberedBatch, batches: Sequence[RememberedBatch]
) -> tuple[Any, Any]:
    """What the block is called with for these batches at once.

    Args:
        leaves: what it is called with for the current batch, which also is what has no row for each sample.
        spec: its structure.
        current: the current batch.
        batches: stored ones, or those and the current one after them.
    """
    own = list(leaves)
    for i in current.tensors:
        if all(i in batch.tensors for batch in batches):
            parts = [leaves[i] if batch is current else batch.tensors[i] for batch in batches]
            own[i] = parts[0] if len(parts) == 1 else torch.cat(parts)
    args, kwargs = tree_unflatten(own, spec)
    return args, kwargs


def _joined(outputs: Sequence[Any], samples: Sequence[int]) -> Any:
    """What the block put out for each batch, as for all at once; None if it cannot be told what is batched."""
    flat = [tree_flatten(output) for output in outputs]
    last, spec = flat[-1]
    places = [i for i, x in enumerate(last) if isinstance(x, Tensor)]
    is_told = len(places) == 1 or max(samples) > 1
    for (leaves, own_spec), size in zip(flat, samples, strict=True):
        rows = [leaves[i].shape[:1] for i in places] if own_spec == spec else [()]
        is_told = is_told and all(own == (size,) for own in rows)
    if not is_told:
        return None
    joined = list(last)
    for i in places:
        joined[i] = torch.cat([leaves[i] for leaves, _ in flat])
    return tree_unflatten(joined, spec)


def _one_forward(first: Pass, second: Pass) -> Pass:
    """What is seen of two calls of the block, as of one: the later attention calls are counted on."""
    turns = Counter(call.name for call in first.calls)
    later = [replace(call, turn=call.turn + turns[call.name]) for call in second.calls]
    return second._replace(calls=[*first.calls, *later])


def _tokens_of(batches: Sequence[RememberedBatch], tokens: Mapping[str, Tokens]) -> dict[str, Tokens]:
    """Whose tokens are whose in these batches at once, if they are `tokens` in the current one."""
    return {
        name: own if own.keep is None else own._replace(keep=torch.cat([batch.masks[name] for batch in batches]))
        for name, own in tokens.items()
    }


def _add_note(error: Exception, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        log.warning(note)
