"""State that a forward can reach: saved before a pass of the engine, put back by value after it.

A pass works on the very same objects, so that identities, aliases and memory layouts are those of a plain call. Two
kinds of tensors have a stand-in during the pass, because autograd refuses them: those made in inference mode and those
with a history. So have iterators, which a pass would use up.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_abpem.modules.parameters import ParameterValues, SavedParameters
from lightning_abpem.modules.randomness import RandomState
from lightning_abpem.modules.refusals import ModelError
from lightning_abpem.modules.walk import Walk

__all__ = ["Snapshot", "reachable"]


class Snapshot(Walk):
    """The state that a call can reach, as it is now.

    Args:
        target: the module that is called.
        args: its arguments.
        kwargs: its keyword arguments.
        is_sharded: True if FSDP2 replaces the modules' parameters in their calls.
        torchs_generators_alone: leave out Python's and NumPy's, which take longer to read.

    Attributes:
        args: the arguments for a pass: the same objects, but for tensors that autograd refuses.
        kwargs: the keyword arguments, likewise.
        ids: of all objects that can be reached.
        tensors: that can be reached, parameters too, or what stands in for them in the pass.
        drew: True after `restore` if torch, Python or NumPy drew random numbers in between; of torch after `end_call`.

    Raises:
        ValueError: if an iterator that cannot be copied is among the state; it is named.
    """

    def __init__(
        self,
        target: nn.Module,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        is_sharded: bool = False,
        torchs_generators_alone: bool = False,
    ) -> None:
        super().__init__(target, is_sharded)
        self._held, self._values = SavedParameters([]), ParameterValues([])
        self._random, self._dtype = RandomState(target, torchs_generators_alone), torch.get_default_dtype()
        self._threads = torch.get_num_threads()
        self.drew = False
        try:
            self._find(target, None, "the target")
            self.args = tuple(self._find(x, None, f"argument {i}") for i, x in enumerate(args))
            self.kwargs = {name: self._find(x, None, f"argument '{name}'") for name, x in (kwargs or {}).items()}
            self._save_all()
            self._held = SavedParameters(self._parameters)
            self._own.update(zip(map(id, self._parameters), self._parameters, strict=True))
        except RecursionError:
            self.restore()
            name = self._name(id(self._alive[-1])).partition(", ")[0]
            raise ModelError(
                f"Expected state that can be saved, but {name} holds tuples in tuples, too deep for Python's recursion "
                "limit. Keep them in a list, or raise the limit by sys.setrecursionlimit."
            ) from None
        except BaseException:
            self.restore()
            raise

    @property
    def ids(self) -> set[int]:
        return set(self._own)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in self._own.values() if isinstance(x, Tensor)]

    def end_call(self) -> None:
        """Put back what no gradient reads: torch's generators, and what parameters have besides their values."""
        self._used |= self._held.restore()
        self.drew = self._random.restore_torchs() or self.drew

    def restore_generators(self) -> bool:
        """Put Python's and NumPy's generators back too; return True if any of them drew."""
        self.drew = self._random.restore() or self.drew
        return self.drew

    def restore(self, counts: bool = False) -> set[int]:
        """Put everything back by value; it can be called again.

        Args:
            counts: have torch count it as an edit of a tensor, so that gradients that would read it raise.

        Returns:
            the ids of the containers, objects and tensors that had changed.

        Raises:
            ValueError: if a tensor that cannot be put back was edited in place; it is named. All else is put back.
        """
        self._used |= self._held.restore()
        self.restore_generators()
        changed = self._restore_items()
        if changed:
            changed |= self._restore_items()  # what died with the pass may have edited them in its `__del__`
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
            changed.update(self._own)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
            changed.update(self._own)
        return changed | self._restore_tensors(counts) | self._used

    def _restore_tensors(self, counts: bool) -> set[int]:
        changed, failure = set(), None
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for saved in self._tensors:
                try:
                    if saved.restore(self._name, counts):
                        changed.add(saved.key)
                except ValueError as error:  # the others first
                    failure = failure or error
        if failure is not None:
            raise failure
        return changed

    def _restore_items(self) -> set[int]:
        return {id(saved.owner) for saved in self._saved if saved.restore()} | self._modules.restore()

    def call(self, function: Callable[..., Any]) -> Any:
        """Call with the arguments of a pass, in a copy of the context, so that context variables keep their values."""
        before = contextvars.copy_context()
        own = before.copy()
        try:
            return own.run(function, *self.args, **self.kwargs)
        finally:
            moved = len(own) != len(before) or any(own[variable] is not before[variable] for variable in before)
            if moved and not self._is_compiled:  # the compiler sets variables of its own
                self._used.update(self._own)  # any module may have set them

    def watch_parameters(self, sums: bool, may_wait: bool) -> None:
        """Let `check_parameters` see edits from now on; see `ParameterValues`."""
        self._values = ParameterValues(self._parameters, sums, may_wait)

    def check_parameters(self) -> None:
        """Hold the parameters against their values: a forward that edits them would do so in every pass.

        Raises:
            ValueError: naming a parameter that was edited in place.
        """
        edited = self._values.edited()
        if edited:
            names = {id(p): repr(name) for name, p in self._target.named_parameters()}
            name = names.get(id(edited[0])) or self._name(id(edited[0]))
            raise ModelError(
                f"Expected a forward that leaves its parameters alone, but it edited {name} in place: "
                f"{self._values.seen(edited[0])}. The adapting passes would edit it once more for every batch. "
                f"{self._way_out(edited[0])}, and load the parameter again, if this pass moved it."
            )

    def _way_out(self, edited: nn.Parameter) -> str:
        for module in self._target.modules():
            if getattr(module, "max_norm", None) is not None and getattr(module, "weight", None) is edited:
                return f"Set max_norm={module.max_norm} of that {type(module).__name__} to None"
        return "Cast it before you adapt, if its dtype changed, or keep such a value in a buffer"


def reachable(module: nn.Module) -> set[int]:
    """Return the ids of all objects that a module's forward can reach without arguments."""
    snapshot = Snapshot(module)
    snapshot.restore()
    return snapshot.ids
