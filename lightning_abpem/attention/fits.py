"""Checks that the tokens which `modalities` names are those of a call."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_abpem.attention.calls import AttentionCall
from lightning_abpem.attention.spans import Tokens

__all__ = ["LATENTS", "NO_SCORES", "are_apart", "check_own", "find_misfit", "is_range", "not_square"]

NO_SCORES = "a method that needs no scores can adapt it, READ(fusion={0!r}) of lightning_abpem.methods for instance"
"""The way out where an attention has no blocks to compare; with its name."""

LATENTS = (
    "Where modalities meet in latents that each one's attention sees beside its own tokens (bottleneck tokens), name "
    'pairs of blocks: fusion={"latents->audio": "...", "audio->audio": "...", ...} with modalities={"audio": (0, 6), '
    '"latents": (-3, None), ...}.'
)
"""How to name blocks of one call."""


def find_misfit(call: AttentionCall, tokens: Mapping[str, Tokens]) -> str | None:
    """Say why the tokens are not those of a joint call; None if they are."""
    samples, length, _ = call.shape
    for name, own in tokens.items():
        if own.keep is not None and tuple(own.keep.shape) != (samples, length):
            return (
                f"Expected the mask of modality '{name}' to be {(samples, length)}, as the tokens of '{call.name}', "
                f"but got {tuple(own.keep.shape)}."
            )
    spans = {name: own for name, own in tokens.items() if own.keep is None}
    total = max((own.of or own.span.stop for own in spans.values()), default=0)
    if total <= length and not any(own.of not in (None, length) for own in spans.values()):
        return None
    listed = ", ".join(f"{name} {own.span.start}:{own.span.stop}" for name, own in spans.items())
    return (
        f"Expected the spans of `modalities` to add up to the tokens of '{call.name}', but got {total} ({listed}) "
        f"and {length} tokens. Tokens that belong to no modality, such as a CLS token, are left out by giving "
        f"explicit (start, stop) ranges.{' ' + LATENTS if total > length else ''}"
    )


def not_square(name: str, queries: int, keys: int) -> str:
    """Say why an attention with other queries than keys is not one over a joint sequence."""
    return (
        f"Expected '{name}' to attend within one joint sequence, but got {queries} query and {keys} key tokens. If the "
        'queries are one modality and the keys another, `fusion` maps pairs to modules: {"video->audio": "...", '
        '"audio->audio": "...", ...}. If they are latents that read several modalities at once (Perceiver), none of '
        "them attends to itself there, so that the bootstrapping has nothing to draw to: "
        + NO_SCORES.format(name)
        + "."
    )


def is_range(tokens: Tokens) -> bool:
    """Return True for a part of a sequence of any length; False for all of it, or a mask."""
    return tokens.of is None and tokens.span != slice(None)


def are_apart(a: str, b: str, length: int, tokens: Mapping[str, Tokens]) -> bool:
    """Return True if two modalities are one, or ranges of `length` tokens that share none."""
    own = [set(range(*tokens[name].span.indices(length))) for name in (a, b) if is_range(tokens[name])]
    return a == b or (len(own) == 2 and own[0].isdisjoint(own[1]))


def check_own(modality: str, tokens: Tokens, length: int, where: str) -> None:
    """Hold the tokens of a modality against those that an attention has of it.

    Raises:
        ValueError: if there are fewer, or, for a length or a mask, others.
    """
    if tokens.of not in (None, length):
        raise ValueError(f"Expected {tokens.of} tokens of modality '{modality}', but '{where}' has {length} of it.")
    start, stop = tokens.span.start, tokens.span.stop
    if max(abs(start or 0), abs(stop or 0)) > length:
        raise ValueError(
            f"Expected modality '{modality}' to be among the {length} tokens of '{where}', but got the range "
            f"({start}, {stop}). Where its place differs from attention to attention, count from the end, as in "
            "(-3, None)."
        )
