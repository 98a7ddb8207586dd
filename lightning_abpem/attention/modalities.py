"""The tokens of each modality in a batch: as the user says, or as the concatenation ahead of the fusion shows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch.utils._pytree import tree_map

from lightning_abpem.attention.arguments import Described, changed_values, describe
from lightning_abpem.attention.calls import AttentionCall
from lightning_abpem.attention.fusion import JointFusion, SeparateFusion
from lightning_abpem.attention.origins import TracedCall, joint_spans
from lightning_abpem.attention.spans import TokenMask, Tokens, check_disjoint, select_tokens, single_tokens
from lightning_abpem.modules.tensors import normal_tensor

__all__ = ["BatchTokens", "refuse_silence"]

log = logging.getLogger(__name__)

_NO_SPREAD = (
    "a single score has no deviation to compare. The other parts of the loss adapt; the figures of such pairs are NaN."
)
_Key = tuple[tuple[str, Described], ...]
_REMEMBERED = 64  # kinds of arguments, for each of which a forward was traced
_PATIENCE = 3  # forwards that are traced for new values until that is said


class BatchTokens:
    """Turns the target's arguments into the tokens of each modality.

    Args:
        spans: what is known of them; None to read them off a forward, once for all arguments of the same structure,
            shapes and scalars. Tokens that depend on a tensor's values are read again where their number shows it.
        fusion: the attentions that they enter.
        trace: the attention calls of a forward with these arguments.
        report: told the spans that were read.
    """

    def __init__(
        self,
        spans: Mapping[str, Tokens | TokenMask] | None,
        fusion: JointFusion | SeparateFusion,
        trace: Callable[[Any, Any], list[TracedCall]],
        report: Callable[[str], None],
    ) -> None:
        self._spans, self._fusion, self._trace, self._report = spans, fusion, trace, report
        self._read: dict[_Key, dict[str, Tokens]] = {}  # those that were met last stand last
        self._described: dict[str, Described] = {}  # the last arguments
        self._reported, self._rereadings = "", 0
        self._unchecked = True
        ranges = [own for own in (spans or {}).values() if isinstance(own, Tokens) and own.of is None]
        self._doubts_ranges = bool(ranges) and isinstance(fusion, JointFusion)
        self._length: int | None = None  # of the first batch's sequence

    def __call__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Tokens]:
        """Return the tokens of each modality in this batch.

        Raises:
            ValueError: if they cannot be read, a mask is not one, or, in the first batch, two modalities share tokens.
        """
        if self._spans is None:
            return self._known_or_read(args, kwargs)
        tokens = cast(dict[str, Tokens], self._spans)
        if not all(isinstance(span, Tokens) for span in self._spans.values()):
            with torch.no_grad():
                tokens = select_tokens(self._spans, *tree_map(normal_tensor, (args, kwargs)))
        if self._unchecked:
            if isinstance(self._fusion, JointFusion):
                check_disjoint(tokens)
            _warn_of_single(tokens)
            self._unchecked = False
        return tokens

    def check(
        self,
        calls: Sequence[AttentionCall],
        tokens: dict[str, Tokens],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> dict[str, Tokens]:
        """Hold the tokens against the calls. Tokens read off another batch are read again if they do not fit.

        Raises:
            ValueError: if they do not fit.
        """
        if self._doubts_ranges:
            self._warn_of_other_lengths(calls)
        try:
            self._fusion.check(calls, tokens)
        except ValueError:
            if self._spans is not None:
                raise
            tokens = self._keep(tuple(describe(args, kwargs).items()), self._off_a_forward(args, kwargs))
            self._fusion.check(calls, tokens)
        return tokens

    def _known_or_read(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Tokens]:
        described = describe(args, kwargs)
        key = tuple(described.items())
        tokens = self._read.pop(key, None)
        if tokens is None:
            tokens = self._off_a_forward(args, kwargs)
            self._warn_of_values(changed_values(self._described, described))
        self._described = described
        return self._keep(key, tokens)

    def _warn_of_values(self, changed: Sequence[str]) -> None:
        """Say once that values among the arguments, which may move tokens or not, cost forwards of their own."""
        self._rereadings += bool(changed)
        if changed and self._rereadings == _PATIENCE:
            log.warning(
                'modalities="auto" has run the model %d times more, to read the tokens off anew: values among the '
                "arguments differ from batch to batch, %s. Each new value costs a forward without gradients. If none "
                "of them moves tokens, give the spans, %s; if one does, functions that make masks.",
                *(_PATIENCE, ", ".join(changed[:3]), self._reported),
            )

    def _keep(self, key: _Key, tokens: dict[str, Tokens]) -> dict[str, Tokens]:
        """Remember the tokens as those met last, and forget those met longest ago."""
        self._read[key] = tokens
        if len(self._read) > _REMEMBERED:
            del self._read[next(iter(self._read))]
        return tokens

    def _warn_of_other_lengths(self, calls: Sequence[AttentionCall]) -> None:
        """Say once that the sequence's length varies: ranges fit it all the same, but hold other tokens."""
        length = calls[0].shape[2]
        if self._length is None:
            self._length = length
        elif length != self._length:
            log.warning(
                "The ranges of `modalities` were first met by %d tokens in '%s' and now by %d. They stay as they are, "
                "so that a token may count for another modality, or for none. Where numbers of tokens vary, give "
                'functions from the arguments to masks, or "auto".',
                *(self._length, calls[0].name, length),
            )
            self._doubts_ranges = False

    def _off_a_forward(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Tokens]:
        seen = self._trace(args, kwargs)
        own = [call for call in seen if any(_is_inside(call.name, x.name) for x in self._fusion.watched)]
        if not own:
            refuse_silence(self._fusion, (), seen)
        within = list(dict.fromkeys(str(call) for call in own if call.shape != "joint"))
        fitting = list(dict.fromkeys(call.name for call in own if call.shape == "joint"))
        if within and fitting:
            raise ValueError(
                f"Expected `fusion` to match the attention over all modalities alone, but of its "
                f"{len(within) + len(fitting)} matches {len(within)} see one module's tokens only: "
                f"{', '.join(within)}. Name fewer: fusion={fitting!r}."
            )
        spans = joint_spans(own[0])
        listed = ", ".join(f'"{name}": ({tokens.span.start}, {tokens.span.stop})' for name, tokens in spans.items())
        listed = f"modalities={{{listed}}}"
        if listed != self._reported:
            self._reported = listed
            self._report(f"ABPEM reads off this batch, of {own[0].queries} tokens: {listed}")
        return spans


def _warn_of_single(tokens: Mapping[str, Tokens]) -> None:
    """Say which modalities have one token: between one query and one key there is no spread of scores."""
    single = single_tokens(tokens)
    if not single:
        return
    if len(single) == len(tokens):
        log.warning("Every modality has one token, so that attention bootstrapping cannot act: %s", _NO_SPREAD)
    else:
        log.warning("One token each of %s: the pairs with their keys do not count. %s", ", ".join(single), _NO_SPREAD)


def refuse_silence(
    fusion: JointFusion | SeparateFusion, called: Collection[str], seen: Sequence[TracedCall]
) -> NoReturn:
    """Say which fusion attentions a forward did not call, and which calls it made.

    Raises:
        ValueError: always.
    """
    silent = [attention.name for attention in fusion.watched if attention.name not in called]
    raise ValueError(
        f"Expected attention calls inside {', '.join(silent)}, but none was seen in a forward of the target. "
        f"Seen elsewhere: {'; '.join(dict.fromkeys(map(str, seen))) or 'none'}."
    )


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
