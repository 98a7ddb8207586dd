"""The house: who imports whom, the public names, the code in the README."""

import ast
import re
from pathlib import Path

import pytest

import lightning_abpem

ROOT = Path(lightning_abpem.__file__).parent
THIRD_PARTY = {
    "functional": {"torch"},
    "processes": set(),
    "stream": {"torch"},
    "objective": {"torch"},
    "masks": {"torch"},
    "projections": {"torch"},
    "calls": {"torch"},
    "multihead": {"torch"},
    "attention": {"torch"},
    "spans": {"torch"},
    "blocks": {"torch"},
    "modules": {"torch"},
    "compiled": {"torch"},
    "fusion": {"torch"},
    "distributed": {"torch"},
    "strategies": {"lightning"},
    "run": {"torch", "lightning"},
    "method": {"torch"},
    "settings": {"torch"},
    "seen": set(),
    "tracing": {"torch"},
    "tokens": {"torch"},
    "inputs": {"torch"},
    "carried": {"torch"},
    "footprints": {"torch"},
    "loss_scale": {"torch"},
    "saving": {"torch"},
    "sharded": {"torch"},
    "stepping": {"torch"},
    "late": {"torch"},
    "logits": {"torch"},
    "memory": {"torch"},
    "passes": {"torch"},
    "replay": {"torch"},
    "weights": {"torch"},
    "observing": {"torch"},
    "adaptation": {"torch"},
    "metrics": {"torch", "torchmetrics"},
    "display": {"rich"},
    "report": {"matplotlib"},
    "inspection": {"torch"},
    "methods.__init__": set(),
    "methods.abpem": {"torch", "typing_extensions"},
    "methods.unimodal": {"torch"},
    "methods.mmtta": {"torch", "typing_extensions"},
    "methods.sumi": {"torch", "typing_extensions"},
    "methods.eata": {"torch", "typing_extensions"},
    "methods.norms": {"torch"},
    "methods.read": {"torch", "typing_extensions"},
    "methods.sar": {"torch", "typing_extensions"},
    "methods.source": {"torch", "typing_extensions"},
    "methods.tent": {"torch", "typing_extensions"},
    "cli.__init__": set(),
    "cli.__main__": set(),
    "cli.main": {"lightning"},
    "cli.importing": set(),
    "cli.inspect": {"jsonargparse", "lightning", "rich", "torch", "yaml"},
    "cli.corrupt": {"rich"},
    "cli.bench": {"jsonargparse", "rich"},
    "callback": {"torch", "lightning"},
    "__init__": set(),
    "models.__init__": set(),
    "models.cavmae": {"torch", "lightning"},
    "data.__init__": set(),
    "models.digits": {"lightning", "torch", "torchmetrics"},
    "data.noises": {"numpy", "scipy"},
    "data.audio_corruptions": {"numpy", "scipy", "soundfile"},
    "data.image_weather": {"PIL", "numpy", "scipy"},
    "data.image_corruptions": {"PIL", "numpy", "scipy"},
    "data.corruptions": {"numpy"},
    "data.published_layout": set(),
    "data.frames": {"PIL", "numpy"},
    "data.corrupt_files": {"PIL", "numpy", "soundfile"},
    "data.filterbank": {"numpy"},
    "data.audio_visual": {"PIL", "lightning", "numpy", "scipy", "soundfile", "torch"},
    "data.digits": {"lightning", "numpy", "scipy", "sklearn", "soundfile", "torch"},
    "bench.__init__": set(),
    "bench.protocols": {"numpy"},
    "bench.benchmark": {"lightning", "numpy", "torch"},
    "bench.variants": {"torch"},
    "bench.settings": {"torch"},
    "bench.cells": {"lightning", "numpy", "torch"},
    "bench.runner": {"lightning", "torch"},
    "bench.results": {"scipy"},
    "bench.tables": {"rich"},
    "bench.figures": {"matplotlib", "numpy"},
    "bench.output": set(),
    "bench.command": {"rich", "torch"},
    "bench.digits_source": {"lightning"},
    "bench.digits": {"lightning", "torch"},
    "bench.kinetics": {"lightning", "torch"},
    "data.spoken_digits.__init__": set(),
    "data.spoken_digits.make": {"numpy", "scipy", "soundfile"},
}
OWN = {  # from the bottom up: each may import what stands before it
    "functional": set(),
    "processes": set(),
    "stream": {"functional"},
    "objective": {"functional", "stream"},
    "masks": set(),
    "projections": set(),
    "calls": set(),
    "multihead": {"calls", "masks"},
    "attention": {"calls", "masks", "multihead", "projections"},
    "spans": set(),
    "blocks": {"calls", "functional", "spans"},
    "modules": set(),
    "compiled": {"modules"},
    "fusion": {"calls", "blocks", "modules", "objective", "projections", "spans"},
    "distributed": {"functional", "objective"},
    "sharded": set(),
    "loss_scale": set(),
    "saving": {"distributed"},
    "strategies": set(),
    "method": {"distributed", "functional", "fusion", "objective", "projections", "sharded"},
    "settings": {"fusion", "method", "objective", "spans"},
    "seen": {"spans"},
    "tracing": {"attention", "compiled", "modules", "projections", "seen"},
    "tokens": {"calls", "fusion", "modules", "seen", "spans"},
    "inputs": {"modules"},
    "carried": set(),
    "footprints": set(),
    "late": set(),
    "logits": set(),
    "memory": {"modules", "spans"},
    "passes": {
        *("attention", "calls", "carried", "footprints", "inputs", "memory", "modules", "projections", "spans"),
    },
    "replay": {"compiled", "footprints", "late", "modules"},
    "weights": {"late", "modules", "saving", "settings", "sharded"},
    "observing": {
        *(
            "attention",
            "carried",
            "compiled",
            "distributed",
            "fusion",
            "inputs",
            "logits",
            "memory",
            "modules",
            "objective",
            "passes",
            "projections",
        ),
        *("seen", "settings", "sharded", "spans", "tokens", "tracing"),
    },
    "stepping": {
        *("distributed", "logits", "loss_scale", "memory", "method", "observing", "replay", "saving", "settings"),
        *("spans", "weights"),
    },
    "adaptation": {
        *("compiled", "fusion", "logits", "loss_scale", "memory", "method", "modules", "observing", "replay"),
        *("settings", "sharded", "stepping", "weights"),
    },
    "metrics": set(),
    "display": set(),
    "report": set(),
    "inspection": {"display", "logits", "modules", "objective", "projections", "seen", "tracing"},
    "run": {"adaptation", "distributed", "loss_scale", "metrics", "modules", "settings"},
    "callback": {"adaptation", "fusion", "method", "run", "saving", "settings", "spans", "strategies"},
    "methods.abpem": {"callback", "functional", "fusion", "method", "objective", "spans", "stream"},
    "methods.unimodal": {"method"},
    "methods.norms": {"fusion", "method"},
    "methods.source": {"callback", "functional", "fusion", "method"},
    "methods.read": {"callback", "functional", "fusion", "method"},
    "methods.tent": {"callback", "functional", "method", "methods.norms"},
    "methods.eata": {"callback", "functional", "method", "methods.norms"},
    "methods.sar": {"callback", "functional", "method", "methods.norms"},
    "methods.mmtta": {"callback", "functional", "method", "methods.norms", "methods.unimodal"},
    "methods.sumi": {"callback", "functional", "method", "methods.norms", "methods.unimodal"},
    "methods.__init__": {
        f"methods.{name}" for name in ("abpem", "eata", "mmtta", "read", "sar", "source", "sumi", "tent")
    },
    "__init__": {"adaptation", "callback", "inspection", "methods.abpem"},
    "models.__init__": {"models.cavmae"},
    "models.cavmae": set(),
    "data.__init__": set(),
    "models.digits": set(),
    "data.noises": set(),
    "data.audio_corruptions": {"data.noises"},
    "data.image_weather": set(),
    "data.image_corruptions": {"data", "data.image_weather"},
    "data.corruptions": {"data.audio_corruptions", "data.image_corruptions"},
    "data.published_layout": {"data.corruptions"},
    "data.frames": set(),
    "data.corrupt_files": {
        *("data.audio_corruptions", "data.corruptions", "data.image_corruptions", "data.image_weather"),
        *("data.frames", "data.published_layout", "processes"),
    },
    "data.filterbank": set(),
    "data.audio_visual": {
        *("data.audio_corruptions", "data.corruptions", "data.filterbank", "data.image_corruptions"),
        *("data.frames", "data.image_weather", "data.published_layout"),
    },
    "data.digits": {f"data.{n}" for n in ("audio_corruptions", "corruptions", "filterbank", "image_corruptions")},
    "bench.__init__": set(),
    "bench.protocols": {"data.corruptions"},
    "bench.benchmark": {"bench.protocols", "data.corruptions", "fusion", "spans"},
    "bench.variants": {"bench.benchmark", "callback", "data.corruptions", "method", "methods"},
    "bench.settings": {"__init__", "bench.benchmark", "bench.variants", "callback", "data.published_layout"},
    "bench.cells": {"adaptation", *(f"bench.{n}" for n in ("benchmark", "protocols", "settings", "variants"))},
    "bench.runner": {
        "data.corruptions",
        "processes",
        *(f"bench.{n}" for n in ("benchmark", "cells", "protocols", "variants")),
    },
    "bench.results": set(),
    "bench.tables": {"bench.results"},
    "bench.figures": {"bench.cells", "bench.results", "bench.tables"},
    "bench.output": {f"bench.{name}" for name in ("benchmark", "figures", "results", "settings", "tables")},
    "bench.command": {
        f"bench.{name}" for name in ("benchmark", "output", "results", "runner", "settings", "tables", "variants")
    },
    "bench.digits_source": {"data.digits", "models.digits"},
    "bench.digits": {
        *("bench.benchmark", "bench.digits_source", "bench.protocols", "models.digits"),
        *(f"data.{name}" for name in ("audio_corruptions", "corruptions", "digits", "image_corruptions")),
    },
    "bench.kinetics": {
        *("bench.benchmark", "methods.abpem", "models.cavmae"),
        *(f"data.{name}" for name in ("audio_corruptions", "audio_visual", "corruptions", "image_corruptions")),
        "data.published_layout",
    },
    "cli.importing": set(),
    "cli.inspect": {"cli.importing", "inspection"},
    "cli.corrupt": {f"data.{n}" for n in ("audio_corruptions", "corrupt_files", "corruptions", "image_corruptions")},
    "cli.bench": {"bench.benchmark", "bench.command", "cli.importing"},
    "cli.main": set(),
    "cli.__init__": {"cli.main"},
    "cli.__main__": {"cli.main"},
    "data.spoken_digits.__init__": set(),
    "data.spoken_digits.make": set(),
}
STDLIB = __import__("sys").stdlib_module_names


def modules():
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_every_module_has_its_rule():
    assert set(modules()) == set(THIRD_PARTY) == set(OWN)


def test_the_design_page_names_every_module():
    rows = [line for line in (ROOT.parent / "docs/design.md").read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    folders = {"cli", "data", "methods", "models"}
    parts = [name.split(".") for name in OWN if not name.endswith("__")]
    assert named == {first if first in folders else ".".join([first, *rest]) for first, *rest in parts}


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_import_rules(name):
    found = imports(modules()[name])
    own = {i.removeprefix("lightning_abpem.") for i in found if i.startswith("lightning_abpem.")}
    others = {i.split(".")[0] for i in found if not i.startswith("lightning_abpem")} - set(STDLIB)
    assert own <= OWN[name]
    assert others <= THIRD_PARTY[name]


def test_nothing_imports_in_circles():
    for position, name in enumerate(OWN):
        before = {*list(OWN)[:position], "methods", "data"}
        assert OWN[name] <= before or name.endswith("__init__")


def test_public_names_are_frozen():
    assert sorted(lightning_abpem.__all__) == [
        *("ABPEM", "Adaptation", "Inspection", "TestTimeAdaptation", "__version__", "inspect")
    ]
    from lightning_abpem import models

    assert models.__all__ == ["CAVMAE"]
    from lightning_abpem import methods

    assert methods.__all__ == ["ABPEM", "EATA", "MMTTA", "READ", "SAR", "Source", "SuMi", "Tent"]


@pytest.mark.parametrize("name", [n for n in THIRD_PARTY if not n.endswith("__") and "make" not in n])
def test_modules_say_what_is_public(name):
    tree = ast.parse(modules()[name].read_text())
    targets = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    targets |= {ast.unparse(n.target): n.value for n in tree.body if isinstance(n, ast.AnnAssign)}
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert set(ast.literal_eval(targets["__all__"])) <= defined | set(targets)


def test_the_readme_runs():
    readme = (ROOT.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["results"][0]["abpem/updated"] == 1
