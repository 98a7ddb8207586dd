"""The options that all methods share: the engine's, and those of a Trainer's run. Constructors repeat names and types.

A test holds every constructor, the table of the docs and what parsers show against the two dataclasses. The types that
constructors need are all to be had here, as `options.Reset`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from lightning_abpem.attention.fusion import FusionPatterns as FusionPatterns
from lightning_abpem.attention.projections import Projections as Projections
from lightning_abpem.attention.spans import Modalities as Modalities
from lightning_abpem.engine.checks import check_choice, listed_names, shown
from lightning_abpem.engine.faults import OnError as OnError
from lightning_abpem.engine.method import Predicts as Predicts
from lightning_abpem.engine.options import EngineOptions
from lightning_abpem.engine.options import GuardAction as GuardAction
from lightning_abpem.engine.options import LearningRate as LearningRate
from lightning_abpem.engine.options import Logits as Logits
from lightning_abpem.engine.options import Monitor as Monitor
from lightning_abpem.engine.options import OptimizerFactory as OptimizerFactory
from lightning_abpem.engine.options import Reset as Reset
from lightning_abpem.engine.options import Sync as Sync

__all__ = [
    "SHARED",
    "Chosen",
    "Page",
    "RunOptions",
    "Stage",
    "Verbose",
    "argument_words",
    "constructor_signature",
    "documented",
    "refuse_unknown",
    "shared",
]

Stage = Literal["test", "predict", "validate"]
Verbose = Literal[0, 1, 2]
Chosen = Literal["headline", "all"] | Sequence[str]
Page = str | Path

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a Trainer's run: the stages that adapt, and their figures.

    Args:
        stages: the Trainer's functions that adapt: "test", "predict", "validate". Never inside `fit`.
        verbose: 0 shows nothing but warnings, 1 a few lines at the start and a table at the end of a Trainer's run. 2
            also lists every tensor that adapts. `trainer.test(verbose=False)` has no table either.
        figures: names of the figures whose averages are in Lightning's results: "headline", "all" or a list. All go to
            the loggers.
        report: the .html file that shows each run when it ends, also one that fails; the next run writes it anew. Its
            record, for `abpem report`, gets the same name with .json. Needs matplotlib (the `report` extra), and
            memory for a copy of the first batch.

    Raises:
        ValueError: naming the option, the value seen and what was expected.
    """

    stages: Sequence[Stage] = ("test", "predict")
    verbose: Verbose = 1
    figures: Chosen = "headline"
    report: Page | None = None

    def __post_init__(self) -> None:
        check_choice("verbose", self.verbose, get_args(Verbose))
        known = get_args(Stage)
        chosen = [] if isinstance(self.stages, str) or not isinstance(self.stages, Iterable) else list(self.stages)
        if not chosen or any(not isinstance(stage, str) or stage not in known for stage in chosen):
            words = ", ".join(f'"{stage}"' for stage in known)
            raise ValueError(f"Expected `stages` to hold some of {words}, but got {shown(self.stages)}.")
        object.__setattr__(self, "stages", tuple(chosen))
        names = self.figures
        if listed_names(names) is None or (isinstance(names, str) and names not in ("headline", "all")):
            raise ValueError(f'Expected `figures` to be "headline", "all" or a list of names, but got {shown(names)}.')
        if self.report is not None and not _is_page(self.report):
            raise ValueError(
                f"Expected `report` to be None or the name of an .html file, but got {shown(self.report)}."
            )


SHARED: dict[str, dataclasses.Field[Any]] = {
    field.name: field for own in (EngineOptions, RunOptions) for field in dataclasses.fields(own)
}
"""The options that every method's constructor has, by name, in the order of its signature."""


def shared(given: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that all methods share out of what a constructor was given, its `locals()`."""
    return {name: given[name] for name in SHARED}


def constructor_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class's constructor, which `__new__` would hide from `inspect.signature`."""
    own = inspect.signature(cls.__init__)  # type: ignore[misc]
    return own.replace(parameters=list(own.parameters.values())[1:])


def refuse_unknown(cls: type, given: Mapping[str, object]) -> None:
    """Raise if a class is given options by names that its constructor does not have.

    Raises:
        TypeError: with the option, the value seen and the names that there are.
    """
    known = inspect.signature(cls).parameters
    if any(own.kind is own.VAR_KEYWORD for own in known.values()):
        return
    for name in given:
        if name not in known:
            near = "".join(f" Did you mean `{other}`?" for other in get_close_matches(name, known, n=1))
            words = f"Expected options of {cls.__name__}, {', '.join(known)}"
            raise TypeError(f"{words}, but got `{name}` ({shown(given[name])}).{near}")


def argument_words(cls: type) -> dict[str, str]:
    """Return what a docstring says of each argument, in one line."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.split()) for name, words in found}


def documented(cls: _Class) -> _Class:
    """Add the shared options to a class's docstring, for `help` and for what parses configs: they stand here alone."""
    if cls.__doc__ is None:  # of python -OO
        return cls
    words = argument_words(EngineOptions) | argument_words(RunOptions)
    added = "\n".join(f"    {name}: {words[name]}" for name in SHARED)
    head, _, rest = inspect.cleandoc(cls.__doc__).partition("\n\nArgs:\n")
    own, gap, more = rest.partition("\n\n")
    cls.__doc__ = f"{head}\n\nArgs:\n{own}{own and chr(10)}{added}{gap}{more}"
    return cls


def _is_page(value: object) -> bool:
    return isinstance(value, str | Path) and Path(value).suffix.lower() in (".html", ".htm")
