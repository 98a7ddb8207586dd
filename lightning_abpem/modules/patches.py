"""Changes to a model that are put back when a block ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_abpem.modules.names import named_module

__all__ = [
    "Uncopied",
    "adapted_once",
    "check_eval",
    "encoders_around",
    "normal_tensor",
    "only_trainable",
    "outputs_of",
    "substituted",
    "without_inference_tensors",
    "without_nested_tensors",
]


def check_eval(model: nn.Module) -> None:
    """Whether nothing of the model is as in training: dropout would make its scores and predictions random.

    Raises:
        ValueError: if a part of it is in training mode.
    """
    if training := [name or "itself" for name, module in model.named_modules() if module.training]:
        raise ValueError(
            f"Expected a model in eval mode, but {len(training)} of its modules are in training mode: "
            f"{', '.join(training[:3])}{', ...' if training[3:] else ''}. Call model.eval() first."
        )


def normal_tensor(x: Any) -> Any:
    """A tensor that autograd accepts as a constant: out of inference mode, without history. Others as they are."""
    if not isinstance(x, Tensor):
        return x
    return x.clone() if x.is_inference() else x.detach() if x.requires_grad else x


class Uncopied:
    """What is attached to a model while it adapts, and to no copy of it."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A model cannot be copied or pickled while it adapts: copy it before (a method does in `collect`), or take "
            "its state_dict()."
        )


_ADAPTING: set[int] = set()  # ids of the parameters of the models that somebody adapts


@contextmanager
def adapted_once(model: nn.Module) -> Iterator[None]:
    """While it lasts, nobody else may adapt a parameter of `model`.

    Raises:
        ValueError: if somebody does already.
    """
    own = [id(p) for p in model.parameters()]
    if not _ADAPTING.isdisjoint(own):
        raise ValueError(
            f"Parameters of this {type(model).__name__} are being adapted already: close the first Adaptation first."
        )
    _ADAPTING.update(own)
    try:
        yield
    finally:
        _ADAPTING.difference_update(own)


@contextmanager
def only_trainable(model: nn.Module, trainable: Collection[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach `trainable` alone; requires_grad and .grad of every parameter return afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def without_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Stand in normal copies for what an earlier run in inference mode left in the model.

    These are buffers, and tensors cached in modules' attributes or in lists and dicts there.
    """
    places: list[Any] = [m.__dict__ for m in model.modules()]
    places += [value for place in list(places) for value in place.values() if isinstance(value, (dict, list))]
    replaced: list[tuple[Any, Any, Tensor, Tensor, int]] = []
    try:
        for place in places:
            for name, value in _entries(place):
                if isinstance(value, Tensor) and value.is_inference():
                    copy = value.clone()
                    place[name] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
                    replaced.append((place, name, value, place[name], place[name]._version))
        yield
    finally:
        for place, name, value, stand_in, version in replaced:
            now = dict(_entries(place)).get(name)
            if now is stand_in and stand_in._version == version:  # else the run wrote something newer
                place[name] = value


def _entries(place: dict[str, Any] | list[Any]) -> list[tuple[Any, Any]]:
    return list(place.items() if isinstance(place, dict) else enumerate(place))


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the modules of those names put out while the block lasts: the last call's output, by name."""
    outputs: dict[str, Any] = {}

    def watch(name: str) -> RemovableHandle:
        return named_module(model, name, "watches").register_forward_hook(
            lambda module, args, output: outputs.__setitem__(name, output)
        )

    handles = [watch(name) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def encoders_around(model: nn.Module, watched: Collection[nn.Module]) -> list[nn.TransformerEncoder]:
    """The nn.TransformerEncoders of the model that hold a watched module."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [encoder for encoder in encoders if not set(watched).isdisjoint(encoder.modules())]


@contextmanager
def without_nested_tensors(encoders: Collection[nn.TransformerEncoder]) -> Iterator[None]:
    """Keep them from packing padded batches into nested tensors, which only their fast path can read."""
    before = [(encoder, encoder.use_nested_tensor) for encoder in encoders]
    try:
        for encoder, _ in before:
            encoder.use_nested_tensor = False
        yield
    finally:
        for encoder, packs in before:
            encoder.use_nested_tensor = packs


@contextmanager
def substituted(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Stand `value` in for an instance's attribute while the block lasts."""
    missing = object()
    before = owner.__dict__.get(attribute, missing)
    owner.__dict__[attribute] = value
    try:
        yield
    finally:
        if before is missing:
            owner.__dict__.pop(attribute, None)
        else:
            owner.__dict__[attribute] = before
