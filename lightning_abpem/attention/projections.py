"""Finding the q, k and v projections of an attention module: what adapts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_abpem.modules.names import name_regex

__all__ = [
    "FusionAttention",
    "Projections",
    "collect_params",
    "find_attention",
    "find_projections",
    "has_projections",
    "is_projection",
    "projection_names",
    "watched_attention",
]

Projections = str | Sequence[str] | Callable[[nn.Module], Mapping[str, nn.Parameter]]
"""Name patterns inside the attention module, or a function from it to its parameters by name."""

_ROLES = {
    **dict.fromkeys(("q", "qs", "query", "queries"), "q"),
    **dict.fromkeys(("k", "ks", "key", "keys"), "k"),
    **dict.fromkeys(("v", "vs", "value", "values"), "v"),
    **{together: together for together in ("qk", "kv", "qkv")},
}
_FUSED_NAMES = ("in_proj", "att_proj", "c_attn")  # of q, k and v, whose names do not say so
_OTHER_WORDS = frozenset(  # that may stand beside the letters in a projection's name
    ("proj", "project", "projection", "lin", "linear", "layer", "head", "to", "w", "in", "attn", "self", "cross")
) | {"content", "a", "b", "with", "mqa"}  # beside a position's; of two factors; of keys that all heads share


@dataclass(frozen=True)
class FusionAttention:
    """An attention module and what adapts in it.

    Args:
        name: its name in the model.
        module: the module whose forward is watched.
        parameters: weights and biases of its q, k and v projections, by full name.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


def find_attention(module: nn.Module, name: str, projections: Projections | None = None) -> FusionAttention:
    """Find the one attention inside `module`, which is called `name` in the model.

    Args:
        module: the attention, or a module that holds one.
        name: its name in the model.
        projections: what adapts in it, where that is not found by its names; see `TestTimeAdaptation`.

    Raises:
        ValueError: if there is no attention in it, or more than one; both list what was found. Also if `projections`
            names nothing in it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"Expected '{name}' to be an attention module written in Python, but it is a TorchScript module, inside "
            "which nothing can be watched. Build the model from its code and load its weights."
        )
    if projections is not None:
        chosen = _chosen(module, name, projections)
        return FusionAttention(name, module, {f"{name}.{at}": p for at, p in chosen.items()})
    owners = _owners(module, name)
    if len(owners) == 1:
        path, owner = next(iter(owners.items()))
        adapting = {f"{path}.{own}": p for own, p in find_projections(owner).items()}
        return FusionAttention(name, module, adapting)
    if owners:
        listed = ", ".join(f"'{path}'" for path in owners)
        raise ValueError(f"Expected '{name}' to be one attention module, but it holds {len(owners)}: {listed}.")
    raise ValueError(_nothing_found(module, name))


def watched_attention(module: nn.Module, name: str) -> FusionAttention:
    """Take `module` as an attention whose scores are watched and which does not adapt, so that no name matters.

    Raises:
        ValueError: if it is a TorchScript module, or holds several attentions.
    """
    if isinstance(module, torch.jit.ScriptModule) or _owners(module, name):
        return find_attention(module, name)
    return FusionAttention(name, module, {})


def collect_params(fusion: Iterable[FusionAttention]) -> dict[str, nn.Parameter]:
    """Collect what adapts: the parameters of the fusion attention's q, k and v projections, by full name, once each."""
    named = {p: name for attention in reversed(list(fusion)) for name, p in reversed(attention.parameters.items())}
    return {name: parameter for parameter, name in reversed(named.items())}


def has_projections(module: nn.Module) -> bool:
    """Return True if a module has query, key and value projections of its own."""
    return bool(find_projections(module))


def find_projections(owner: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters of a module's own q, k and v projections, by their names in it; empty if it has none.

    Of a projection that is wrapped these are the weights of the linear inside: what an adapter beside it (LoRA) adds
    stays as it is. A step then moves the sum of both as it would move the merged weight.
    """
    if isinstance(owner, nn.MultiheadAttention):
        starts = ("in_proj", "q_proj", "k_proj", "v_proj")
        return {own: p for own, p in owner.named_parameters() if own.startswith(starts)}
    weights = {name: _weights(child) for name, child in owner.named_children() if _role(name)}
    names = projection_names(name for name, own in weights.items() if own)
    return {f"{name}.{own}": p for name in names for own, p in weights[name].items()}


def is_projection(name: str) -> bool:
    """Return True if a module's dotted name tells that it makes q, k or v."""
    return bool(_role(name.rpartition(".")[2]))


def projection_names(names: Iterable[str]) -> list[str]:
    """Choose the projections among the names of a module's linears; none if there are not queries as well as keys.

    A name counts if its words tell queries, keys or values, or several of these, and else only how they are made:
    `q_proj`, `to_kv`, `Wqkv`, `query_key_value`, `kv_a_proj_with_mqa`; not `pos_key_proj`.
    """
    roles = {name: _role(name) for name in names}
    told = "".join(roles.values())
    return [name for name, role in roles.items() if role] if {"q", "k"} <= set(told) else []


def _role(name: str) -> str:
    """Return which of q, k and v a linear of that name makes; empty if its name does not tell."""
    if name in _FUSED_NAMES:
        return "qkv"
    words = [word.removeprefix("w") if word.removeprefix("w") in _ROLES else word for word in name.lower().split("_")]
    if all(word in _ROLES or word in _OTHER_WORDS for word in words):
        return "".join(_ROLES.get(word, "") for word in words)
    return ""


def _weights(projection: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a projection's linears, by their names in it, without those of adapters beside them."""
    path = ""
    while isinstance(base := getattr(projection, "base_layer", None), nn.Module):  # as peft wraps it
        projection, path = base, f"{path}base_layer."
    found: dict[str, nn.Parameter] = {}
    for name, module in projection.named_modules():
        if _is_linear(module):
            found |= {f"{path}{own}": p for own, p in module.named_parameters(prefix=name) if not _is_adapter(own)}
    return found


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    shaped = isinstance(weight, Tensor) and weight.dim() > 1  # transformers' Conv1D, convolutions, quantised linears
    return isinstance(module, nn.Linear) or (shaped and not isinstance(module, nn.Embedding))


def _is_adapter(name: str) -> bool:
    return any(part.lower().startswith("lora") for part in name.split("."))


def _owners(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules with projections inside `module`, by full name; none that is inside another one."""
    owners: dict[str, nn.Module] = {}
    for path, inner in module.named_modules(prefix=name):
        if not any(path.startswith(f"{outer}.") for outer in owners) and has_projections(inner):
            owners[path] = inner
    return owners


def _chosen(module: nn.Module, name: str, projections: Projections) -> dict[str, nn.Parameter]:
    """The parameters that the user chose, by their names in the module."""
    own = dict(module.named_parameters())
    if callable(projections):
        return _returned(projections(module), own, name)
    found: dict[str, nn.Parameter] = {}
    for pattern in [projections] if isinstance(projections, str) else projections:
        regex = name_regex(pattern)
        matches = {at: p for at, p in own.items() if any(regex.fullmatch(part) for part in _beginnings(at))}
        if not matches:
            raise ValueError(
                f"Expected `projections` to match parameters of '{name}', but {pattern!r} matches none of them: "
                f"{', '.join(own) or 'it has none'}."
            )
        found |= matches
    return found


def _returned(chosen: object, own: Mapping[str, nn.Parameter], name: str) -> dict[str, nn.Parameter]:
    """Return the parameters that the user's function chose, by their names in the module."""
    if not isinstance(chosen, Mapping) or not chosen or not all(isinstance(p, nn.Parameter) for p in chosen.values()):
        seen = f"{chosen!r:.200}" if isinstance(chosen, Mapping) else f"a {type(chosen).__name__}"
        raise ValueError(
            f"Expected the function `projections` to give parameters of '{name}' by their names, but got {seen}."
        )
    names = {id(p): at for at, p in own.items()}
    if foreign := [given for given, p in chosen.items() if id(p) not in names]:
        raise ValueError(f"Expected `projections` to give parameters of '{name}', but {foreign} are not in it.")
    return {names[id(p)]: p for p in chosen.values()}


def _beginnings(name: str) -> list[str]:
    """A dotted name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _nothing_found(module: nn.Module, name: str) -> str:
    kinds = {child: type(own).__name__ for child, own in module.named_children()}
    without = [f"{at} ({kinds[at]})" for at in projection_names(kinds) if not _weights(module.get_submodule(at))]
    children = ", ".join(kinds) or "none"
    return (
        f"Expected '{name}' to be an attention module, but no query, key and value projections were found in this "
        f"{type(module).__name__} (its children: {children}). "
        + (f"Without a weight as a parameter: {', '.join(without)}. " if without else "")
        + "Known are nn.MultiheadAttention and linears whose names tell q, k and v: qkv, in_proj, c_attn, "
        "q_proj/k_proj, to_q/to_kv, query/key/value and the like. Name others as they are called inside "
        f"'{name}', projections=[\"NAME\", ...], or give a function from the module to parameters by name."
    )
