"""Finding a model's fusion attention: every attention call of one forward, and the `ABPEM(...)` line that fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_abpem.attention.origins import SeenCall, joint_spans, short_names
from lightning_abpem.attention.projections import find_attention
from lightning_abpem.attention.statistics import Pair
from lightning_abpem.attention.trace import tracing
from lightning_abpem.display import inspection_table, plain_text
from lightning_abpem.engine.logits import read_logits
from lightning_abpem.modules.names import find_modules

__all__ = ["Inspection", "inspect", "inspecting"]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; prints as a table and the line to paste.

    Args:
        calls: every attention call, in the order in which their modules ended.
        names: a short name for every module that tokens come from.
        values: by module, how many values its q, k and v projections hold, which would adapt; 0 if none were found.
        line: the `ABPEM(...)` expression that fits; None if no attention sees tokens of several modules.
        notes: what to know about it.
    """

    calls: list[SeenCall]
    names: Mapping[str, str]
    values: Mapping[str, int]
    line: str | None
    notes: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, one for each call."""
        return [
            {
                "name": call.name + (f"[{call.turn}]" if call.turn else ""),
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

    def _tokens(self, call: SeenCall) -> str:
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


def inspect(model: nn.Module, *inputs: Any, **kwargs: Any) -> Inspection:
    """Run `model(*inputs, **kwargs)` once, in eval mode, without gradients, and show its attention.

    The model is left as it was. Where the batch is only known to a LightningModule's step, ``abpem inspect`` runs that.

    Example:
        ``inspect(model, audio, video)``, in a notebook.
    """
    with torch.no_grad(), inspecting(model) as result:
        model(*inputs, **kwargs)
    return result.inspection()


class _Result:
    """The calls of what ran inside `inspecting`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[SeenCall] = []
        self.outputs: dict[str, Any] = {}  # of the modules that were called by no other; "" is the model itself

    def inspection(self) -> Inspection:
        """All that is known of them."""
        sources = dict.fromkeys(s.source for c in self.calls for s in (*c.query_segments, *c.key_segments) if s.source)
        values = {call.name: _count(self.model, call.name) for call in self.calls}
        names = short_names(list(sources))
        line, notes = _suggest(self, names)
        return Inspection(self.calls, names, values, line, notes)


@contextmanager
def inspecting(model: nn.Module) -> Iterator[_Result]:
    """Watch what runs inside the block, with the model in eval mode; gives a result with its `inspection()`."""
    training = {module: module.training for module in model.modules()}
    result = _Result(model)

    def root(module: nn.Module, args: Any, output: Any) -> None:
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


# ---------------------------------------------------------------------------------------------------- the suggestion


def _suggest(result: _Result, names: Mapping[str, str]) -> tuple[str | None, list[str]]:
    joint = [call for call in result.calls if call.shape == "joint"]
    cross = [call for call in result.calls if call.shape == "cross"]
    notes = [f"'{c.name}' hides q and k in its kernel: {_OTHER_KERNEL}" for c in result.calls if c.kind == "hidden"]
    if not joint and not cross:
        return None, [*notes, _NO_FUSION]
    if joint:
        options, more = _joint_options(result.model, joint)
    else:
        options, more = _cross_options(result, cross, names)
    target = _target(result, (joint or cross)[0].name)
    if target:
        options["target"] = f'"{target}"'
    return _line(options | _head_options(result.outputs[target])), [*notes, *more]


_OTHER_KERNEL = "use attn_implementation='sdpa' or 'eager', or what turns flash or flex attention off."
_NO_FUSION = (
    "No attention was seen over tokens of several modules. If the modalities are put into one sequence otherwise than "
    "by concatenation, or are put in another order, give `modalities` as functions from the forward's arguments to "
    "(batch, tokens) bool masks. A modality of one token has no spread of scores, and does not count."
)


def _joint_options(model: nn.Module, joint: Sequence[SeenCall]) -> tuple[dict[str, Any], list[str]]:
    spans = joint_spans(joint[0])
    ordered = [tokens.span for tokens in spans.values()]
    whole = ordered[0].start == 0 and ordered[-1].stop == joint[0].queries
    whole = whole and all(a.stop == b.start for a, b in pairwise(ordered))
    sizes = {
        name: tokens.span.stop - tokens.span.start if whole else (tokens.span.start, tokens.span.stop)
        for name, tokens in spans.items()
    }
    patterns = _patterns(model, [call.name for call in joint])
    modules = list(dict.fromkeys(call.name for call in joint))
    notes = []
    if len(modules) > 1:
        notes.append(f"{len(modules)} attentions would adapt. Fewer: fusion={modules[-1]!r}, the last, for instance.")
    others = {call.queries for call in joint} - {joint[0].queries}
    if others:
        notes.append(f"Some of them see {sorted(others)} tokens instead of {joint[0].queries}: leave those out.")
    return {"fusion": _shown(patterns), "modalities": sizes}, notes


def _cross_options(
    result: _Result, cross: Sequence[SeenCall], names: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Pairs of modalities and their modules: cross as seen, self as near as possible to the cross ones."""
    by_pair: dict[Pair, list[SeenCall]] = {}
    for call in cross:
        key = next(s.source for s in call.key_segments if s.source is not None)
        by_pair.setdefault((names[call.sources[0]], names[key]), []).append(call)
    shared = {name for name, count in Counter(call.name for call in cross).items() if count > 1}
    fusion: dict[str, str] = {}
    notes = []
    for (m, n), calls in by_pair.items():
        turns = {call.turn for call in calls}
        turn = f"[{turns.pop()}]" if len(turns) == 1 and any(call.name in shared for call in calls) else ""
        fusion[f"{m}->{n}"] = _shown([f"{p}{turn}" for p in _patterns(result.model, [c.name for c in calls])])
        own = _self_calls(result.calls, n, names, calls)
        if own:
            fusion[f"{n}->{n}"] = _shown(_patterns(result.model, [call.name for call in own]))
        else:
            notes.append(f"No self-attention of '{n}' alone was seen: name the one that '{n}->{n}' stands for.")
    return {"fusion": fusion}, notes


def _self_calls(
    calls: Iterable[SeenCall], modality: str, names: Mapping[str, str], cross: Sequence[SeenCall]
) -> list[SeenCall]:
    """The self-attention of a modality whose scores those of the cross calls are drawn to, layer by layer or one."""
    groups: dict[str, list[SeenCall]] = {}
    for call in calls:
        if call.shape == "self" and call.sources and names[call.sources[0]] == modality:
            groups.setdefault(_starred(call.name), []).append(call)
    if not groups:
        return []

    def nearness(group: tuple[str, list[SeenCall]]) -> tuple[bool, int]:
        common = zip(group[0].split("."), _starred(cross[0].name).split("."), strict=False)
        return len(group[1]) == len(cross), sum(a == b for a, b in common)

    own = max(groups.items(), key=nearness)[1]
    return own if len(own) == len(cross) else own[-1:]


def _head_options(output: Any) -> dict[str, str]:
    """Where the logits are, if they are not where they are looked for."""
    try:
        read_logits(output)
    except ValueError:
        fields = dict(output) if isinstance(output, Mapping) else {}
        fits = {key: x for key, x in fields.items() if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] > 1}
        if len(fits) != 1:
            return {"logits": "lambda output: ..."}
        [key] = fits
        return {"logits": f"lambda output: output[{key!r}]"}
    return {}


def _target(result: _Result, fusion: str) -> str:
    """The outermost called module around the fusion; empty if it is the model itself."""
    parts = fusion.split(".")
    around = ["", *(".".join(parts[:i]) for i in range(1, len(parts) + 1))]
    return next(name for name in around if name in result.outputs)


def _patterns(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names as patterns that match nothing else, with * for the numbers of layers where that is so."""
    wanted = set(names)
    patterns = list(dict.fromkeys(map(_starred, names)))
    exact = all(set(find_modules(model, pattern)) <= wanted for pattern in patterns)
    return patterns if exact else list(dict.fromkeys(names))


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def _count(model: nn.Module, name: str) -> int:
    try:
        return sum(p.numel() for p in find_attention(model.get_submodule(name), name).parameters.values())
    except (AttributeError, ValueError):
        return 0


def _shown(patterns: Sequence[str]) -> str:
    return f'"{patterns[0]}"' if len(patterns) == 1 else "[" + ", ".join(f'"{p}"' for p in patterns) + "]"


def _line(options: Mapping[str, str | Mapping[str, Any]]) -> str:
    """One line if it is short; else an option on each, and a pair of a mapping on each where that is long too."""
    parts = [f"{name}={value if isinstance(value, str) else _mapping(value)}" for name, value in options.items()]
    line = f"ABPEM({', '.join(parts)})"
    if len(line) < 80:
        return line
    lines = []
    for part, value in zip(parts, options.values(), strict=True):
        if isinstance(value, str) or len(part) < 72:
            lines.append(f"    {part},")
        else:
            pairs = [f'        "{key}": {x},' for key, x in value.items()]
            lines += [f"    {part.partition('{')[0]}{{", *pairs, "    },"]
    return "\n".join(["ABPEM(", *lines, ")"])


def _mapping(items: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in items.items()) + "}"
