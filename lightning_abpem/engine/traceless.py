"""The engine's own calls of the target: each leaves no trace, for all that it can reach is put back after it."""

from __future__ import annotations

from collections.abc import Sequence
from traceback import walk_tb
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_abpem.engine.replay import FrozenReplay
from lightning_abpem.engine.shards import gathers_weights
from lightning_abpem.modules.compiled import compiled_around, eagerly
from lightning_abpem.modules.patches import Changes, encoders_around, without_nested_tensors
from lightning_abpem.modules.quiet import hush, logging_class
from lightning_abpem.modules.state import Snapshot

__all__ = ["TracelessCalls", "comes_from_forward"]

_OURS = tuple(f"lightning_abpem.{folder}." for folder in ("attention", "engine", "modules"))


class TracelessCalls:
    """Calls the target for the engine, one call at a time: `begin`, `run`, and `end` after the gradients.

    Args:
        model: the model.
        target: the module that is called.
        watched: modules whose attention is captured, so that no compiled code and no fast path may hide it.
        replay: told where a pass begins, and what it changed.
        is_sharded: True if FSDP2 replaces the modules' parameters in their calls.

    Attributes:
        changes: what is put back right after the call; for what else stands in during it.
        is_plain: True while a call goes around the target's compiled code, in which nothing can be watched.
    """

    def __init__(
        self, model: nn.Module, target: nn.Module, watched: Sequence[nn.Module], replay: FrozenReplay, is_sharded: bool
    ) -> None:
        self._target, self._replay = target, replay
        self._is_sharded, self._calls_hooks = is_sharded, gathers_weights(target)
        self._encoders, compiled = encoders_around(model, watched), compiled_around(model, watched)
        self._compiled = [module for module in compiled if module is not target]
        self._goes_around, self.is_plain = target in compiled, False
        self._calls = 0
        self._logging = [module for module in model.modules() if logging_class(type(module)) is not None]
        self._snapshot: Snapshot | None = None
        self.changes = Changes()

    def drew(self) -> bool:
        """Return True if the call that is under way drew random numbers."""
        return self._snapshot is not None and self._snapshot.restore_generators()

    def begin(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Begin a call with these arguments: save all that it can reach.

        What `parametrize.cached()` keeps is of weights before a step, or with a graph of another call.
        """
        self._snapshot = snapshot = Snapshot(self._target, args, kwargs, self._is_sharded)
        parametrize._cache.clear()
        self._calls += 1
        # To sum is to read every weight: in calls 1, 2, 4, 8, ...; a GPU's in the first.
        snapshot.watch_parameters(sums=self._calls & (self._calls - 1) == 0, may_wait=self._calls == 1)
        hush(self.changes, self._logging)
        without_nested_tensors(self.changes, self._encoders)
        eagerly(self.changes, self._compiled)

    def run(self) -> Any:
        """Run the target's forward; with its hooks only if they gather its weights."""
        assert self._snapshot is not None
        run = self._target if self._calls_hooks else self._target.forward
        self.is_plain = self._goes_around
        try:
            return self._snapshot.call(run)
        finally:
            self.is_plain = False

    def end_call(self) -> None:
        """Put back what no gradient reads.

        Raises:
            ValueError: if the forward edited a parameter; it is named.
        """
        assert self._snapshot is not None
        self._snapshot.end_call()
        self._snapshot.check_parameters()

    def end(self, has_graphs: bool = False) -> None:
        """End the call that is under way, if any: put back what it changed. It can be called again.

        That comes after the gradients, which read tensors as the call left them: autograd keeps no copies.

        Args:
            has_graphs: True if gradients may still follow. Those that would read what is put back raise.
        """
        self.changes.close()
        if self._snapshot is not None:
            changed = self._snapshot.restore(has_graphs)
            parametrize._cache.clear()
            self._replay.forget(changed, self._snapshot.drew)
        self._snapshot = None

    def drop(self) -> None:
        """Let go of a call that was broken off: what came after it is not to be lost."""
        self.changes.close()
        self._snapshot = None


def comes_from_forward(error: BaseException) -> bool:
    """Return True if an error comes from the target's forward in one of these calls, and is no refusal of ours.

    A plain call of the forward most likely raises it too.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if not any(frame.f_code is TracelessCalls.run.__code__ for frame in frames):
        return False
    is_ours = str(frames[-1].f_globals.get("__name__")).startswith(_OURS)
    return not (is_ours and isinstance(error, ValueError))
