"""Configs from strangers: nothing that they name is imported or run, and each refusal is one short line."""

import functools
import pickle
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from lightning_abpem.bench.command import run_benchmark
from lightning_abpem.cli import main
from lightning_abpem.cli.fitting import fit
from tests.toybench import ToyBench

EVIL = "from pathlib import Path\nPath('IMPORTED').touch()\ndef run(*args, **kwargs): Path('RAN').touch()\n"
CLASS = "{class_path: evil.run, init_args: {command: x}}"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class Odd(ToyBench):
    """A benchmark with arguments that may be code."""

    def __init__(self, hook: Callable[..., Any] | None = None, kind: type = int, any_of: Any = 1, bare=None) -> None:
        super().__init__()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module that tells when it is imported, and when its function runs."""
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "nested.yaml").write_text(CLASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    assert not (tmp_path / "IMPORTED").exists()
    assert not (tmp_path / "RAN").exists()
    assert "evil" not in sys.modules
    assert not (tmp_path / "out").exists()


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert len(error) < 600
    return error


def options(words):
    return f"variants:\n  x:\n    method: abpem\n    options: {words}\n"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (options(f"{{optimizer: {CLASS}}}"), "`variants.x`: .*`options.optimizer.class_path` .*got 'evil.run'"),
        (options("{optimizer: evil.run}"), "Expected `optimizer` to be None or a function .*, but got 'evil.run'"),
        (options("{optimizer: {class_path: torch.optim.Evil}}"), "but got 'torch.optim.Evil'"),
        (options("{optimizer: {class_path: torch.optim.lr_scheduler.StepLR}}"), "but got 'torch.optim.lr_scheduler"),
        (options("{optimizer: {class_path: torch.optim.Optimizer}}"), "but got 'torch.optim.Optimizer'"),
        (options("{optimizer: {class_path: Adam}}"), "but got 'Adam'"),
        (options("{optimizer: {class_path: [evil.run]}}"), r"but got \['evil.run'\]"),
        (
            options(f"{{optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: {CLASS}}}}}}}"),
            "`options.optimizer.init_args` to fit torch.optim.Adam, but got .*evil.run",
        ),
        (options(f"{{k: {CLASS}}}"), "`variants.x`: .* got 'evil.run' in `options.k.class_path`"),
        (options(f"{{modalities: {{audio: [3, {CLASS}]}}}}"), "'evil.run' in `options.modalities.audio.1.class_path`"),
        (options("{logits: evil.run}"), "`options.logits` to be a function, .* but got 'evil.run'"),
        (options("{scheduler: {class_path: evil.run}}"), r"but got \['scheduler'\]"),
        ("variants:\n  x: {method: evil.run}\n", "Expected `method` to be one of .* got 'evil.run'"),
        (f"variants:\n  x: {{method: {CLASS}}}\n", "Expected variant 'x' to have .*evil.run"),
        (f"variants:\n  x: {CLASS}\n", "Expected variant 'x' to have .*evil.run"),
        (f"variants: {CLASS}\n", "Expected variant 'class_path' to have .*'evil.run'"),
        ("variants: nested.yaml\n", "Expected `variants` to map labels .* 'nested.yaml'"),
        (f"methods: {CLASS}\n", "Expected `methods` of c.yaml to be .*evil.run"),
        (f"samples: {CLASS}\n", "Expected `samples` of c.yaml to be int, but got .*evil.run"),
        ("methods: [evil.run]\n", "Expected `methods` to be among .* got evil.run"),
        (f"{CLASS}\n", "Expected options of `--options` in c.yaml, but got class_path, init_args"),
        ("config: nested.yaml\n", "Expected options of .* got config"),
        ("console: evil.run\n", "Expected options of .* got console"),
        ("methods: !!python/object/apply:evil.run []\n", "without tags .*python/object/apply:evil.run' in line 1"),
        ("methods: !!python/name:evil.run ''\n", "without tags"),
        ("methods: !evil x\n", "without tags in c.yaml, but got '!evil' in line 1"),
        (f"{LAUGHS}methods: *i\n", r"without aliases in c.yaml, but got \*a in line 2"),
        ("samples: &a [*a]\n", r"without aliases in c.yaml, but got \*a in line 1"),
        ("methods: " + "[" * 1_000_000, "nested 32 deep, but got more in line 1"),
        ("methods: " + "{a: " * 100_000, "nested 32 deep, but got more in line 1"),
        ("- " * 100_000, "nested 32 deep, but got more in line 1"),
        (f"methods: [{'x,' * 30_000}]", "at most 20000 values"),
        (f"methods: '{'x' * (1 << 20)}'", "at most 1048576 bytes"),
        ("methods: [\n", "c.yaml is not YAML"),
        ("1: 2\n", "Expected names to be strings, but got 1 in `.` of c.yaml"),
        ("variants: {x: {2: 3}}\n", "Expected names to be strings, but got 2 in `variants.x` of c.yaml"),
        ("[a, b]\n", "Expected c.yaml to map options to values"),
        ("samples: " + "9" * 5000, "c.yaml"),
        ("samples: 0x" + "f" * 9000, "`samples` of c.yaml to be a number of at most 63 bits, but got 36000"),
        ("samples: 1e400\n", "Expected `samples` of c.yaml to be int, but got inf"),
        ("samples: true\n", "Expected `samples` of c.yaml to be int, but got True"),
        ("seeds: [1, x]\n", "Expected `seeds` of c.yaml"),
    ],
)
def test_a_config_of_bench_runs_nothing(folder, capsys, config, words):
    (folder / "c.yaml").write_text(config)
    error = refused(capsys, "bench", "tests.toybench.ToyBench", "--config", "c.yaml", "--out=out", "--workers=1")
    assert re.search(words, error), error


@pytest.mark.parametrize("name", ["hook", "kind", "any_of", "bare"])
@pytest.mark.parametrize("value", ["evil.run", CLASS, "nested.yaml", f"'{CLASS}'"])
def test_arguments_that_may_be_code_come_from_no_file(folder, capsys, name, value):
    (folder / "c.yaml").write_text(f"{name}: {value}\n")
    error = refused(capsys, "bench", "tests.cli.test_untrusted.Odd", "--config", "c.yaml", "--out", "out")
    assert f"Expected `{name}` of c.yaml" in error
    assert "evil.run" in error or "nested.yaml" in error


def test_variants_of_the_command_line_run_nothing(folder, capsys):
    for words in (f"{{x: {{method: abpem, options: {{optimizer: {CLASS}}}}}}}", f"{{x: {CLASS}}}", "[" * 100_000):
        refused(capsys, "bench", "tests.toybench.ToyBench", "--out", "out", "--variants", words)


def test_the_command_line_goes_over_a_config(tmp_path, monkeypatch):
    """Wherever `--config` stands; and a later file over an earlier one."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr("lightning_abpem.cli.bench.run_benchmark", signed(seen))
    (tmp_path / "a.yaml").write_text(
        "samples: 3\nseeds: [1, 2]\nmethods: source\nout: a/b\nvariants: {x: {method: tent}}\n"
    )
    (tmp_path / "b.yaml").write_text("methods: [read]\nfail_at: 7\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    main(["bench", "tests.toybench.ToyBench", "--samples", "4", "--config", a, f"--config={b}", "--fail-at=5"])
    assert seen.pop("arguments") == {"samples": 4, "fail_at": 5}
    assert seen["methods"] == ["read"]
    assert (seen["seeds"], seen["out"], seen["severity"]) == ([1, 2], Path("a/b"), 5)
    assert seen["variants"] == {"x": {"method": "tent"}}


def signed(seen):
    """A function with the signature of `run_benchmark`, which keeps what it gets."""

    @functools.wraps(run_benchmark)
    def keep(benchmark, arguments, **given):
        seen.update(given, arguments=arguments)

    return keep


MODEL = """
    from typing import Any, Callable
    from lightning.pytorch import LightningDataModule
    from tests.cli.test_cli import MINE
    exec(__import__("textwrap").dedent(MINE))

    class Loose(Model):
        def __init__(self, depth: int = 1, name: str = "", hook: Callable = print, part: Any = None, other=None):
            super().__init__(depth=depth)
"""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            "model: {class_path: evil.run}\n",
            "`model.class_path` of c.yaml .* got 'evil.run'. Add --trust-config",
        ),
        ("model: evil.run\n", "Expected `model` of c.yaml .* got 'evil.run'"),
        ("model: Loose\n", "Expected `model` of c.yaml .* got 'Loose'"),
        ("model: nested.yaml\n", "Expected `model` of c.yaml .* got 'nested.yaml'"),
        ("model: nested\n", "Expected `model` of c.yaml .* got 'nested'"),
        (f"model: {{part: {CLASS}}}\n", "Expected `model.part.class_path` of c.yaml .* got 'evil.run'"),
        ("model: {part: {class_path: Loose}}\n", "Expected `model.part.class_path` of c.yaml .* got 'Loose'"),
        ("model: {hook: evil.run}\n", "Expected `model.hook` of c.yaml .* got 'evil.run'"),
        (f"model: {{other: '{CLASS}'}}\n", "Expected `model.other` of c.yaml .* evil.run"),
        ('model: {other: "{class_path: \\"evil\\\\x2erun\\"}"}\n', "Expected `model.other` of c.yaml"),
        ("model: {other: nested}\n", "Expected `model.other` of c.yaml .* got 'nested'"),
        ("model: {other: [[nested]]}\n", "Expected `model.other.0.0` of c.yaml .* got 'nested'"),
        ("model: !!python/object/apply:evil.run []\n", "without tags"),
        (f"{LAUGHS}model: *i\n", "without aliases"),
        ("model: " + "[" * 100_000, "nested 32 deep"),
    ],
)
def test_a_config_of_inspect_runs_nothing(folder, capsys, config, words):
    (folder / "trusting.py").write_text(textwrap.dedent(MODEL))
    (folder / "nested").write_text(CLASS)
    (folder / "c.yaml").write_text(config)
    error = refused(capsys, "inspect", "trusting.Loose", "--data", "trusting.Data", "--config", "c.yaml")
    assert re.search(words, error), error
    sys.modules.pop("trusting", None)


def test_plain_values_need_no_trust(folder, capsys):
    (folder / "trusting.py").write_text(textwrap.dedent(MODEL))
    (folder / "c.yaml").write_text("model: {depth: 2, name: some words-1}\ndata: {size: 2}\n")
    main(["inspect", "trusting.Loose", "--data", "trusting.Data", "--config", "c.yaml"])
    assert "fusion.1.attn" in capsys.readouterr().out
    sys.modules.pop("trusting", None)


def test_a_trusted_config_that_is_too_deep(folder, capsys):
    (folder / "c.yaml").write_text("model: " + "[" * 2_000)
    assert "less depth" in refused(capsys, "inspect", "--config", "c.yaml", "--trust-config")


class Evil:
    """A pickle of it runs the module's function."""

    def __reduce__(self):
        return exec, (EVIL + "run()",)


@pytest.mark.parametrize("kind", ["zip", "pickle", "old", "text", "empty", "cut", "archive"])
def test_a_batch_from_a_stranger_runs_nothing(folder, capsys, kind):
    path = folder / "batch.pt"
    if kind in ("zip", "old"):
        torch.save((torch.zeros(2), Evil()), path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "archive":
        torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    elif kind == "cut":
        torch.save((torch.zeros(2000),), path)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        path.write_bytes({"pickle": pickle.dumps(Evil()), "text": b"text", "empty": b""}[kind])
    (folder / "trusting.py").write_text(textwrap.dedent(MODEL))
    error = refused(capsys, "inspect", "trusting.Loose", "--batch", "batch.pt")
    assert "Expected batch.pt to be one batch saved by torch.save" in error
    sys.modules.pop("trusting", None)


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int | str, 3),
        (3, float, 3.0),
        ("a/b", Path | None, Path("a/b")),
        (None, Path | None, None),
        ([1, 2], Sequence[int], [1, 2]),
        ([1, "x"], tuple[int, str], (1, "x")),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ({"a": [1.5]}, Mapping[str, list[float]], {"a": [1.5]}),
        ("dev", Literal["test", "dev"], "dev"),
        ("RED", Colour, Colour.RED),
        ("1,2", int | str | Sequence[int], "1,2"),
    ],
)
def test_values_are_fitted(value, hint, expected):
    found = fit(value, hint, "`x`")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1.0, int),
        ("x", int),
        (1, str),
        ("x", Literal["y"]),
        (1, Literal[True]),
        ([1], tuple[int, int]),
        ("BLUE", Colour),
        ({"a": 1}, Mapping[str, str]),
        ([], Colour),
        (1, list),
        ({}, dict),
        (1, Any),
        (1, list[Any]),
        (1, Callable[[int], int]),
    ],
)
def test_values_that_do_not_fit(value, hint):
    with pytest.raises(ValueError, match="Expected `x` "):
        fit(value, hint, "`x`")


def test_the_projects_own_configs_are_taken():
    from lightning_abpem.bench.digits import DigitsAVC
    from lightning_abpem.cli.bench import _read_options

    paths = sorted((Path(__file__).parents[2] / "benchmarks" / "experiments").glob("*.yaml"))
    assert len(paths) > 5
    for path in paths:
        assert _read_options(path, DigitsAVC) == yaml.safe_load(path.read_text())


def test_a_file_of_the_working_directory_stands_in_for_no_library(tmp_path, monkeypatch):
    """While a package of the directory itself can be imported."""
    (tmp_path / "colorsys.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "of_the_project.py").write_text("import colorsys\nWHERE = colorsys.__file__\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    for name in ("colorsys", "of_the_project"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "of_the_project.WHERE", "--batch", "none.pt"])
    assert ended.value.code == 2  # for that is no LightningModule
    assert not sys.modules.pop("of_the_project").WHERE.startswith(str(tmp_path))
