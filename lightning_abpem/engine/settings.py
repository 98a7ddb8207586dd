"""The settings of an adaptation: a method, the fusion that it watches, and the options; validated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_abpem.attention.fusion import FusionPatterns, fusion_patterns
from lightning_abpem.attention.spans import Modalities, TokenMask, Tokens, own_spans, token_spans
from lightning_abpem.attention.statistics import Pair
from lightning_abpem.engine.checks import check_integer, check_name, listed_names, shown
from lightning_abpem.engine.limits import Limits
from lightning_abpem.engine.method import Method
from lightning_abpem.engine.options import EngineOptions

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings(EngineOptions):
    """A method, its fusion and the options of an `Adaptation`; `ABPEM` documents `fusion`, `modalities` and the memory.

    Raises:
        ValueError: naming the option, the value seen and what was expected.
    """

    method: Method
    fusion: FusionPatterns | None = None
    modalities: Modalities | Sequence[str] = "auto"
    memory_batches: int = 1
    memory_at: str | None = None
    limits: Limits = field(init=False)
    patterns: list[str] | dict[Pair, list[str]] | None = field(init=False)
    spans: dict[str, Tokens | TokenMask] | None = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or not isinstance(getattr(self.method, "name", None), str):
            raise ValueError(
                f"Expected `method` to be an instance of a Method with a `name`, but got {shown(self.method)}."
            )
        super().__post_init__()
        check_integer("memory_batches", self.memory_batches, 1)
        check_name("memory_at", self.memory_at, "the name of a module")
        if self.predicts is None:
            object.__setattr__(self, "predicts", self.method.predicts)
        self._check_together()
        object.__setattr__(self, "limits", Limits(self.clip_gradients, self.anchor, self.max_step, self.max_drift))
        self._read_modalities()

    def _check_together(self) -> None:
        if self.memory_batches > 1 and self.reset == "batch":
            raise ValueError(
                'Expected `memory_batches` to be 1 with reset="batch", which empties the memory before every batch, '
                f"but got {self.memory_batches}."
            )
        for name in ("steps", "memory_batches"):
            if self.predicts == "before" and getattr(self, name) > 1:
                raise ValueError(f'Expected `{name}` to be 1 with predicts="before", but got {getattr(self, name)}.')
        if self.fusion is None and (self.method.needs_attention or self.memory_batches > 1):
            raise ValueError(f"Expected `fusion` to name the attention that {self.method.name} watches, but got None.")
        if self.memory_batches > 1 and not self.method.needs_attention:
            raise ValueError(f"Expected `memory_batches` to be 1: {self.method.name} has no memory.")

    def _read_modalities(self) -> None:
        """Set `patterns`, and `spans`: None where the first batch has to show them."""
        given = self.modalities
        if self.fusion is None:
            object.__setattr__(self, "patterns", None)
            object.__setattr__(self, "spans", None)
            return
        names = [] if given == "auto" else listed_names(list(given) if isinstance(given, Mapping) else given)
        if names is None or (isinstance(given, str) and given != "auto"):
            raise ValueError(f'Expected `modalities` to map names to tokens, or "auto", but got {shown(given)}.')
        self._check_patterns()
        patterns = fusion_patterns(self.fusion, names)
        spans: dict[str, Tokens | TokenMask] | None = None
        if isinstance(patterns, dict):
            names = list(dict.fromkeys(name for pair in patterns for name in pair))
            own = own_spans(given) if isinstance(given, Mapping) else dict.fromkeys(names, Tokens(slice(None)))
            if missing := [name for name in names if name not in own]:
                raise ValueError(
                    f"Expected `modalities` to hold {missing}, which `fusion` names, but got {shown(given)}."
                )
            spans = {name: own[name] for name in names}
        elif isinstance(given, Mapping):
            spans = token_spans(given)
        elif given != "auto":
            raise ValueError(
                f"Expected `modalities` to say how many tokens of the joint sequence each has, but got {shown(given)}. "
                'With "auto" the first batch shows it, where the encoders\' outputs are concatenated.'
            )
        object.__setattr__(self, "patterns", patterns)
        object.__setattr__(self, "spans", spans)

    def _check_patterns(self) -> None:
        given = self.fusion
        for patterns in given.values() if isinstance(given, Mapping) else (given,):
            if not listed_names(patterns):
                raise ValueError(
                    "Expected `fusion` to be a name pattern or several, or a mapping to them from pairs of modalities, "
                    f"but got {shown(given)}."
                )
