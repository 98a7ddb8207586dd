"""The interface of a test-time adaptation method: which parameters move, and the gradient that moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.attention.projections import collect_params
from lightning_abpem.attention.statistics import Comparison, Pair
from lightning_abpem.engine.ranks import Ranks
from lightning_abpem.engine.shards import is_sharded, sharded_gradients
from lightning_abpem.functional import entropy, widen

__all__ = [
    "Edit",
    "Gradients",
    "Method",
    "Predicts",
    "Record",
    "Rerun",
    "Step",
    "check_record",
    "collected",
    "record_of",
]

Gradients = Sequence[Tensor | None]
Record = dict[str, Tensor]
Predicts = Literal["after", "before"]


@dataclass(frozen=True)
class Step:
    """One forward, as a method sees it.

    Args:
        logits: (B, C), with gradients; those of remembered samples first.
        samples: how many of them, the last ones, are of the current batch.
        attention: by (query, key) modality, the statistics of the cross and self blocks of every fusion layer; empty
            for methods that do not ask for them.
        outputs: by name, what the modules put out that the method `watches`.
        params: the parameters that move, by name.
        state: the method's own memory of earlier batches; empty at first and after a reset.
        source: what it measured on the source model.
        is_first: True for the first step that is computed for its batch.
        scale: factor of the losses while their gradients are taken; None for 1.
        ranks: the processes that share the batch; None for one.
        is_local: True if any of the samples are of this process.
    """

    logits: Tensor
    samples: int
    attention: Mapping[Pair, Sequence[Comparison]]
    outputs: Mapping[str, Any]
    params: Mapping[str, nn.Parameter]
    state: dict[str, Any]
    source: Mapping[str, Any]
    is_first: bool = True
    scale: Tensor | None = None
    ranks: Ranks | None = None
    is_local: bool = True

    def gradients(self, loss: Tensor) -> Gradients:
        """Return the gradients of a loss for `params`, over the samples of all processes.

        Raises:
            ValueError: if none reaches them.
        """
        return self.gradients_of(loss)[0]

    def gradients_of(self, *losses: Tensor) -> Sequence[Gradients]:
        """Return the gradients of several losses, summed over processes at once.

        Raises:
            ValueError: if none of one of the losses reaches `params`.
        """
        params = list(self.params.values())
        own: list[list[Tensor | None]] = [[] for _ in losses]
        if self.is_local or any(loss.requires_grad for loss in losses):
            own = self._own_gradients(losses, params)
        return own if self.ranks is None else self.ranks.sum(own, params)

    def in_all(self, term: Tensor) -> Tensor:
        """Return a term of the loss that depends on `params` alone so that the sum over processes has it once."""
        return term if self.ranks is None else term.detach() + (term - term.detach()) / self.ranks.size

    def _own_gradients(self, losses: Sequence[Tensor], params: list[nn.Parameter]) -> list[list[Tensor | None]]:
        if not params:
            raise ValueError("Expected `collect` to give the parameters that move, for there is a loss, but got none.")
        if not all(loss.requires_grad for loss in losses):
            raise ValueError(self._no_gradient())
        scaled = losses if self.scale is None else [loss * self.scale.to(loss.device) for loss in losses]
        if any(map(is_sharded, params)):
            gradients = sharded_gradients(scaled, params)
        else:
            last = len(scaled) - 1
            gradients = [
                list(torch.autograd.grad(loss, params, retain_graph=i < last, allow_unused=True))
                for i, loss in enumerate(scaled)
            ]
        if not all(any(gradient is not None for gradient in own) for own in gradients):
            raise ValueError(self._no_gradient())
        if self.scale is None:
            return gradients
        return [[None if g is None else widen(g) / self.scale.to(g.device) for g in own] for own in gradients]

    def _no_gradient(self) -> str:
        """Return the error's text: what was seen, and the causes that fit, each with its test."""
        seen = "a part of the loss does" if self.logits.requires_grad else "the logits do"
        return (
            f"Expected gradients through the target's forward, but no gradient reaches {', '.join(self.params)}: "
            f"{seen} not depend on them, by autograd. Causes that fit, each with its test: (1) the forward, or a part "
            "of it, is under torch.no_grad() or inference_mode(): torch.is_grad_enabled() is False in it; (2) it cuts "
            "the graph, as `detach`, `.data`, `item` and NumPy do: a module in it has an input with requires_grad=True "
            "and an output with False; (3) it does not use these parameters: forward hooks on their modules are not "
            "called."
        )


Edit = Callable[[Sequence[Any], Mapping[str, Any]], tuple[Sequence[Any], Mapping[str, Any]]]
"""Function from the target's arguments and keyword arguments to others of the same batch."""


class Rerun(Protocol):
    """Run another forward over the batch: with the target's own arguments, or with what `edit` makes of them."""

    def __call__(self, edit: Edit | None = None) -> Step: ...


class Method:
    """A test-time adaptation method. A subclass says what its paper says; the engine does the rest.

    Most need `collect`, which parameters move, and `loss`. One that needs several forwards per step, as sharpness-aware
    minimisation does, has its own `gradients`. It keeps no state of its own: `Step.state` is there for that.

    Attributes:
        name: as its paper writes it; figures are logged under its lower case.
        needs_attention: True if `Step.attention` is wanted, and so modalities.
        reads_params: True if it looks at the values of `Step.params`, or sets them, which shards do not allow.
        predicts: "after" the update, or "before" it.
        balances_batch: True if its loss compares the samples of a batch, and so wants several.
        watches: names of modules whose outputs are wanted, and so `Step.outputs`.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    reads_params: ClassVar[bool] = False
    predicts: ClassVar[Predicts] = "after"
    watches: Sequence[str] = ()

    @property
    def balances_batch(self) -> bool:
        return False

    @property
    def moves_scores(self) -> bool:
        """True if the loss has a gradient through the scores of the fusion attention."""
        return False

    def collect(self, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
        """The parameters that move, by name: here those of the fusion attention's q, k and v projections.

        Raises:
            ValueError: if there are none.
        """
        if fusion is None:
            raise ValueError(f"Expected `fusion` to name the attention that {self.name} adapts, but got None.")
        return collect_params(fusion.adapting)

    def prepared(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the model adapts, and which puts back what it changes: here it changes nothing."""
        return nullcontext()

    def measure_source(self, observe: Callable[[Sequence[Any]], Step]) -> Mapping[str, Any]:
        """Measure the source model before the first batch: here nothing. `observe` takes the target's arguments."""
        return {}

    def loss(self, step: Step) -> tuple[Tensor | None, Record]:
        """Return the loss, None if no sample is fit for a step, and what to record.

        The record holds detached scalars, in nats; `loss` is among them.
        """
        raise NotImplementedError

    def gradients(self, step: Step, rerun: Rerun) -> tuple[Gradients | None, Record]:
        """Return the gradients of one step, None for no step, and what to record; `rerun` runs another forward."""
        made = self.loss(step)
        check_record(self, made)
        loss, record = made
        return None if loss is None else step.gradients(loss), record

    def wants_reset(self, state: Mapping[str, Any]) -> bool:
        """Return True if the source model should return before the next batch, for the method sees a collapse."""
        return False


def collected(method: Method, model: nn.Module, fusion: JointFusion | SeparateFusion | None) -> dict[str, nn.Parameter]:
    """Return the parameters that a method collects, by name.

    Raises:
        ValueError: if that is no mapping from names to parameters, or one of them cannot move, for it holds no floating
            point numbers or is on the meta device; whatever `collect` raises.
    """
    params = method.collect(model, fusion)
    if not isinstance(params, Mapping) or not all(isinstance(p, nn.Parameter) for p in params.values()):
        raise ValueError(
            f"Expected `collect` of {method.name} to give parameters by their names, but got a {type(params).__name__}."
        )
    for name, p in params.items():
        _check_movable(name, p)
    return dict(params)


def _check_movable(name: str, p: nn.Parameter) -> None:
    if p.is_meta:
        raise ValueError(
            f"Expected '{name}' to adapt, but it is on the meta device: it was never loaded, or its values are kept "
            "elsewhere, as accelerate's offloading does. Keep the module that holds it on a device, for instance by "
            "its entry in device_map."
        )
    if not p.is_floating_point():
        raise ValueError(
            f"Expected '{name}' to adapt, but it holds {p.dtype}, which has no gradients. Load the module that holds "
            "it without quantisation (in Hugging Face transformers llm_int8_skip_modules), or name floating point "
            "parameters, such as those of an adapter beside it, by `projections`."
        )


def check_record(method: Method, made: object) -> None:
    """Hold what a method's `loss` or `gradients` gave against what it should be.

    Raises:
        ValueError: if it is no pair whose second part holds tensors by name, `loss` among them.
    """
    record = made[1] if isinstance(made, tuple) and len(made) == 2 else None
    if not isinstance(record, dict) or not all(isinstance(value, Tensor) for value in record.values()):
        raise ValueError(
            f"Expected {method.name} to give a pair, of which the second is a dict of tensors to record, but got "
            f"{type(made).__name__ if record is None else record}."
        )
    if "loss" not in record:
        raise ValueError(f"Expected {method.name} to record its `loss`, but got {sorted(record)}.")


def record_of(loss: Tensor, logits: Tensor, **figures: Tensor) -> Record:
    """Return what every method records: its loss, the mean entropy of the predictions, and figures of its own."""
    with torch.no_grad():
        return {"loss": loss.detach(), "entropy": entropy(logits).mean(), **{k: v.detach() for k, v in figures.items()}}
