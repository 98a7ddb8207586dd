"""The state of a stream, with which it goes on elsewhere as if it had not been cut: plain values, checked.

A state holds tensors of the host, numbers, strings, lists and dicts, so that `torch.load(weights_only=True)`, and with
it Lightning's checkpoints, can read it. Nobody has to trust it: all of it is checked before anything changes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = [
    "FORMAT",
    "SAVED",
    "check_copies",
    "check_form",
    "check_named",
    "check_weights",
    "digest",
    "random_state",
    "set_random_state",
    "to_cpu",
    "to_device",
]

FORMAT = 8
SAVED = (bool, int, float, complex, str, bytes, type(None))  # what a state holds as it is, besides tensors


def to_device(value: object, device: torch.device) -> Any:
    """Return a copy with its tensors on a device, without classes of this package's own."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: to_device(own, device) for key, own in value.items()}
    return [to_device(own, device) for own in value] if isinstance(value, list | tuple) else value


def to_cpu(value: object) -> Any:
    """Return the same on the host."""
    return to_device(value, torch.device("cpu"))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the tensors' bits, the same on any device."""
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of torch's random numbers, on the host and on the device."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go back to a `random_state`, as far as there are such devices."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ------------------------------------------------------------------------------------------------ is it such a state?


def check_form(state: object, method: str) -> None:
    """Hold a state against what `state_dict` makes, as far as can be told without the model.

    Raises:
        ValueError: if it is no such thing, of another version's form or of another method; if a part is missing, is not
            what it should be, or holds NaN or infinity.
    """
    if not isinstance(state, Mapping) or not {"format", "weights", "method"} <= state.keys():
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"Expected the state of an adaptation, as `state_dict` makes it, but got {keys}.")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(
            f"Expected an adaptation's state of form {FORMAT}, but got {state['format']!r}: another version of "
            "lightning_abpem wrote it."
        )
    if state["method"] != method:
        raise ValueError(f"Expected a state of {method}, but got one of {state['method']}.")
    _check_values(state, "")
    for name, (fits, wanted) in _PARTS.items():
        part: Any = state
        for key in name.split("."):
            if not isinstance(part, Mapping) or key not in part:
                raise ValueError(f"Expected a whole state, but it has no `{name}`.")
            part = part[key]
        if not fits(part):
            raise ValueError(f"Expected `{name}` of a state to be {wanted}, but got {_shown(part)}.")


def _check_values(value: object, name: str) -> None:
    """Raise unless everything is plain and finite, and no tensor claims more values than it stores."""
    if isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, own in pairs:
            if type(key) not in (str, int):
                raise ValueError(f"Expected the keys of a state's `{name}` to be strings or integers, but got {key!r}.")
            _check_values(own, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        if not is_plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"Expected `{name}` of a state to store its values, one each, but got {_shown(value)}.")
        # A mask that enters the fusion block, to be added to scores, may hold -inf.
        finite = value.isfinite() | (value == -math.inf) if name.startswith("memory.") else value.isfinite()
        if not bool(finite.all()):
            raise ValueError(f"Expected `{name}` of a state to be finite, but {int((~finite).sum())} values are not.")
    elif type(value) not in (bool, int, float, str, type(None)):
        raise ValueError(
            f"Expected `{name}` of a state to be a tensor, number, string, list or dict, but got a "
            f"{type(value).__name__}."
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Expected `{name}` of a state to be finite, but got {value}.")


def _shown(value: object) -> str:
    """Return a value as an error shows it: of tensors the type and the shape."""
    shown = repr(tree_map_only(Tensor, lambda x: _form(x) if x.dim() or x.is_meta else x.item(), value))
    return shown if len(shown) < 200 else f"{shown[:200]}..."


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _is_count(x: object) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _are_counts(x: object, number: int) -> bool:
    return isinstance(x, list | tuple) and len(x) == number and all(map(_is_count, x))


def _is_scalar(x: object, least: int, floating: bool) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point() == floating and bool(x >= least)


def _is_named(x: object, kind: type = object) -> bool:
    return isinstance(x, Mapping) and all(type(key) is str and isinstance(own, kind) for key, own in x.items())


def _is_random(x: Any) -> bool:
    """Return True if generators of their own can be set to these states."""
    try:
        for device, state in x.items():
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return "cpu" in x


def _is_memory(x: object) -> bool:
    return isinstance(x, list | tuple) and all(map(_is_batch, x))


def _is_batch(x: object) -> bool:
    """Return True for a remembered batch: tensors with as many rows as samples, masks for all of them or for each."""
    if not isinstance(x, Mapping) or not {"places", "tensors", "masks", "others"} <= x.keys():
        return False
    places, tensors, masks = x["places"], x["tensors"], x["masks"]
    if not isinstance(places, list | tuple) or not all(map(_is_count, places)) or not _is_named(masks, Tensor):
        return False
    if not isinstance(x["others"], list) or not all(map(_is_other, x["others"])):
        return False
    if not isinstance(tensors, Mapping) or bool(places) != bool(tensors) or not tensors.keys() <= set(places):
        return False
    if not all(isinstance(own, Tensor) and own.dim() for own in tensors.values()):
        return False
    rows = {own.shape[0] for own in tensors.values()}
    of_masks = all(own.dtype == torch.bool and own.dim() == 2 and own.shape[0] in {1, *rows} for own in masks.values())
    return len(rows) < 2 and of_masks


def _is_other(x: object) -> bool:
    """Return True for an argument that is no tensor: its value, or nothing if that cannot be saved, in a list."""
    return isinstance(x, list) and len(x) <= 1 and all(isinstance(own, SAVED) for own in x)


def _are_sums(x: Any) -> bool:
    if x is None:
        return True
    is_row = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 1 and x.numel() >= 5 and x.numel() % 2
    return bool(is_row and x[0] > 0 and (x[3:] >= 0).all())


def _are_tensors(x: object) -> bool:
    return isinstance(x, list) and all(isinstance(own, Tensor) for own in x)


def _are_flags(x: object, number: int) -> bool:
    return isinstance(x, list) and len(x) == number and all(isinstance(own, bool) for own in x)


def _is_event(x: object) -> bool:
    kinds = {"batch": int, "update": int, "action": str, "cause": str}
    return isinstance(x, Mapping) and x.keys() == kinds.keys() and all(type(x[key]) is kinds[key] for key in kinds)


def _are_rates(x: object) -> bool:
    """Return True for what several learning rates have besides the course that predicts."""
    if not isinstance(x, Mapping) or not {"leader", "sums", "others"} <= x.keys() or not isinstance(x["others"], list):
        return False
    sums, courses = x["sums"], len(x["others"]) + 1
    if not (type(x["leader"]) is int and 0 <= x["leader"] < courses) or not all(map(_is_course, x["others"])):
        return False
    is_table = isinstance(sums, Tensor) and sums.is_floating_point() and sums.dim() == 2 and sums.shape[1] > 3
    return sums is None or (is_table and len(sums) == courses + 1 and bool(sums[0, 0] > 0))


def _is_course(x: object) -> bool:
    parts = [name for name in _PARTS if name.partition(".")[0] in ("weights", "scale", "state")]
    return all(_PARTS[name][0](_part(x, name)) for name in parts)


def _part(x: object, name: str) -> Any:
    """Return a part of a state by its name with dots; None if there is none."""
    for key in name.split("."):
        x = x.get(key) if isinstance(x, Mapping) else None
    return x


_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "process": (lambda x: _are_counts(x, 2) and x[0] < x[1], "the number of a process and how many there are"),
    "weights.params": (lambda x: _is_named(x, Tensor), "tensors by name"),
    "weights.source": (lambda x: isinstance(x, str), "a digest"),
    "weights.optimizer": (_is_named, "an optimizer's state"),
    "weights.optimizer_class": (lambda x: isinstance(x, str), "a class's name"),
    "weights.counts": (
        lambda x: _are_counts(x, 2) and x[1] <= x[0],
        "the updates, and those since a reset",
    ),
    "weights.skipped_for": (lambda x: _is_named(x) and all(map(_is_count, x.values())), "counts of steps by reason"),
    "weights.rate": (lambda x: type(x) is float and 0 < x <= 1, "the share of the learning rate that goes on"),
    "scale.value": (lambda x: _is_scalar(x, 1, floating=True), "a scalar tensor of at least 1"),
    "scale.streak": (lambda x: _is_scalar(x, 0, floating=False), "a scalar tensor that counts steps"),
    "state": (_is_named, "what the method remembers, by name"),
    "measured": (lambda x: x is None or _is_named(x), "what the method measured on the source, by name"),
    "resets_next": (lambda x: isinstance(x, bool), "a bool"),
    "samples": (_is_count, "the samples since a reset"),
    "left_out": (_is_count, "the samples that were left out of steps"),
    "proven": (lambda x: _are_flags(x, 2), "whether a batch has adapted, and one with stored samples"),
    "monitored": (_is_count, "the batches since the start, of which every n-th is compared with the source"),
    "watch": (_are_sums, "the running sums of both models' predictions"),
    "guard.good": (lambda x: isinstance(x, list) and all(map(_are_tensors, x)), "copies of weights, lists of tensors"),
    "guard.events": (lambda x: isinstance(x, list) and all(map(_is_event, x)), "what the guard did"),
    "guard.counts": (lambda x: _are_counts(x, 2), "batches judged, and those since the last copy of weights"),
    "guard.flags": (lambda x: _are_flags(x, 3), "whether it is frozen, has warned, and has judged the last batch"),
    "rates": (_are_rates, "the courses of the learning rates that do not predict, and the place of the one that does"),
    "memory": (
        _is_memory,
        "a list of batches, each with `places`, `tensors` of as many rows, their `masks` and `others`",
    ),
    "random": (_is_random, "states of torch's random number generators"),
}


# ------------------------------------------------------------------------------------------------ does the model fit?


def check_weights(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], optimizer: Callable[[list[nn.Parameter]], Any]
) -> None:
    """Hold the weights of a state against those of the model that is to go on with it.

    Args:
        theirs: the weights of a state that `check_form` let pass.
        ours: the same of this model.
        optimizer: makes one, from parameters.

    Raises:
        ValueError: if they are of another model, of another fusion pattern, of another source or optimizer.
    """
    forms, own_forms = ({name: _form(x) for name, x in w["params"].items()} for w in (theirs, ours))
    if forms != own_forms:
        differ = [name for name in {**forms, **own_forms} if forms.get(name) != own_forms.get(name)][:3]
        listed = ", ".join(f"{n} {forms.get(n, 'missing')} instead of {own_forms.get(n, 'nothing')}" for n in differ)
        raise ValueError(
            f"Expected a state of this model and these patterns, but what adapts is not the same: {listed}."
        )
    if theirs["source"] != ours["source"]:
        raise ValueError(
            "Expected a state that began with this model's weights, but it began with others. Load the source model's "
            "checkpoint, not one that was written while the model was adapted."
        )
    if theirs["optimizer_class"] != ours["optimizer_class"]:
        raise ValueError(f"Expected a state of {ours['optimizer_class']}, but got one of {theirs['optimizer_class']}.")
    if ours["params"]:
        _check_optimizer(theirs["optimizer"], list(ours["params"].values()), optimizer)


def _check_optimizer(theirs: Mapping[str, Any], params: Sequence[Tensor], make: Callable[..., Any]) -> None:
    """Hold an optimizer's state against that of one with its options after a step: kernels trust the moments' sizes."""
    try:
        wanted = _after_a_step(theirs["param_groups"], params, make)
        groups, own_groups = ([list(group["params"]) for group in own["param_groups"]] for own in (theirs, wanted))
        is_same = groups == own_groups and theirs["state"].keys() <= wanted["state"].keys()
        moments = {(i, name): x for i, own in theirs["state"].items() for name, x in own.items()}
    except Exception as error:  # of whatever kind a stranger's optimizer has for options that it does not know
        raise ValueError(f"The state's optimizer does not fit this one: {type(error).__name__}: {error}") from error
    if not is_same:
        raise ValueError("The state's optimizer does not fit this one: its parameters are others.")
    for i in theirs["state"]:
        for name, x in wanted["state"][i].items():
            own: Any = moments.get((i, name))
            alike = (
                type(own) is type(x)
                if not isinstance(x, Tensor)
                else isinstance(own, Tensor) and (own.shape == x.shape and (own.dtype == x.dtype or x.dim() == 0))
            )
            if not alike or (name == "step" and not bool(own >= 0)):
                raise ValueError(
                    f"The state's optimizer does not fit this one: expected its `{name}` of parameter {i} to be like "
                    f"{_shown(x)}, but got {_shown(own)}."
                )


def _after_a_step(groups: Any, params: Sequence[Tensor], make: Callable[..., Any]) -> dict[str, Any]:
    """Return the state of an optimizer with these options after a step of zero, on parameters of its own."""
    devices = {x.device for x in params if x.is_cuda}
    with torch.random.fork_rng(list(devices)), torch.enable_grad():
        twins = [nn.Parameter(torch.zeros_like(x)) for x in params]
        optimizer = make(twins)
        optimizer.load_state_dict({"state": {}, "param_groups": to_cpu(groups)})
        for twin in twins:
            twin.grad = torch.zeros_like(twin)
        optimizer.step()
    return optimizer.state_dict()


def check_copies(copies: Iterable[Sequence[Tensor]], params: Mapping[str, Tensor]) -> None:
    """Hold copies of the weights against the weights of the same state, which fit the model.

    Raises:
        ValueError: if a copy has other tensors.
    """
    wanted = [_form(x) for x in params.values()]
    for copy in copies:
        if (forms := [_form(x) for x in copy]) != wanted:
            raise ValueError(f"Expected the guard's copies of weights to be {_shown(wanted)}, but got {_shown(forms)}.")


def check_named(kept: object, params: Mapping[str, Tensor]) -> None:
    """Hold what a method keeps under the names of parameters against their shapes; it may be a scalar.

    Raises:
        ValueError: if a tensor has another shape.
    """
    if isinstance(kept, list | tuple):
        kept = dict(enumerate(kept))
    for name, own in kept.items() if isinstance(kept, Mapping) else ():
        check_named(own, params)
        if name in params and isinstance(own, Tensor) and own.dim() and own.shape != params[name].shape:
            raise ValueError(
                f"Expected what the method keeps for '{name}' to have its shape, {tuple(params[name].shape)}, but got "
                f"{_form(own)}."
            )
