"""The fusion: which attention modules are watched, which adapt, which call holds which scores.

Two shapes of fusion exist. In a joint sequence one attention holds all blocks of scores. Elsewhere each ordered pair of
modalities has an attention of its own, the cross blocks here, the self blocks there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from lightning_abpem.attention.calls import AttentionCall
from lightning_abpem.attention.fits import NO_SCORES, are_apart, check_own, find_misfit, is_range, not_square
from lightning_abpem.attention.projections import FusionAttention, Projections, find_attention, watched_attention
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.attention.statistics import Comparison, Pair, score_statistics, visible_keys
from lightning_abpem.modules.names import find_modules, plain_name

__all__ = [
    "FusionPatterns",
    "JointFusion",
    "Patterns",
    "SeparateFusion",
    "check_samples",
    "find_fusion",
    "fusion_patterns",
]

Patterns = str | Sequence[str]
FusionPatterns = Patterns | Mapping[Pair, Patterns] | Mapping[str, Patterns]

_Place = tuple[str, int | None]  # an attention's name, and which of its calls in a forward; None for all
_NUMBERED = re.compile(r"(.*)\[(\d+)\]")


@dataclass(frozen=True)
class JointFusion:
    """One joint sequence: every call of the attentions holds a block for each pair of modalities."""

    watched: list[FusionAttention]
    places: list[_Place]

    @property
    def adapting(self) -> list[FusionAttention]:
        return self.watched

    def compare(self, calls: Iterable[AttentionCall], tokens: Mapping[str, Tokens]) -> dict[Pair, list[Comparison]]:
        """Return statistics of the cross block and of the key's self block: by (query, key) modality, for each call."""
        pairs = [(m, n) for m in tokens for n in tokens if m != n]
        compared: dict[Pair, list[Comparison]] = {pair: [] for pair in pairs}
        for call in _at(calls, self.places):
            visible = visible_keys(call)
            shown = {name: own.without(visible) for name, own in tokens.items()}
            block = score_statistics(call, shown, shown)
            with torch.no_grad():
                targets = {n: block(n, n) for n in tokens}
            for m, n in pairs:
                compared[m, n].append((block(m, n), targets[n]))
        return compared

    def last_calls(self, calls: Iterable[AttentionCall], modalities: Sequence[str]) -> dict[Pair, AttentionCall]:
        """Return the last call, by (query, key) modality, self pairs included: here one for all pairs."""
        last = _at(calls, self.places)[-1]
        return {(m, n): last for m in modalities for n in modalities}

    def check(self, calls: Sequence[AttentionCall], tokens: Mapping[str, Tokens]) -> None:
        """Hold the modalities against the calls; see `find_fusion`."""
        _check_call_indices(calls, self.places)
        chosen = _at(calls, self.places)
        for call in chosen:
            if call.shape[1] != call.shape[2]:
                raise ValueError(not_square(call.name, call.shape[1], call.shape[2]))
        problems = {call.name: find_misfit(call, tokens) for call in chosen}
        fitting = [name for name, problem in problems.items() if problem is None]
        if len(fitting) == len(problems):
            return
        if fitting:
            others = {f"'{call.name}' ({call.shape[1]})": None for call in chosen if problems[call.name]}
            raise ValueError(
                f"Expected `fusion` to match the attention over all modalities alone, but the spans fit {len(fitting)} "
                f"of {len(problems)} matches: {', '.join(fitting)}. Those with other numbers of tokens, such as an "
                f"encoder's: {', '.join(others)}. Name fewer: fusion={fitting!r}."
            )
        raise ValueError(next(iter(problem for problem in problems.values() if problem)))


@dataclass(frozen=True)
class SeparateFusion:
    """Attention modules by ordered pair (query, key) of modalities: cross blocks and self blocks.

    The modules of the cross blocks adapt; those of the self blocks, whose scores are constants, are watched.
    """

    watched: list[FusionAttention]
    adapting: list[FusionAttention]
    places: dict[Pair, list[_Place]]

    def compare(self, calls: Sequence[AttentionCall], tokens: Mapping[str, Tokens]) -> dict[Pair, list[Comparison]]:
        """Return statistics of the cross block and of the key's self block: by (query, key) modality, for each call."""
        own = {pair: _at(calls, places) for pair, places in self.places.items()}
        shown = dict(tokens)
        for (_, n), own_calls in own.items():
            for call in own_calls:
                shown[n] = shown[n].without(visible_keys(call))
        compared: dict[Pair, list[Comparison]] = {}
        for (m, n), cross in own.items():
            if m == n:
                continue
            with torch.no_grad():
                targets = [score_statistics(call, {n: shown[n]}, {n: shown[n]})(n, n) for call in own[n, n]]
            targets *= len(cross) // len(targets)
            blocks = [score_statistics(call, {m: shown[m]}, {n: shown[n]})(m, n) for call in cross]
            compared[m, n] = list(zip(blocks, targets, strict=True))
        return compared

    def last_calls(self, calls: Sequence[AttentionCall], modalities: Sequence[str]) -> dict[Pair, AttentionCall]:
        """Return each pair's last call, by (query, key) modality, for the self pairs that are named too."""
        return {pair: _at(calls, places)[-1] for pair, places in self.places.items()}

    def check(self, calls: Sequence[AttentionCall], tokens: Mapping[str, Tokens]) -> None:
        """Hold the modalities against the calls; see `find_fusion`."""
        _check_call_indices(calls, [place for places in self.places.values() for place in places])
        self._check_pairs(calls, tokens)
        lengths: dict[str, tuple[int, str]] = {}
        for (m, n), places in self.places.items():
            for call in _at(calls, places):
                for modality, length in ((m, call.shape[1]), (n, call.shape[2])):
                    before, where = lengths.setdefault(modality, (length, call.name))
                    if length != before and not is_range(tokens[modality]):
                        raise ValueError(
                            f"Expected modality '{modality}' to have the same tokens everywhere, but it has {before} "
                            f"in '{where}' and {length} in call [{call.call_index}] of '{call.name}', which `fusion` "
                            f"names for the queries of '{m}' and the keys of '{n}'. A module that is called for "
                            f"several pairs is named with the call's number, as in '{call.name}[0]'."
                        )
        for (m, n), places in self.places.items():
            for call in _at(calls, places):
                check_own(m, tokens[m], call.shape[1], call.name)
                check_own(n, tokens[n], call.shape[2], call.name)
        for m, n in self.places:
            cross, target = (len(_at(calls, self.places[pair])) for pair in ((m, n), (n, n)))
            if cross != target and target != 1:
                raise ValueError(
                    f"Expected as many calls for ('{n}', '{n}') as for ('{m}', '{n}'), layer by layer, or a single "
                    f"one, but got {target} and {cross}."
                )

    def _check_pairs(self, calls: Sequence[AttentionCall], tokens: Mapping[str, Tokens]) -> None:
        """Raise if a call stands for several pairs whose tokens no ranges tell apart."""
        taken: dict[tuple[str, int], Pair] = {}
        for pair, places in self.places.items():
            for call in _at(calls, places):
                before = taken.setdefault((call.name, call.call_index), pair)
                sides = zip(before, pair, call.shape[1:], strict=True)
                if before != pair and not all(are_apart(a, b, n, tokens) for a, b, n in sides):
                    raise ValueError(
                        f"Expected every call to stand for one pair of modalities, but call [{call.call_index}] of "
                        f"'{call.name}' is named for {before} and for {pair}. A module that is called for several "
                        f"pairs is named with the call's number, as in '{call.name}[{call.call_index}]'. If one call "
                        "holds the tokens of several modalities, `modalities` gives ranges that do not overlap, "
                        "counted from the end where that is what they share: "
                        '{"audio": (0, 6), "latents": (-3, None)}.'
                    )


def find_fusion(
    model: nn.Module, patterns: list[str] | dict[Pair, list[str]], projections: Projections | None = None
) -> JointFusion | SeparateFusion:
    """Find the attention modules that the patterns name. `NAME[i]` stands for call i of a module in a forward, from 0.

    Both kinds `check` a forward's calls against the modalities and `compare` their blocks.

    Args:
        model: the model.
        patterns: see `fusion_patterns`.
        projections: what adapts in them, where their names do not tell; see `TestTimeAdaptation`.

    Raises:
        ValueError: if a pattern matches nothing, or something that is not one attention.
    """
    if isinstance(patterns, list):
        places = _find_places(model, patterns)
        return JointFusion(_attentions(model, places, {name for name, _ in places}, projections), places)
    by_pair = {pair: _find_places(model, own) for pair, own in patterns.items()}
    moving = {name for (m, n), places in by_pair.items() if m != n for name, _ in places}
    watched = _attentions(model, [place for places in by_pair.values() for place in places], moving, projections)
    return SeparateFusion(watched, [attention for attention in watched if attention.name in moving], by_pair)


def check_samples(calls: Iterable[AttentionCall], samples: int) -> None:
    """Hold the calls against the number of samples.

    Raises:
        ValueError: if a call has another number; with the likely reason.
    """
    for call in calls:
        if call.shape[0] != samples:
            raise ValueError(
                f"Expected '{call.name}' to attend with {samples} samples, as many as the logits have, but got "
                f"{call.shape[0]}. Give it tokens batch-first. If heads and samples are one dimension, give the heads "
                "one of their own, (batch, heads, tokens, width), or let q, k or v hold what its projections put out, "
                "which tells heads from samples. If frames of a sample are, give logits for each frame; or "
                f"{NO_SCORES.format(call.name)}."
            )


def fusion_patterns(fusion: FusionPatterns, modalities: Sequence[str]) -> list[str] | dict[Pair, list[str]]:
    """The patterns as a list, of a joint sequence, or by ordered pair (query, key) of modalities.

    Args:
        fusion: patterns; or patterns by pair, ("video", "audio") or "video->audio"; or a rule for all pairs of
            `modalities`: {"self": ..., "cross": ...} with {query} and {key} in place of their names.
        modalities: their names; empty if unknown.

    Raises:
        ValueError: a mapping without a cross pair, or with a cross pair whose key modality has no self pair.
    """
    if not isinstance(fusion, Mapping):
        return _listed(fusion)
    if set(fusion) == {"self", "cross"}:
        if len(modalities) < 2:
            raise ValueError('Expected `modalities` to name those that {"self": ..., "cross": ...} stands for.')
        return {
            (m, n): [p.replace("{query}", m).replace("{key}", n) for p in _listed(own)]
            for m in modalities
            for n in modalities
            for kind, own in fusion.items()
            if (kind == "self") == (m == n)
        }
    pairs = {_pair(key): _listed(own) for key, own in fusion.items()}
    cross = [(m, n) for m, n in pairs if m != n]
    if not cross:
        raise ValueError(f"Expected `fusion` to name a pair of different modalities, but got {list(pairs)}.")
    for m, n in cross:
        if (n, n) not in pairs:
            raise ValueError(
                f"Expected `fusion` to name the self-attention ('{n}', '{n}') whose scores those of ('{m}', '{n}') are "
                f"drawn to, but got {list(pairs)}. If there is none, {NO_SCORES.format(', '.join(pairs[m, n]))}."
            )
    return pairs


def _pair(key: object) -> Pair:
    parts = key.split("->") if isinstance(key, str) else key
    if isinstance(parts, list | tuple) and len(parts) == 2 and all(isinstance(part, str) for part in parts):
        return parts[0].strip(), parts[1].strip()
    raise ValueError(
        'Expected `fusion` to map pairs such as ("video", "audio") or "video->audio", query first, or "self" and '
        f'"cross", but got {key!r}.'
    )


def _listed(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _find_places(model: nn.Module, patterns: Sequence[str]) -> list[_Place]:
    places: dict[_Place, None] = {}
    if not patterns:
        find_modules(model, patterns)
    first_names: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first_names.setdefault(id(module), plain_name(name))
    for pattern in patterns:
        numbered = _NUMBERED.fullmatch(pattern)
        call_index = int(numbered[2]) if numbered else None
        found = find_modules(model, numbered[1] if numbered else pattern)
        places |= {(first_names[id(module)], call_index): None for module in found.values()}
    return list(places)


def _attentions(
    model: nn.Module, places: Iterable[_Place], moving: Collection[str], projections: Projections | None
) -> list[FusionAttention]:
    """The attention modules at these places, none twice; those that are called `moving` adapt."""
    names = dict.fromkeys(name for name, _ in places)
    attentions = [
        find_attention(model.get_submodule(name), name, projections)
        if name in moving
        else watched_attention(model.get_submodule(name), name)
        for name in names
    ]
    for a, b in combinations(attentions, 2):
        if a.name.startswith(f"{b.name}.") or b.name.startswith(f"{a.name}."):
            raise ValueError(f"Expected `fusion` to match each attention once, but '{a.name}' and '{b.name}' are one.")
    return attentions


def _at(calls: Iterable[AttentionCall], places: Sequence[_Place]) -> list[AttentionCall]:
    """Return the calls that were made at one of the places, in their order."""
    return [call for call in calls if (call.name, None) in places or (call.name, call.call_index) in places]


def _check_call_indices(calls: Sequence[AttentionCall], places: Iterable[_Place]) -> None:
    for name, call_index in places:
        if call_index is not None and call_index >= (count := sum(call.name == name for call in calls)):
            raise ValueError(f"Expected a call [{call_index}] of '{name}' in a forward, but it made {count} calls.")
