"""The `ABPEM(...)` line that fits what a forward showed of its attention."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_abpem.attention.fits import LATENTS
from lightning_abpem.attention.origins import TracedCall, joint_spans
from lightning_abpem.attention.statistics import Pair
from lightning_abpem.engine.logits import read_logits
from lightning_abpem.modules.names import find_modules

__all__ = ["Suggestion", "suggest"]

_Options = Mapping[str, str | Mapping[str, Any]]


class Suggestion(NamedTuple):
    """The lines that fit, the best one first, and what to know about them or why there is none."""

    lines: list[str]
    notes: list[str]


def suggest(
    model: nn.Module, calls: Sequence[TracedCall], outputs: Mapping[str, object], names: Mapping[str, str]
) -> Suggestion:
    """Suggest the lines that fit what a forward showed.

    Args:
        model: the model.
        calls: its attention calls.
        outputs: those of the modules that no other module called; "" is the model itself.
        names: short names of the modules that tokens come from.
    """
    joint = [call for call in calls if call.shape == "joint"]
    cross = [call for call in calls if call.shape == "cross"]
    notes = [f"'{c.name}' hides q and k in its kernel: {_OTHER_KERNEL}" for c in calls if c.kind == "hidden"]
    if not joint and not cross:
        return Suggestion([], [*notes, _NO_FUSION])
    try:
        found, more = _joint_options(model, joint) if joint else _cross_options(model, calls, cross, names)
    except ValueError as error:  # of tokens that do not lie side by side
        return Suggestion([], [*notes, str(error)])
    notes += more
    target = _target(outputs, (joint or cross)[0].name)
    more_options = {"target": _quoted(target)} if target else {}
    try:
        more_options |= _head_options(outputs[target])
    except ValueError as error:
        lines = [_line({**options, **more_options, "logits": "lambda output: ..."}) for options in found[:1]]
        return Suggestion([], [*notes, f"{error} The rest is known: {lines[0]}" if lines else str(error)])
    return Suggestion([_line({**options, **more_options}) for options in found], notes)


_OTHER_KERNEL = "use attn_implementation='sdpa' or 'eager', or what turns flash or flex attention off."
_NO_FUSION = (
    "No attention was seen over tokens of several modules. If the modalities are put into one sequence otherwise than "
    "by concatenation, or are put in another order, give `modalities` as functions from the forward's arguments to "
    "(batch, tokens) bool masks. A modality of one token has no spread of scores, and does not count. " + LATENTS
)


def _joint_options(model: nn.Module, joint: Sequence[TracedCall]) -> tuple[list[_Options], list[str]]:
    last = joint[-1]
    spans = joint_spans(last)
    ordered = [tokens.span for tokens in spans.values()]
    whole = ordered[0].start == 0 and ordered[-1].stop == last.queries
    whole = whole and all(a.stop == b.start for a, b in pairwise(ordered))
    sizes = {
        name: tokens.span.stop - tokens.span.start if whole else (tokens.span.start, tokens.span.stop)
        for name, tokens in spans.items()
    }
    alike = [call for call in joint if call.query_segments == last.query_segments]
    modules = list(dict.fromkeys(call.name for call in alike))
    notes = []
    if len(modules) > 1:
        notes.append(f"{len(modules)} attentions would adapt. Fewer: fusion={modules[-1]!r}, the last, for instance.")
    if others := list(dict.fromkeys(call.name for call in joint if call.name not in modules)):
        notes.append(f"Left out, for they see other tokens of several modules: {', '.join(others)}.")
    return [{"fusion": _shown(_patterns(model, modules)), "modalities": sizes}], notes


def _cross_options(
    model: nn.Module, calls: Sequence[TracedCall], cross: Sequence[TracedCall], names: Mapping[str, str]
) -> tuple[list[_Options], list[str]]:
    """Pairs of modalities and their modules: cross as seen, self as near as possible to the cross ones.

    Some modalities only ask. Their self pairs are there for their padding, which a mask of their own attention tells.
    The second candidate goes without these pairs.
    """
    by_pair: dict[Pair, list[TracedCall]] = {}
    for call in cross:
        key = next(s.source for s in call.key_segments if s.source is not None)
        by_pair.setdefault((names[call.sources[0]], names[key]), []).append(call)
    repeated = {name for name, count in Counter(call.name for call in calls).items() if count > 1}
    fusion: dict[str, str] = {}
    asking: dict[str, str] = {}
    notes = []
    for (m, n), own in by_pair.items():
        target = _self_calls(calls, n, names, own, own[0].keys)
        if not target:
            notes.append(
                f"No self-attention of '{n}' alone was seen, to whose scores those of '{m}->{n}' could be drawn: name "
                f"one as '{n}->{n}', or adapt '{own[0].name}' by a method that needs no scores, such as READ."
            )
            continue
        fusion[f"{m}->{n}"] = _named(model, own, repeated)
        fusion[f"{n}->{n}"] = _named(model, target, repeated)
        if around := _self_calls(calls, m, names, own, own[0].queries):
            asking[f"{m}->{m}"] = _named(model, around, repeated)
    if not fusion:
        return [], notes
    return [{"fusion": own} for own in _distinct(asking | fusion, fusion)], notes


def _distinct(first: dict[str, str], second: dict[str, str]) -> list[dict[str, str]]:
    """Two candidates, the pairs of the second ahead in both; one if they are alike."""
    return [second | first, second] if first != second else [second]


def _named(model: nn.Module, calls: Sequence[TracedCall], repeated: Collection[str]) -> str:
    """Patterns for these calls, with their number where their modules make others too."""
    indices = {call.call_index for call in calls}
    number = f"[{indices.pop()}]" if len(indices) == 1 and any(call.name in repeated for call in calls) else ""
    return _shown([f"{pattern}{number}" for pattern in _patterns(model, [call.name for call in calls])])


def _self_calls(
    calls: Iterable[TracedCall], modality: str, names: Mapping[str, str], cross: Sequence[TracedCall], tokens: int
) -> list[TracedCall]:
    """Choose the self-attention of a modality's tokens that is nearest to the cross calls, layer by layer or one."""
    groups: dict[str, list[TracedCall]] = {}
    for call in calls:
        if call.shape == "self" and call.sources and names[call.sources[0]] == modality and call.queries == tokens:
            groups.setdefault(_starred(call.name), []).append(call)
    if not groups:
        return []

    def nearness(group: tuple[str, list[TracedCall]]) -> tuple[bool, int]:
        common = zip(group[0].split("."), _starred(cross[0].name).split("."), strict=False)
        return len(group[1]) == len(cross), sum(a == b for a, b in common)

    own = max(groups.items(), key=nearness)[1]
    return own if len(own) == len(cross) else own[-1:]


def _head_options(output: object) -> dict[str, str]:
    """Return the option that says where the logits are, if the engine does not find them by itself.

    Raises:
        ValueError: if they are nowhere, or in several places.
    """
    try:
        read_logits(output)
    except ValueError:
        fields = dict(output) if isinstance(output, Mapping) else {}
        fits = {key: x for key, x in fields.items() if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] > 1}
        if len(fits) != 1:
            raise
        [key] = fits
        return {"logits": f"lambda output: output[{key!r}]"}
    return {}


def _target(outputs: Mapping[str, object], fusion: str) -> str:
    """The outermost called module around the fusion; empty if it is the model itself."""
    parts = fusion.split(".")
    around = ["", *(".".join(parts[:i]) for i in range(1, len(parts) + 1))]
    return next(name for name in around if name in outputs)


def _patterns(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names as patterns that match nothing else, with * for the numbers of layers where that is so."""
    wanted = set(names)
    patterns = list(dict.fromkeys(map(_starred, names)))
    exact = all(set(find_modules(model, pattern)) <= wanted for pattern in patterns)
    return patterns if exact else list(dict.fromkeys(names))


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def _shown(patterns: Sequence[str]) -> str:
    return _quoted(patterns[0]) if len(patterns) == 1 else f"[{', '.join(map(_quoted, patterns))}]"


def _quoted(name: str) -> str:
    """A name as a string of Python: the line is run, and a name may have quotes."""
    return json.dumps(name, ensure_ascii=False)


def _line(options: _Options) -> str:
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
            pairs = [f"        {_quoted(key)}: {x}," for key, x in value.items()]
            lines += [f"    {part.partition('{')[0]}{{", *pairs, "    },"]
    return "\n".join(["ABPEM(", *lines, ")"])


def _mapping(items: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{_quoted(key)}: {value}" for key, value in items.items()) + "}"
