"""The engine's own passes: a forward over memory and batch, and what is seen of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_abpem.attention.blocks import ScoreBlock, score_blocks
from lightning_abpem.attention.calls import AttentionCall, FusedCall
from lightning_abpem.attention.capture import watch_attention
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion, check_samples
from lightning_abpem.attention.modalities import BatchTokens, refuse_silence
from lightning_abpem.attention.origins import TracedCall
from lightning_abpem.attention.projections import FusionAttention
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import Comparison, Pair
from lightning_abpem.attention.trace import trace_attention
from lightning_abpem.engine.batch import Batch
from lightning_abpem.engine.healthy import select_rows
from lightning_abpem.engine.logits import has_broken_rows, read_logits, refuse_probabilities
from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.engine.ranks import Ranks, several_processes
from lightning_abpem.engine.replay import FrozenReplay
from lightning_abpem.engine.settings import Settings
from lightning_abpem.engine.shards import has_shards
from lightning_abpem.engine.traceless import TracelessCalls
from lightning_abpem.modules.inference import explain_gradients
from lightning_abpem.modules.parameters import device_of, parameters_of
from lightning_abpem.modules.patches import watch_outputs

__all__ = ["Forward", "Pass"]

log = logging.getLogger(__name__)


class Pass(NamedTuple):
    """Logits of one pass, how many of them are the batch's, attention and outputs, as `Step` has them.

    `is_local` is True if any of the samples are this process's; `own` are the logits of its batch, detached.
    """

    logits: Tensor
    samples: int
    attention: Mapping[Pair, Sequence[Comparison]]
    outputs: Mapping[str, Any]
    is_local: bool = True
    own: Tensor | None = None


class Forward:
    """Runs forwards for the engine, and reads logits and attention off them.

    Args:
        model: the model.
        target: the module that is called.
        settings: where the logits are, whose tokens are whose, and the method that wants to know.
        fusion: the fusion attention, for methods that watch it.
        watched: its modules that are watched; empty for methods that do not.
        memory: the tokens of earlier batches, if they are remembered.
        replay: told of every pass.
        report: told which spans were read off a batch.

    Attributes:
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
        replay: FrozenReplay,
        report: Callable[[str], None],
    ) -> None:
        self._model, self._settings = model, settings
        self._memory, self._replay, self._watched = memory, replay, watched
        self._is_sharded = has_shards(model)
        modules = [attention.module for attention in watched]
        self._calls = TracelessCalls(model, target, modules, replay, self._is_sharded)
        self._fusion = fusion if watched else None
        self._tokens = None
        if self._fusion is not None:
            self._tokens = BatchTokens(settings.spans, self._fusion, self._trace, report)
        self._is_checked = self._warned_single = False
        self.ranks: Ranks | None = None

    def find_ranks(self) -> None:
        """Share the batches of all processes from now on, if there are several and the settings say so.

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
        self.ranks = Ranks(device_of(self._model.parameters()))

    @property
    def can_leave_out(self) -> bool:
        """True if other processes can take a step without this one's batch, for they have seen nothing of it yet."""
        return self.ranks is not None and not self._is_sharded and not self.ranks.is_in_step

    @property
    def needs_whole_batches(self) -> bool:
        """True if a step needs every sample of a batch: of outputs that are watched, or in a model cut into shards."""
        return self._is_sharded or bool(self._settings.method.watches)

    def tokens_of(self, args: Any, kwargs: Any) -> dict[str, Tokens]:
        """Return the tokens of each modality in the batch of these arguments; empty for methods that do not ask."""
        return {} if self._tokens is None else self._tokens(args, kwargs)

    def observe_all(self, batch: Batch, leave_out: Callable[[Batch, Exception], bool]) -> Pass | None:
        """Run one forward over memory and batch, and join what the other processes have seen in theirs.

        Args:
            batch: this process's.
            leave_out: called with a batch whose forward failed; return True to join the others' step without it.

        Returns:
            None if no process has a batch.
        """
        if self.ranks is not None and self._is_sharded:
            self.ranks.refuse_uneven(batch.args is not None)
        seen = None
        try:
            seen = self.observe(batch) if batch.is_own else None
        except Exception as error:
            if self.ranks is None or not leave_out(batch, error):
                raise
            self.end_step()
        if self.ranks is None:
            return seen
        own: tuple[Any, ...] = (None,) if seen is None else (seen.logits, seen.samples, seen.attention)
        if batch.has_failed:
            own = (torch.empty(0, 0), 0)  # a batch of nothing: the others are not to think that this stream is over
        together = self.ranks.global_batch(*own)
        if together is None or seen is None:
            return together and Pass(*together, {}, is_local=False)
        return Pass(*together, {}, is_local=seen.samples > 0, own=seen.own)

    def observe(self, batch: Batch) -> Pass:
        """Run one forward over memory and batch."""
        own = self._calls
        own.end(has_graphs=True)  # of another pass
        self._replay.start_pass()
        try:
            own.begin(batch.args, batch.kwargs)
            if self._memory is not None:
                self._memory.attach(own.changes, batch.tokens)
            calls = watch_attention(own.changes, self._watched)
            outputs = watch_outputs(own.changes, self._model, self._settings.method.watches)
            output = own.run()
        except Exception as error:
            explain_gradients(error)
            if self._memory is not None:
                self._memory.add_note(error)
            raise
        finally:
            own.changes.close()
        own.end_call()
        return self._seen(output, calls, outputs, batch)

    def predict(self, args: Any, kwargs: Any) -> Tensor:
        """Run one forward over a batch alone, without gradients; return its logits (B, C)."""
        self.end_step()
        self._replay.start_pass()
        try:
            self._calls.begin(args, kwargs)
            with torch.no_grad():
                logits = read_logits(self._calls.run(), self._settings.logits).clone()
            self._calls.end_call()
            return logits
        finally:
            self.end_step()

    def score_blocks(self, args: Any, kwargs: Any, samples: int) -> list[ScoreBlock]:
        """Run one forward over a batch alone, without gradients; return the fusion's scores in its first samples."""
        assert self._fusion is not None
        assert self._tokens is not None
        tokens = self._tokens(args, kwargs)
        self.end_step()
        self._replay.start_pass()
        try:
            self._calls.begin(args, kwargs)
            calls = watch_attention(self._calls.changes, self._watched)
            with torch.no_grad():
                self._calls.run()
            self._calls.changes.close()
            self._calls.end_call()
            tokens = self._tokens.check(calls, tokens, args, kwargs)
            first = calls[0]
            device = first.q.device if isinstance(first, FusedCall) else first.scores.device
            with torch.no_grad(), _in_full_precision(device):
                return score_blocks(self._fusion, calls, tokens, samples)
        finally:
            self.end_step()

    @property
    def is_plain(self) -> bool:
        """True while a pass goes around the target's compiled code, in which nothing can be watched."""
        return self._calls.is_plain

    def end_step(self) -> None:
        """End the pass that is under way, if any, after its gradients; it can be called again."""
        self._calls.end()

    def drop(self) -> None:
        """Let go of a pass that was broken off: what came after it is not to be lost."""
        self._calls.drop()

    def _seen(
        self,
        output: Any,
        calls: Sequence[AttentionCall],
        outputs: Mapping[str, Any],
        batch: Batch,
    ) -> Pass:
        logits, tokens = read_logits(output, self._settings.logits), batch.tokens
        stored = 0
        if self._memory is not None:
            stored, tokens = self._memory.verify(logits, self._calls.drew), self._memory.tokens_of_all(tokens)
        samples = logits.shape[0] - stored
        attention: Mapping[Pair, Sequence[Comparison]] = {}
        if samples:
            if self._fusion is not None:
                attention = self._compare(calls, tokens, logits, batch)
            self._check_logits(logits)
        if batch.rows is not None and not has_broken_rows(logits[stored:]):
            logits, attention = select_rows(batch.rows, stored, logits, attention)
            samples = logits.shape[0] - stored
            if self._memory is not None:
                self._memory.keep(batch.rows)
        return Pass(logits, samples, attention, outputs, own=logits[stored:].detach())

    def _compare(
        self, calls: Sequence[AttentionCall], tokens: dict[str, Tokens], logits: Tensor, batch: Batch
    ) -> Mapping[Pair, Sequence[Comparison]]:
        """Return the score statistics of the calls, which are those of every fusion attention, batch-first."""
        assert self._fusion is not None
        assert self._tokens is not None
        called = {call.name for call in calls}
        if any(attention.name not in called for attention in self._watched):
            refuse_silence(self._fusion, called, self._trace(batch.args, batch.kwargs))
        check_samples(calls, logits.shape[0])
        tokens = self._tokens.check(calls, tokens, batch.args, batch.kwargs)
        if self._settings.steps and self._settings.method.moves_scores:
            _check_gradients(calls, self._fusion.adapting, self._model)
        with _in_full_precision(logits.device):
            return self._fusion.compare(calls, tokens)

    def _check_logits(self, logits: Tensor) -> None:
        """Reject probabilities (first batch only); warn once about a batch of one."""
        if not self._is_checked:
            self._is_checked = True
            refuse_probabilities(logits)
        if logits.shape[0] == 1 and self._settings.method.balances_batch and not self._warned_single:
            self._warned_single = True
            log.warning("A batch of one sample: a balance over its predictions is its own entropy, not a balance.")

    def _trace(self, args: Any, kwargs: Any) -> list[TracedCall]:
        """Return the attention calls that a forward makes."""
        self._calls.end(has_graphs=True)
        try:
            self._calls.begin(args, kwargs)
            traced = trace_attention(self._model, self._calls.run)
            self._calls.end_call()
            return traced
        finally:
            self._calls.end()


def _check_gradients(calls: Sequence[AttentionCall], adapting: Sequence[FusionAttention], model: nn.Module) -> None:
    """Raise unless the scores of every attention that adapts carry a gradient, so that bootstrapping can act.

    Raises:
        ValueError: naming the attention whose scores carry none, or a parameter that is not in its place.
    """
    parameters = {attention.name: attention.parameters for attention in adapting}
    for call in calls:
        scores = (call.q, call.k) if isinstance(call, FusedCall) else (call.scores,)
        if call.name not in parameters or any(x.requires_grad for x in scores):
            continue
        there = set(map(id, parameters_of(model.modules())))
        if absent := [name for name, p in parameters[call.name].items() if id(p) not in there]:
            raise ValueError(
                f"Expected what adapts to be in its place in the model, but '{absent[0]}' is not there in this call. "
                "Another tensor stands in its place, as under torch.func.functional_call, or the model was given new "
                "parameters. A step could not move the prediction. Call the model itself, with the weights that are "
                "to adapt in it from before the run on."
            )
        raise ValueError(
            f"Expected the scores of '{call.name}' to carry gradients to its projections, but they carry none. "
            "That is so under torch.no_grad() (torch.is_grad_enabled() is False in its forward), inside an "
            "autograd.Function (the scores reach its forward detached), as in torch.utils.checkpoint with "
            "use_reentrant=True, after .detach(), or if the forward sets requires_grad of the projections to "
            "False. Bootstrapping could not act. Use an attention without these, or set attention_weight=0."
        )


def _in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast, if it is on."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
