"""Attention calls as a forward shows them: the origins of their tokens, and what they say of the modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from lightning_abpem.attention.fits import LATENTS, not_square
from lightning_abpem.attention.spans import Tokens

__all__ = ["Kind", "Segment", "TracedCall", "joint_spans", "short_names"]

Kind = Literal["fused", "torch", "eager", "hidden"]

_WORDS = {  # parts of module names that tell the modality
    "audio": ("audio", "speech", "sound", "wave", "spectrogram"),
    "text": ("text", "word", "lang"),
    "video": ("video", "frame"),
    "image": ("image", "vision", "visual", "visn", "pixel"),
}


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of one origin.

    Args:
        source: the module call that put them out first, `NAME` or, from its second call on, `NAME[i]`; None if they
            come from no module, such as a CLS parameter.
        tokens: their number.
    """

    source: str | None
    tokens: int


@dataclass(frozen=True)
class TracedCall:
    """One attention call of a forward.

    Args:
        name: the module with the query, key and value projections or, without one, the innermost module.
        call_index: how many calls of this module came before.
        kind: "fused", F.scaled_dot_product_attention; "torch", nn.MultiheadAttention; "eager", a softmax over scores;
            "hidden", a module with projections in which none of these was seen.
        queries: number of query tokens; 0 if hidden.
        keys: number of key tokens.
        heads: number of heads.
        query_segments: the origins of the query tokens; empty if unknown.
        key_segments: those of the key tokens.
    """

    name: str
    call_index: int
    kind: Kind
    queries: int = 0
    keys: int = 0
    heads: int = 0
    query_segments: tuple[Segment, ...] = ()
    key_segments: tuple[Segment, ...] = ()

    @property
    def sources(self) -> list[str]:
        """The origins of its query tokens that have more than one token."""
        return list(dict.fromkeys(s.source for s in self.query_segments if s.source is not None and s.tokens > 1))

    @property
    def shape(self) -> Literal["joint", "cross", "self"]:
        """Joint: as many keys as queries, of several origins; cross: queries of one origin and keys of another."""
        if len(self.sources) > 1 and self.queries == self.keys:
            return "joint"
        keys = [segment.source for segment in self.key_segments if segment.source is not None]
        return "cross" if len(self.sources) == 1 and keys and not set(self.sources) & set(keys) else "self"

    def __str__(self) -> str:
        if self.kind == "hidden":
            return f"{self.name} (its kernel hides q and k)"
        return f"{self.name} ({self.queries} query and {self.keys} key tokens)"


def joint_spans(call: TracedCall) -> dict[str, Tokens]:
    """The spans of a joint call's modalities, by a short name for the module that each of them comes from.

    Raises:
        ValueError: if it is not joint, or the tokens of one module do not lie side by side.
    """
    if call.shape != "joint":
        raise ValueError(_not_joint(call))
    names = short_names(call.sources)
    spans: dict[str, Tokens] = {}
    start = 0
    for source, group in groupby(call.query_segments, key=lambda segment: segment.source):
        stop = start + sum(segment.tokens for segment in group)
        if source in names and stop - start > 1:
            if names[source] in spans:
                raise ValueError(
                    f"Expected the tokens of '{source}' side by side in '{call.name}', but they are in several places. "
                    "Give `modalities` as functions that make masks."
                )
            spans[names[source]] = Tokens(slice(start, stop), of=call.queries)
        start = stop
    return spans


def _not_joint(call: TracedCall) -> str:
    if call.queries != call.keys:
        return not_square(call.name, call.queries, call.keys)
    origin = f"'{call.sources[0]}' alone. {LATENTS}" if len(call.sources) == 1 else "no module."
    return (
        f"Expected '{call.name}' to attend over concatenated outputs of several modules, but its tokens are seen to "
        f"come from {origin} If it holds several modalities all the same, give their spans, as in "
        "modalities={'a': 512, 'v': 196}."
    )


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """Names that tell modules apart: of a modality, if each is known to be of another one by the words in its name.

    Else what is different where their dotted names part.
    """
    modalities = {source: _modality(source) for source in sources}
    if None not in modalities.values() and len(set(modalities.values())) == len(sources):
        return {source: modality for source, modality in modalities.items() if modality is not None}
    paths = [source.partition("[")[0].split(".") for source in sources]
    while len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    words = [path[0].split("_") for path in paths]
    for end in (0, -1):
        while len({parts[end] for parts in words}) == 1 and all(len(parts) > 1 for parts in words):
            for parts in words:
                parts.pop(end)
    short = ["_".join(parts) for parts in words]
    repeated = {name for name in short if short.count(name) > 1}
    return {
        source: f"{name}_{short[:i].count(name)}" if name in repeated else name
        for i, (source, name) in enumerate(zip(sources, short, strict=True))
    }


def _modality(source: str) -> str | None:
    """Return the modality told by the last word for one in a module's name; None without such a word."""
    told = [
        modality
        for part in source.lower().split(".")
        for modality, words in _WORDS.items()
        if any(word in part for word in words)
    ]
    return told[-1] if told else None
