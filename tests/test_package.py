"""The house: who imports whom, the public names, the shape of functions and docstrings, the code in the README."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import lightning_abpem

ROOT = Path(lightning_abpem.__file__).parent
LAYERS = [  # from the bottom up: each imports itself and what stands before it
    ("functional", "torch"),
    ("modules", "torch"),
    ("attention", "torch"),
    ("engine", "torch"),
    ("display", "rich"),
    ("report", "matplotlib"),  # files and pictures: it knows neither torch nor Lightning
    ("metrics", "torch torchmetrics"),
    ("trainer", "torch lightning torchmetrics wandb"),  # the last for runs with its logger
    ("tuning", "torch lightning"),
    ("callback", "torch lightning typing_extensions"),
    ("methods", "torch typing_extensions"),
    ("suggestion", "torch"),
    ("inspection", "torch"),
    ("__init__", ""),
    ("processes", ""),
    ("models", "torch lightning torchmetrics"),
    ("data", "torch lightning numpy scipy PIL soundfile sklearn"),
    ("bench", "torch lightning numpy scipy rich matplotlib"),
    ("demo", "torch lightning rich"),
    ("cli", "torch lightning jsonargparse rich yaml"),
]
APART = {
    "models": {"models"},
    "data": {"data", "processes", "__init__"},  # of the package itself its version alone
    "metrics": {"functional", "modules", "attention", "metrics"},
}
STDLIB = __import__("sys").stdlib_module_names
QUESTIONS = {"How", "Of", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"}
NO_SUBJECT = {"As", "At", "Be", "By", "For", "From", "If", "In", "It", "Its", "On", "Only", "That", "To", "With"}


def modules():
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


@cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def definitions(*folders):
    """Yield every module, class and function in folders of the project, each with its place."""
    for path in sorted(path for folder in folders for path in (ROOT.parent / folder).rglob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)}", node


def lines(node):
    """The number of lines that a statement has."""
    return node.end_lineno - node.lineno + 1


def imports(path):
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names


def layer(name):
    """The folder of a module, or the module itself at the package's root."""
    return name.split(".")[0]


def test_every_module_has_its_layer():
    assert {layer(name) for name in modules()} == {name for name, _ in LAYERS}
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_the_design_page_names_every_module():
    page = (ROOT.parent / "docs/design.md").read_text()
    [modules_of] = re.findall(r"\n## Modules\n(.*?)\n## ", page, flags=re.DOTALL)
    rows = [line for line in modules_of.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    whole = {"cli", "data", "demo", "methods", "models", "report"}  # which stand there as a folder
    assert named == {layer(name) if layer(name) in whole else name for name in modules() if not name.endswith("__")}


@pytest.mark.parametrize("name", modules())
def test_import_rules(name):
    layers = [own for own, _ in LAYERS]
    allowed = APART.get(layer(name), set(layers[: layers.index(layer(name)) + 1]))
    found = imports(modules()[name])
    own = {i for i in found if i.split(".")[0] == "lightning_abpem"}
    assert {"__init__" if i == "lightning_abpem" else layer(i.partition(".")[2]) for i in own} <= allowed
    assert {i.split(".")[0] for i in found - own} - set(STDLIB) <= set(dict(LAYERS)[layer(name)].split())


def test_files_of_torch_are_loaded_without_code():
    """Every call of `torch.load` and `load_from_checkpoint` in the package has weights_only=True."""
    found = []
    for path in modules().values():
        for node in nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("torch.load", ".load_from_checkpoint")):
                found.append({k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only"))
    assert len(found) >= 4
    assert set(found) == {"True"}


def test_the_wheel_has_the_files_beside_the_code():
    """Files in the package that are no Python, against the patterns of `package-data`."""
    text = (ROOT.parent / "pyproject.toml").read_text()
    [listed] = re.findall(r"^lightning_abpem = \[(.*)\]$", text, re.MULTILINE)
    patterns = re.findall(r'"([^"]+)"', listed)
    others = {path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(others) >= 4
    assert others == {path for pattern in patterns for path in ROOT.glob(pattern)}


def test_nothing_imports_in_circles():
    found = {
        name: {i.removeprefix("lightning_abpem.") for i in imports(path) if i.startswith("lightning_abpem.")}
        for name, path in modules().items()
    }
    TopologicalSorter({name: own & set(found) for name, own in found.items()}).prepare()  # raises on a circle


@pytest.mark.parametrize(
    ("folders", "words"),
    [(("lightning_abpem", "benchmarks"), QUESTIONS | NO_SUBJECT), (("tests",), QUESTIONS)],
)
def test_docstrings_begin_with_a_noun_or_a_verb(folders, words):
    docstrings = [(place, ast.get_docstring(node)) for place, node in definitions(*folders)]
    first = {place: re.split(r"\W", text)[0] for place, text in docstrings if text}
    assert len(first) > 100
    assert {place: word for place, word in first.items() if word in words} == {}


def test_functions_have_at_most_40_lines():
    """Docstrings do not count."""
    lengths = {}
    for place, node in definitions("lightning_abpem", "benchmarks"):
        if isinstance(node, ast.FunctionDef):
            words = [node.body[0]] if ast.get_docstring(node) else []
            lengths[place] = lines(node) - sum(map(lines, words))
    assert len(lengths) > 1000
    assert {place: length for place, length in lengths.items() if length > 40} == {}


def test_few_arguments_may_be_anything():
    """`Any` switches type checks off: at most one argument in ten has it, alone or as a part of its type."""
    types = []
    for _, node in definitions("lightning_abpem"):
        if isinstance(node, ast.FunctionDef):
            own = node.args
            arguments = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
            types += [ast.unparse(x.annotation) for x in arguments if x is not None and x.annotation is not None]
    assert len(types) > 2000
    assert sum("Any" in re.findall(r"\w+", own) for own in types) <= 0.1 * len(types)


def test_public_names_are_frozen():
    assert sorted(lightning_abpem.__all__) == [
        *("ABPEM", "Adaptation", "Inspection", "TestTimeAdaptation", "__version__", "inspect")
    ]
    from lightning_abpem import models

    assert models.__all__ == ["CAVMAE"]
    from lightning_abpem import methods, metrics

    assert metrics.__all__ == [
        *("AttentionDivergence", "AttentionGap", "ClassShare", "Entropy", "ExpectedCalibrationError", "FlipRate"),
        *("Information", "PrincipalEntropy"),
    ]
    assert methods.__all__ == ["ABPEM", "EATA", "MMTTA", "READ", "SAR", "Objective", "Source", "SuMi", "Tent"]


@pytest.mark.parametrize("name", [n for n in modules() if not n.endswith("__") and "make" not in n])
def test_modules_say_what_is_public(name):
    tree = ast.parse(modules()[name].read_text())
    targets = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    targets |= {ast.unparse(n.target): n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.value}
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert set(ast.literal_eval(targets["__all__"])) <= defined | set(targets)


def test_the_readme_runs():
    readme = (ROOT.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["results"][0]["abpem/test/updated"] == 1


def own_attributes(kind):
    """The names that a class sets on `self`."""
    stored = [node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def test_a_class_with_many_attributes_has_a_reason():
    classes = {node for _, node in definitions("lightning_abpem") if isinstance(node, ast.ClassDef)}
    table = (ROOT.parent / "docs" / "design.md").read_text().partition("## Classes with many attributes")[2]
    rows = [line.split("|")[1] for line in table.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == {c.name for c in classes if len(own_attributes(c)) > 10}
