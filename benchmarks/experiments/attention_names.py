"""A count of the attention classes of Hugging Face transformers whose projections are found by their names.

    python -m benchmarks.experiments.attention_names

The source text of the installed transformers is parsed; no model is imported.
An attention class is in a `modeling_*.py`, has "Attention" in its name, and makes a linear in `__init__`. A base in the
same file may make it. Classes named as a part of an attention do not count: a projection, an output, an MLP, a cell. A
class is known if its linears are known by name, or those of an attention that it makes.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from lightning_abpem.attention.projections import projection_names

__all__ = ["count", "unknown_classes"]

_LINEARS = ("Linear", "Conv1D", "Conv1d", "Conv2d")
_PARTS = ("Output", "MLP", "Cell", "Projection")


def unknown_classes(root: Path) -> tuple[dict[str, bool], list[str]]:
    """Read the attention classes below a folder.

    Returns:
        by "model.Class", True if its projections are found by their names; and the names of those that are not.
    """
    known: dict[str, bool] = {}
    for path in sorted(root.rglob("modeling_*.py")):
        known |= {f"{path.parent.name}.{name}": is_known for name, is_known in _read(path.read_text())}
    return known, [name for name, is_known in known.items() if not is_known]


def count() -> tuple[dict[str, bool], list[str]]:
    """Read the attention classes of the installed transformers, as `unknown_classes` does."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("transformers is not installed")
    return unknown_classes(Path(spec.submodule_search_locations[0]) / "models")


class _Made(dict[str, dict[str, str]]):
    """Source text of each value that a class's `__init__` assigns: by class of a file, then by attribute.

    A class is parsed when it is first looked up, since most of a file is never needed.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts = {match[1]: match[0] for match in re.finditer(r"^class (\w+)(?:.*\n)+?(?=^[\w@]|\Z)", source, re.M)}

    def __missing__(self, name: str) -> dict[str, str]:
        made: dict[str, str] = {}
        self[name] = made
        [node] = ast.parse(self.texts[name]).body
        assert isinstance(node, ast.ClassDef)
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.texts:
                made |= self[base.id]
        inits = [own for own in node.body if isinstance(own, ast.FunctionDef) and own.name == "__init__"]
        for own in (own for init in inits for own in ast.walk(init) if isinstance(own, ast.Assign)):
            if isinstance(own.targets[0], ast.Attribute):
                made[own.targets[0].attr] = ast.unparse(own.value)
        return made


def _read(source: str) -> Iterator[tuple[str, bool]]:
    """Read the attention classes of a file: each name, and True if its projections are known."""
    made = _Made(source)
    for name in [name for name in made.texts if "Attention" in name and not name.endswith(_PARTS)]:
        if any(_is_linear(call) for call in made[name].values()):
            yield name, _is_known(name, made)


def _is_linear(call: str) -> bool:
    return any(f"{kind}(" in call for kind in _LINEARS)


def _is_known(name: str, made: _Made, around: tuple[str, ...] = ()) -> bool:
    if projection_names(own for own, call in made[name].items() if _is_linear(call) or _holds_linear(call, made)):
        return True
    kinds = {kind for call in made[name].values() for kind in re.findall(r"(\w+)\(", call)}
    inside = [kind for kind in kinds & set(made.texts) if "Attention" in kind and kind not in (name, *around)]
    return "MultiheadAttention" in kinds or any(_is_known(kind, made, (*around, name)) for kind in inside)


def _holds_linear(call: str, made: _Made) -> bool:
    """Return True if `call` makes an object of a class in this file that makes a linear."""
    kind = call.partition("(")[0]
    return kind in made.texts and any(_is_linear(own) for own in made[kind].values())


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    known, unknown = count()
    print(f"{len(known)} attention classes, of which {len(unknown)} are unknown:")  # noqa: T201
    print("\n".join(unknown))  # noqa: T201


if __name__ == "__main__":
    main()
