"""Finding a model's fusion attention: every attention call of one forward, and an `ABPEM(...)` line that runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_abpem.attention.origins import TracedCall, short_names
from lightning_abpem.attention.projections import find_attention
from lightning_abpem.attention.trace import tracing
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.display import inspection_table, plain_text
from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.methods.abpem import ABPEM
from lightning_abpem.suggestion import suggest

__all__ = ["Attempt", "Inspected", "Inspection", "copy_to_try", "inspect", "inspecting"]

Model = TypeVar("Model", bound=nn.Module)
Attempt = Callable[[TestTimeAdaptation], None]
"""Runs the inspected forward with this callback, and raises what it raises."""


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect`; prints as a table and the line to paste.

    Args:
        calls: every attention call, in the order in which their modules ended.
        names: a short name for every module that tokens come from.
        values: by module, how many values its q, k and v projections hold, which would adapt; 0 if none were found.
        line: an `ABPEM(...)` expression with which the same forward adapted; None if there is none.
        notes: what to know about it, or why there is none.
    """

    calls: list[TracedCall]
    names: Mapping[str, str]
    values: Mapping[str, int]
    line: str | None
    notes: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, one for each call."""
        return [
            {
                "name": call.name + (f"[{call.call_index}]" if call.call_index else ""),
                "kind": call.kind,
                "queries": call.queries,
                "keys": call.keys,
                "heads": call.heads,
                "tokens": self._tokens(call),
                "fusion": call.shape != "self",
                "values": self.values[call.name],
            }
            for call in self.calls
        ]

    def _tokens(self, call: TracedCall) -> str:
        if call.shape == "joint":
            parts = [(self.names.get(s.source or ""), s.tokens) for s in call.query_segments if s.tokens > 1]
            return " + ".join(f"{name or '?'}\N{NO-BREAK SPACE}{tokens}" for name, tokens in parts)
        sides = [call.sources, [s.source for s in call.key_segments if s.source is not None]]
        named = [", ".join(dict.fromkeys(self.names[source] for source in side)) or "?" for side in sides]
        return " → ".join(named) if call.shape == "cross" else named[0]

    def __rich__(self) -> Any:
        return inspection_table(self.rows(), self.line, self.notes)

    def __str__(self) -> str:
        return plain_text(self.__rich__())

    __repr__ = __str__


def inspect(model: nn.Module, /, *inputs: object, **kwargs: object) -> Inspection:
    """Run `model(*inputs, **kwargs)` once, in eval mode, without gradients, and show its attention.

    The line that fits is tried before it is shown. A copy of the model adapts to the same inputs or, where it cannot be
    copied, the model observes them with ``steps=0``. The model is left as it was. Where the batch is only known to a
    LightningModule's step, ``abpem inspect`` runs that.

    Example:
        ``inspect(model, audio, video)``, in a notebook.
    """
    untouched = tree_map_only(torch.Tensor, torch.clone, (inputs, kwargs))
    with torch.no_grad(), inspecting(model) as result:
        model(*inputs, **kwargs)
    return result.inspection(lambda callback: _adapt_once(model, callback, *untouched))


def copy_to_try(model: Model, callback: TestTimeAdaptation) -> Model:
    """Copy the model, for a callback to be tried on; if it cannot be copied the callback is set to observe it."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever a module of the user's raises, or no memory for a second one
        callback.settings = replace(callback.settings, steps=0)
        return model


def _adapt_once(
    model: nn.Module, callback: TestTimeAdaptation, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Let the model, or a copy, adapt to the inputs; nothing is drawn from the caller's random numbers."""
    on_cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(on_cuda)), torch.no_grad(), inspecting(model):
        tried = copy_to_try(model, callback)
        with Adaptation(tried, replace(callback.settings, sync="local")) as adaptation:
            tried(*args, **kwargs)
    if adaptation.calls == 0:
        raise ValueError("the target is not called")


class Inspected:
    """The calls of what ran inside `inspecting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[TracedCall] = []
        self.outputs: dict[str, Any] = {}  # of the modules that were called by no other; "" is the model itself

    def inspection(self, attempt: Attempt) -> Inspection:
        """Gather all that is known of them, with a line that was tried."""
        sources = dict.fromkeys(s.source for c in self.calls for s in (*c.query_segments, *c.key_segments) if s.source)
        values = {call.name: _count(self.model, call.name) for call in self.calls}
        names = short_names(list(sources))
        found = suggest(self.model, self.calls, self.outputs, names)
        line, notes = None, found.notes
        refusals = []
        for candidate in found.lines:
            try:
                attempt(eval(candidate, {"ABPEM": ABPEM}))
            except Exception as error:  # of the engine, of torch, or of the model
                refusals.append(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
            else:
                line = candidate
                break
        if line is None:
            notes = [*notes, *(f"No line to paste: {reason}" for reason in refusals[-1:])]
        return Inspection(self.calls, names, values, line, notes)


@contextmanager
def inspecting(model: nn.Module) -> Iterator[Inspected]:
    """Watch what runs inside the block, with the model in eval mode; gives a result with its `inspection()`."""
    training = {module: module.training for module in model.modules()}
    result = Inspected(model)

    def root(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        result.outputs[""] = output

    handle = model.register_forward_hook(root)
    try:
        model.eval()
        with tracing(model) as tracer:
            yield result
        result.calls = tracer.seen
        result.outputs = tracer.outermost | result.outputs
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode


def _count(model: nn.Module, name: str) -> int:
    try:
        return sum(p.numel() for p in find_attention(model.get_submodule(name), name).parameters.values())
    except (AttributeError, ValueError):
        return 0
