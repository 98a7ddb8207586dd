"""The tokens of a sequence that belong to each modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, combinations, pairwise
from numbers import Integral
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "Modalities",
    "Span",
    "TokenMask",
    "Tokens",
    "check_disjoint",
    "own_spans",
    "select_tokens",
    "single_tokens",
    "token_spans",
]

Span = Sequence[int] | range | slice
"""(start, stop), the stop excluded; in a sequence of a modality's own also from the end, (-3, None)."""

TokenMask = Callable[..., Tensor]
"""From the target's arguments to a (B, N) bool tensor: which tokens of each sample belong to the modality."""

Modalities = Mapping[str, int | Span | TokenMask]
"""By modality: a number of tokens, a span or a mask."""


class Tokens(NamedTuple):
    """The tokens of one modality.

    `span` is a span of the sequence. `keep`, (B or 1, n) bool, is True for those of its n tokens that count; None for
    all. `of` is the number of tokens that the sequence must have, None for any.
    """

    span: slice
    keep: Tensor | None = None
    of: int | None = None

    def without(self, visible: Tensor | None) -> Tokens:
        """Return the tokens without those that are not `visible`, (B or 1, N) bool over the sequence; all if None."""
        if visible is None:
            return self
        visible = visible[:, self.span]
        return self._replace(keep=visible if self.keep is None else self.keep & visible)


def token_spans(modalities: Modalities) -> dict[str, Tokens | TokenMask]:
    """The tokens of each modality in one joint sequence: lengths in their order, or (start, stop) ranges and masks.

    Raises:
        ValueError: fewer than two modalities, spans that are empty or overlap, lengths beside others.
    """
    if len(modalities) < 2:
        raise ValueError(f"Expected `modalities` to name at least two modalities, but got {dict(modalities)!r}.")
    lengths = {name: int(value) for name, value in modalities.items() if isinstance(value, int | Integral)}
    if lengths and len(lengths) < len(modalities):
        raise ValueError(f"Expected `modalities` to be all lengths or all (start, stop), but got {dict(modalities)!r}.")
    ends = dict(zip(lengths, accumulate(lengths.values()), strict=True))
    spans: dict[str, Tokens | TokenMask] = {}
    for name, value in modalities.items():
        if name in lengths:
            span = _span(name, (ends[name] - lengths[name], ends[name]), value)
            spans[name] = Tokens(span, of=sum(lengths.values()))
        else:
            spans[name] = value if _is_mask(value) else Tokens(_span(name, value, value))
    ordered = sorted((x.span.start, x.span.stop, name) for name, x in spans.items() if isinstance(x, Tokens))
    for (start_a, stop_a, name_a), (start_b, stop_b, name_b) in pairwise(ordered):
        if start_b < stop_a:
            raise ValueError(
                f"Expected disjoint token spans, but '{name_a}' {start_a}:{stop_a} and '{name_b}' {start_b}:{stop_b} "
                "overlap."
            )
    return spans


def own_spans(modalities: Modalities) -> dict[str, Tokens | TokenMask]:
    """The tokens of each modality in a sequence of its own: a length, which must be all, a range or a mask."""
    spans: dict[str, Tokens | TokenMask] = {}
    for name, value in modalities.items():
        if isinstance(value, Integral):
            spans[name] = Tokens(_span(name, (0, int(value)), value), of=int(value))
        else:
            spans[name] = value if _is_mask(value) else Tokens(_from_the_end(value) or _span(name, value, value))
    return spans


def _from_the_end(value: object) -> slice | None:
    """Return the span of the last tokens, (-n, None); None for another one."""
    if isinstance(value, slice):
        value = (value.start, value.stop) if value.step in (None, 1) else ()
    if isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], Integral) and value[1] is None:
        return slice(int(value[0]), None) if value[0] < 0 else None
    return None


def _is_mask(value: object) -> TypeGuard[TokenMask]:
    return callable(value)


def _span(name: str, value: Any, given: object) -> slice:
    if isinstance(value, range | slice):
        if value.step not in (None, 1):
            raise ValueError(f"Expected a span of step 1 for modality '{name}', but got {given!r}.")
        value = (value.start or 0, value.stop)
    two = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(bound, Integral) for bound in value)
    if not two:
        raise ValueError(f"Expected a length, (start, stop) or a function for modality '{name}', but got {given!r}.")
    span = slice(int(value[0]), int(value[1]))
    if span.start < 0 or span.stop <= span.start:
        raise ValueError(f"Expected at least one token of modality '{name}', from 0 on, but got {given!r}.")
    return span


def select_tokens(
    spans: Mapping[str, Tokens | TokenMask], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, Tokens]:
    """The tokens of each modality in one batch; masks are made from the target's arguments.

    Raises:
        ValueError: if a function gives something else than a (B, N) bool tensor.
    """
    tokens = {}
    for name, span in spans.items():
        if isinstance(span, Tokens):
            tokens[name] = span
            continue
        mask = span(*args, **kwargs)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.dtype != torch.bool:
            seen = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"Expected the function of modality '{name}' to make a (batch, tokens) bool tensor, but got {seen}."
            )
        # A copy, for the forward may edit the mask, and the loader may fill it anew.
        tokens[name] = Tokens(slice(None), mask.detach().clone(), mask.shape[1])
    return tokens


def single_tokens(tokens: Mapping[str, Tokens]) -> list[str]:
    """List the modalities of which no sample has more than one token."""
    return [name for name, own in tokens.items() if _most_tokens(own) == 1]


def _most_tokens(own: Tokens) -> int | None:
    """Return the most tokens that a sample has of a modality; None for all of a sequence of any length."""
    if own.keep is not None:
        return int(own.keep.sum(1).max()) if own.keep.numel() else 0
    return None if own.span.stop is None else own.span.stop - own.span.start


def check_disjoint(tokens: Mapping[str, Tokens]) -> None:
    """Raise if masks, or masks and spans, share a token.

    Raises:
        ValueError: if a token belongs to two modalities.
    """
    length = next((own.of for own in tokens.values() if own.keep is not None), None)
    if length is None:
        return
    whole = {}
    for name, (span, keep, _) in tokens.items():
        whole[name] = torch.zeros(1, length, dtype=torch.bool)
        whole[name][:, span] = True
        whole[name] = whole[name] if keep is None else keep.cpu()
    for a, b in combinations(whole, 2):
        if bool((whole[a] & whole[b]).any()):
            raise ValueError(f"Expected every token in one modality at most, but '{a}' and '{b}' share some.")
