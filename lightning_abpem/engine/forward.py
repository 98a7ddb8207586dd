"""The engine's own passes: a forward over memory and batch, and what is seen of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_abpem.attention.capture import capture_attention
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion, check_samples
from lightning_abpem.attention.modalities import BatchTokens, refuse_silence
from lightning_abpem.attention.origins import SeenCall
from lightning_abpem.attention.projections import FusionAttention
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import Comparison, Pair, joined
from lightning_abpem.attention.trace import trace_attention
from lightning_abpem.engine.block_passes import BlockPasses, Pass
from lightning_abpem.engine.logits import read_logits, refuse_probabilities
from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.engine.ranks import Ranks, several_processes
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.shards import gathers_weights, has_shards
from lightning_abpem.modules.carried import CarriedState
from lightning_abpem.modules.compiled import compiled_around, eagerly
from lightning_abpem.modules.inputs import OwnInputs
from lightning_abpem.modules.patches import encoders_around, outputs_of, without_nested_tensors

__all__ = ["Observer", "Seen"]

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """Of one pass: logits, how many of them are the batch's, attention and outputs, as `Step` has them.

    `is_local` says whether any of the samples are this process's.
    """

    logits: Tensor
    samples: int
    attention: Mapping[Pair, Sequence[Comparison]]
    outputs: Mapping[str, Any]
    is_local: bool = True


class Observer:
    """Runs the target's forward for the engine.

    Args:
        model: the model.
        target: the module whose forward is run.
        settings: where the logits are, whose tokens are whose, and the method that wants to know.
        fusion: the fusion attention, for methods that watch it.
        watched: its modules that are watched; empty for methods that do not.
        memory: the tokens of earlier batches, if they are remembered.
        report: told which spans were read off a batch.

    Attributes:
        inside: whether a pass is under way: calls of the target are the engine's own then.
        ranks: the processes that share every batch; None for one.
    """

    def __init__(
        self,
        model: nn.Module,
        target: nn.Module,
        settings: Settings,
        fusion: JointFusion | SeparateFusion | None,
        watched: Sequence[FusionAttention],
        memory: TokenMemory | None,
        report: Callable[[str], None],
    ) -> None:
        self._model, self._target, self._settings, self._memory = model, target, settings, memory
        self._fusion = fusion if watched else None
        self._watched = watched
        self._tokens = None
        if self._fusion is not None:
            self._tokens = BatchTokens(settings.spans, self._fusion, self._trace, report)
        modules = [attention.module for attention in watched]
        self._encoders, self._compiled = encoders_around(model, modules), compiled_around(model, modules)
        self._inputs, self._carried = OwnInputs(), CarriedState(target)
        self._is_sharded = has_shards(model)
        self._passes: BlockPasses | None = None
        if memory is not None:
            # What is watched inside the block is one output, and every process has to run it as often.
            parts = not (self._is_sharded or settings.method.watches)
            self._passes = BlockPasses(memory, watched, parts, keeps=not self._compiled and settings.steps > 0)
        # FSDP2 gathers a module's weights in its hooks; those of others are not for the engine's passes.
        self._calls_hooks = gathers_weights(target)
        self._is_checked = self._warned_single = False
        self.inside = False
        self.ranks: Ranks | None = None

    def find_ranks(self) -> None:
        """From now on see the batches of all processes, if there are several and the settings say so.

        Raises:
            ValueError: if the method compares what is not exchanged.
        """
        if not several_processes():
            return
        if self._settings.sync == "local":
            if self._is_sharded:
                raise ValueError(
                    'Expected sync="global", for the model is cut into shards, so that every forward needs all '
                    'processes, but got sync="local".'
                )
            return
        method = self._settings.method
        if method.watches:
            raise ValueError(
                f"{method.name} compares the outputs of modules, which are not exchanged between processes: set "
                'sync="local", with which each process adapts on its own stream.'
            )
        if self._is_sharded and self._fusion is not None and self._settings.spans is None:
            raise ValueError(
                "Expected `modalities` to give the tokens, for the model is cut into shards, so that every forward "
                f'needs all processes, also the one that "auto" reads them off, but got {self._settings.modalities!r}.'
            )
        self.ranks = Ranks(next((p.device for p in self._model.parameters()), torch.device("cpu")))

    def tokens_of(self, args: Any, kwargs: Any) -> dict[str, Tokens]:
        """Whose tokens are whose in the batch of these arguments; empty for methods that do not ask."""
        return {} if self._tokens is None else self._tokens(args, kwargs)

    def observe_all(self, args: Any, kwargs: Any, tokens: dict[str, Tokens]) -> Seen | None:
        """One forward over memory and batch, and what the other processes have seen in theirs.

        Args:
            args: the target's arguments; None without a batch of one's own.
            kwargs: its keyword arguments.
            tokens: see `tokens_of`.

        Returns:
            None if no process has a batch.
        """
        if self.ranks is not None and self._is_sharded:
            self.ranks.refuse_uneven(args is not None)
        seen = None if args is None else self.observe(args, kwargs, tokens)
        if self.ranks is None:
            return seen
        own = (None,) if seen is None else (seen.logits, seen.samples, seen.attention)
        together = self.ranks.global_batch(*own)
        return together and Seen(*together, {}, is_local=seen is not None and seen.samples > 0)

    def observe(self, args: Any, kwargs: Any, tokens: dict[str, Tokens]) -> Seen:
        """One forward over memory and batch."""
        with (
            self._inputs.of(args, kwargs) as (args, kwargs),
            self._watching(tokens) as passes,
            outputs_of(self._model, self._settings.method.watches) as outputs,
        ):
            output = self._run_target(args, kwargs)
        logits = read_logits(output, self._settings.logits)
        stored = 0 if self._memory is None else self._memory.verify(logits)
        samples = logits.shape[0] - stored
        attention: Mapping[Pair, Sequence[Comparison]] = {}
        if samples and self._fusion is not None:
            attention = joined([self._compare(own, logits, args, kwargs) for own in passes])
        if samples:
            self._check_logits(logits)
        return Seen(logits, samples, attention, outputs)

    def start_prediction(self, is_trusted: Callable[[], bool]) -> None:
        """The target's call goes on to its prediction; see `BlockPasses`."""
        if self._passes is not None:
            self._passes.start_prediction(is_trusted)

    def end_prediction(self) -> None:
        """The target's call is over."""
        if self._passes is not None:
            self._passes.end_prediction()

    @contextmanager
    def _watching(self, tokens: dict[str, Tokens]) -> Iterator[list[Pass]]:
        """The passes through the fusion while the block lasts: one or, with a memory, several."""
        if self._passes is not None:
            with self._passes.over(tokens) as passes:
                yield passes
        else:
            with capture_attention(self._watched) as calls:
                yield [Pass(calls, tokens)]

    def _run_target(self, args: Any, kwargs: Any) -> Any:
        """The target's forward; calls of the target within it are the engine's own."""
        self.inside = True
        try:
            with ExitStack() as stack:
                if self._carried.moves:
                    stack.enter_context(self._carried.kept())
                if self._encoders:
                    stack.enter_context(without_nested_tensors(self._encoders))
                if self._compiled:
                    stack.enter_context(eagerly(self._compiled))
                run = self._target if self._calls_hooks else self._target.forward
                return run(*args, **kwargs)
        finally:
            self.inside = False

    def _compare(self, own: Pass, logits: Tensor, args: Any, kwargs: Any) -> Mapping[Pair, Sequence[Comparison]]:
        """The score statistics of a pass, whose calls are those of every fusion attention, batch-first."""
        assert self._fusion is not None
        assert self._tokens is not None
        called = {call.name for call in own.calls}
        if any(attention.name not in called for attention in self._watched):
            refuse_silence(self._fusion, called, self._trace(args, kwargs))
        check_samples(own.calls, logits.shape[0] if own.samples is None else own.samples)
        tokens = self._tokens.check(own.calls, own.tokens, args, kwargs)
        with _in_full_precision(logits.device):
            return self._fusion.compare(own.calls, tokens)

    def _check_logits(self, logits: Tensor) -> None:
        """Of the first batch: they are no probabilities. Of the first that is alone: said once."""
        if not self._is_checked:
            self._is_checked = True
            refuse_probabilities(logits)
        if logits.shape[0] == 1 and self._settings.method.balances_batch and not self._warned_single:
            self._warned_single = True
            log.warning("A batch of one sample: a balance over its predictions is its own entropy, not a balance.")

    def _trace(self, args: Any, kwargs: Any) -> list[SeenCall]:
        """The attention calls that a forward makes."""
        with self._inputs.of(args, kwargs) as (args, kwargs):
            return trace_attention(self._model, lambda: self._run_target(args, kwargs))


def _in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Out of autocast, if it is on."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
