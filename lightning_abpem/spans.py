"""Which tokens of a joint sequence belong to which modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_abpem.attention import AttentionCall

__all__ = ["Span", "check_spans", "token_spans"]

Span = Sequence[int] | range | slice


def token_spans(modalities: Mapping[str, int | Span]) -> dict[str, slice]:
    """The span of each modality in the joint sequence, from lengths in order or from explicit (start, stop) ranges.

    Raises:
        ValueError: fewer than two modalities, a span of fewer than two tokens, overlapping spans, a mix of both forms.
    """
    if len(modalities) < 2:
        raise ValueError(f"Expected `modalities` to name at least two modalities, but got {dict(modalities)!r}.")
    lengths = [isinstance(value, Integral) for value in modalities.values()]
    if any(lengths) and not all(lengths):
        raise ValueError(f"Expected `modalities` to be all lengths or all (start, stop), but got {dict(modalities)!r}.")
    spans: dict[str, slice] = {}
    end = 0
    for name, value in modalities.items():
        if isinstance(value, int | Integral):
            value = (end, end := end + int(value))
        spans[name] = _explicit_span(name, value)
        if spans[name].start < 0 or spans[name].stop - spans[name].start < 2:
            raise ValueError(
                f"Expected at least two tokens of modality '{name}', from 0 on, but got {modalities[name]!r}."
            )
    ordered = sorted(spans.items(), key=lambda item: item[1].start)
    for (name_a, a), (name_b, b) in pairwise(ordered):
        if b.start < a.stop:
            raise ValueError(f"Expected disjoint token spans, but '{name_a}' {a} and '{name_b}' {b} overlap.")
    return spans


def _explicit_span(name: str, value: Span) -> slice:
    if isinstance(value, range | slice):
        if value.step not in (None, 1):
            raise ValueError(f"Expected a span of step 1 for modality '{name}', but got {value!r}.")
        value = (value.start or 0, value.stop)
    if len(value) != 2 or not all(isinstance(bound, Integral) for bound in value):
        raise ValueError(f"Expected a length or (start, stop) for modality '{name}', but got {value!r}.")
    return slice(int(value[0]), int(value[1]))


def check_spans(spans: Mapping[str, slice], call: AttentionCall, *, cover: bool) -> None:
    """Hold the spans against the tokens that an attention call has.

    Args:
        cover: the spans must cover the whole sequence (they were given as lengths); ranges may leave tokens out.

    Raises:
        ValueError: naming the spans' total and the tokens seen.
    """
    _, n_q, n_k = call.shape
    if n_q != n_k:
        raise ValueError(
            f"Expected '{call.name}' to attend within one joint sequence, but got {n_q} query and {n_k} key tokens. "
            "Separate self- and cross-attention modules are not supported yet."
        )
    total = max(span.stop for span in spans.values())
    if total > n_q or (cover and total < n_q):
        listed = ", ".join(f"{name} {span.start}:{span.stop}" for name, span in spans.items())
        raise ValueError(
            f"Expected the spans of `modalities` to add up to the tokens of '{call.name}', but got {total} ({listed}) "
            f"and {n_q} tokens. Tokens that belong to no modality, such as a CLS token, are left out by giving "
            "explicit (start, stop) ranges."
        )
