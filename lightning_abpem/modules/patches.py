"""Changes to a model that are put back: each is noted before it is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_abpem.modules.names import named_module
from lightning_abpem.modules.stand_ins import MISSING, StandIn, Uncopied, put_back, state_without

__all__ = [
    "Changes",
    "adapt_once",
    "check_eval",
    "check_shapes",
    "encoders_around",
    "watch_outputs",
    "without_nested_tensors",
]


class Changes(Uncopied):
    """A list of undoings, the last one first.

    Each is noted before its change is made, and does no harm if it is made twice. So an interrupt at any point loses
    nothing: `close` can be called again until it is done. It is called at the latest when nobody holds the list any
    more, for an interrupt may come ahead of the first instruction of `close`.
    """

    def __init__(self) -> None:
        self._undoings: list[Callable[[], None]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._undoings)

    def note(self, undo: Callable[[], None]) -> None:
        """Have `undo` called by `close`."""
        self._undoings.append(undo)

    def set(self, owner: object, attribute: str, value: object) -> None:
        """Stand `value` in for an instance's attribute; what others put there meanwhile stays."""
        self.note(partial(put_back, owner.__dict__, attribute, value, owner.__dict__.get(attribute, MISSING)))
        owner.__dict__[attribute] = value

    def wrap(self, owner: object, attribute: str, wrapper: Callable[..., object], *first: object) -> None:
        """Have calls of an instance's attribute go to `wrapper(*first, original, ...)`."""
        stand_in = StandIn(owner, attribute, wrapper, *first)
        self.note(stand_in.put_back)
        stand_in.place()

    def wrap_call(self, module: nn.Module, attribute: str, wrapper: Callable[..., object], *first: object) -> None:
        """Wrap the attribute by which a module is called; its copies have none of that."""
        if hasattr(module, "__getstate__"):  # before Python 3.11 not every object has one
            self.wrap(module, "__getstate__", state_without, module)
        self.wrap(module, attribute, wrapper, *first)

    def hook(self, module: nn.Module, register: str, function: Callable[..., object], **options: object) -> None:
        """Register a hook by the module's method of that name, such as `register_forward_hook`."""
        self.note(partial(_unhook, module, function))
        getattr(module, register)(function, **options)

    def enter(self, block: AbstractContextManager[object]) -> None:
        """Enter a context manager, to be left by `close`."""
        entered: list[AbstractContextManager[Any]] = []

        def leave() -> None:
            if entered:
                entered.pop().__exit__(None, None, None)

        self.note(leave)
        block.__enter__()
        entered.append(block)

    def close(self) -> None:
        """Undo every change, also if an undoing fails; the first failure is raised at the end."""
        failure: BaseException | None = None
        while self._undoings:
            try:
                self._undoings[-1]()
            except Exception as error:
                failure = failure or error
            except BaseException as interrupt:
                failure = interrupt
                continue  # make it once more
            self._undoings.pop()
        if failure is not None:
            raise failure


def _unhook(module: nn.Module, function: Callable[..., object]) -> None:
    tables: Any = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_always_called),
    )
    for hooks, flags in tables:
        for key in [key for key, own in hooks.items() if own is function]:
            hooks.pop(key, None)
        for key in flags.keys() - hooks.keys():  # also of a hook that a snapshot took away
            flags.pop(key, None)


def check_eval(model: nn.Module) -> None:
    """Raise unless every module is in eval mode: dropout would make scores and predictions random.

    A Trainer sees to that; what trains in its run does so on purpose.

    Raises:
        ValueError: if a part of the model is in training mode.
    """
    if training := [name or "itself" for name, module in model.named_modules() if module.training]:
        raise ValueError(
            f"Expected a model in eval mode, but {len(training)} of its modules are in training mode: "
            f"{', '.join(training[:3])}{', ...' if training[3:] else ''}. Call model.eval() first."
        )


def check_shapes(model: nn.Module) -> None:
    """Raise unless every weight has a shape.

    Raises:
        ValueError: naming one that has none yet.
    """
    if lazy := [name for name, x in chain(model.named_parameters(), model.named_buffers()) if is_lazy(x)]:
        raise ValueError(f"Expected weights with a shape, but '{lazy[0]}' has none. Run the model on one batch first.")


_ADAPTING: set[int] = set()  # ids of the parameters of the models that somebody adapts


def adapt_once(changes: Changes, model: nn.Module) -> None:
    """Let nobody else adapt a parameter of `model`.

    Raises:
        ValueError: if somebody does already.
    """
    own = [id(p) for p in model.parameters()]
    if not _ADAPTING.isdisjoint(own):
        raise ValueError(
            f"Parameters of this {type(model).__name__} are being adapted already: close the first Adaptation first."
        )
    changes.note(partial(_ADAPTING.difference_update, own))
    _ADAPTING.update(own)


def watch_outputs(changes: Changes, model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Return a dict that will hold the last output of each of the named modules."""
    outputs: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(name, output)

    for name in names:
        changes.hook(named_module(model, name, "watches"), "register_forward_hook", watch(name))
    return outputs


def encoders_around(model: nn.Module, watched: Collection[nn.Module]) -> list[nn.TransformerEncoder]:
    """Return the nn.TransformerEncoders of the model that hold a watched module."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [encoder for encoder in encoders if not set(watched).isdisjoint(encoder.modules())]


def without_nested_tensors(changes: Changes, encoders: Collection[nn.TransformerEncoder]) -> None:
    """Keep encoders from packing padded batches into nested tensors, which only their fast path can read."""
    for encoder in encoders:
        changes.set(encoder, "use_nested_tensor", False)
