"""What the engine asks of a model's modules, and what it changes in them for a while."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Uncopied",
    "adapted_once",
    "check_eval",
    "encoders_around",
    "find_modules",
    "named_module",
    "normal_tensor",
    "only_trainable",
    "outputs_of",
    "plain_name",
    "substituted",
    "without_inference_tensors",
    "without_nested_tensors",
]


def find_modules(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules of `model` whose names match, in the model's order.

    In a pattern `*` stands for one part of a dotted name, or a piece of it, and `**` for any number of parts. The names
    are those without torch.compile's `_orig_mod`.

    Raises:
        ValueError: if a pattern matches nothing, with the names that come closest.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("Expected `fusion` to hold at least one name pattern, but got none.")
    modules = model.named_modules(remove_duplicate=False)
    named = {plain: module for name, module in modules if (plain := plain_name(name))}  # the inside of a compiled one
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in named if _regex(plain_name(pattern)).fullmatch(name)}
        if not found:
            raise ValueError(
                f"Expected `fusion` to match a module of {type(model).__name__}, but {pattern!r} matches none of its "
                f"{len(named)} modules. {_closest(list(named), pattern)}"
            )
        matched |= found
    unique: dict[int, str] = {}
    for name, module in named.items():
        if name in matched:
            unique.setdefault(id(module), name)
    return {name: named[name] for name in unique.values()}


def plain_name(name: str) -> str:
    """A dotted name without what torch.compile puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _regex(pattern: str) -> re.Pattern[str]:
    tokens = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = re.split(r"(\*\*\.|\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in parts))


def _closest(names: Sequence[str], pattern: str) -> str:
    last = pattern.rsplit(".", 1)[-1].strip("*?")
    alike = [name for name in names if last and last in name.rsplit(".", 1)[-1]]
    attention = [name for name in names if "attn" in name.rsplit(".", 1)[-1].lower() or "attention" in name.lower()]
    shown = (alike or attention or list(names))[:8]
    return (
        f"Names like it: {', '.join(shown)}; lightning_abpem.inspect lists every attention."
        if shown
        else "The model has no submodules."
    )


def named_module(model: nn.Module, name: str, option: str) -> nn.Module:
    """The module of that name, which the user gave for `option`.

    Raises:
        ValueError: if there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise ValueError(
            f"Expected `{option}` to name a module of {type(model).__name__}, but got {name!r}. "
            f"Its children: {children}."
        ) from None


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
