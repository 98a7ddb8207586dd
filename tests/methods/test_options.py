"""The options of all methods: one source, from which signatures, help, the docs and errors come."""

import ast
import copy
import dataclasses
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from lightning.pytorch import Callback

from lightning_abpem import TestTimeAdaptation, methods
from lightning_abpem.cli import main
from lightning_abpem.engine.describe import options_of
from lightning_abpem.engine.options import EngineOptions
from lightning_abpem.methods import ABPEM, EATA, READ, SAR, SuMi, Tent
from lightning_abpem.methods.tent import EntropyMinimization
from lightning_abpem.trainer.options import SHARED, RunOptions

INPUTS = {"inputs": {"audio": 0, "video": 1}}
NEEDED: dict[str, dict[str, Any]] = {  # by method, the arguments without which there is no callback
    "ABPEM": {"fusion": "fusion.*.attn"},
    "READ": {"fusion": "fusion.*.attn"},
    "MMTTA": INPUTS,
    "SuMi": {**INPUTS, "encoders": {"audio": "a", "video": "v"}},
}
METHODS = {name: getattr(methods, name) for name in methods.__all__ if name != "Objective"}
CALLBACKS = {**METHODS, "TestTimeAdaptation": TestTimeAdaptation}
DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_source_code_of_each_constructor_writes_every_option_out(name):
    """As type checkers and editors read it: by names, without `**`, each with the type and default of the source."""
    tree = ast.parse(inspect.getsource(CALLBACKS[name]))
    [init] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert init.args.kwarg is None
    assert init.args.vararg is None
    written = {
        arg.arg: (ast.unparse(arg.annotation or arg).replace("options.", ""), ast.literal_eval(default or arg))
        for arg, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
        if arg.arg in SHARED
    }
    expected = {own.name: (own.type, own.default) for own in SHARED.values()}
    assert list(written) == list(expected)
    lines = ",\n".join(f"{option}: {kind} = {default!r}" for option, (kind, default) in expected.items())
    assert written == expected, f"Write the shared options as the source has them:\n{lines}"


@pytest.mark.parametrize("name", CALLBACKS)
def test_python_shows_the_signature_and_words_on_every_option(name):
    signature = inspect.signature(CALLBACKS[name])
    assert list(signature.parameters)[-len(SHARED) :] == list(SHARED)
    assert signature == inspect.signature(CALLBACKS[name].__init__).replace(
        parameters=list(inspect.signature(CALLBACKS[name].__init__).parameters.values())[1:]
    )
    for option in signature.parameters:
        assert re.search(rf"^    {option}: \w?", CALLBACKS[name].__doc__, flags=re.MULTILINE), option


def test_each_option_has_words_in_one_place_alone():
    for kind in (EngineOptions, RunOptions):
        for own in dataclasses.fields(kind):
            assert f"        {own.name}: " in str(kind.__doc__)
    for name in CALLBACKS:
        [tree] = ast.parse(inspect.getsource(CALLBACKS[name])).body
        assert isinstance(tree, ast.ClassDef)
        written = ast.get_docstring(tree) or ""
        assert not re.findall(rf"^    ({'|'.join(SHARED)}): ", written, flags=re.MULTILINE), name


def parser(kind):
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_class_arguments(kind, "callback")
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_parser_shows_every_option_with_help(name):
    shown = " ".join(parser(METHODS[name]).format_help().split())
    words = " ".join(METHODS[name].__doc__.split())
    for option in inspect.signature(METHODS[name]).parameters:
        said = words.partition(f" {option}: ")[2][:20].rpartition(" ")[0]
        assert len(said) > 5
        own = shown.replace(f" --callback.{option}+", "").rpartition(f"--callback.{option} ")[2]
        assert said in own.partition(" --callback.")[0], option


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", METHODS)
def test_a_printed_config_makes_the_same_callback(name, tmp_path, capsys):
    given = [
        f"--callback.{option}={value if isinstance(value, str) else json.dumps(value)}"
        for option, value in NEEDED.get(name, {}).items()
    ]
    with pytest.raises(SystemExit):
        parser(METHODS[name]).parse_args([*given, "--print_config"])
    config = capsys.readouterr().out
    assert list(yaml.safe_load(config)["callback"]) == list(inspect.signature(METHODS[name]).parameters)
    (tmp_path / "config.yaml").write_text(config)
    own = parser(METHODS[name])
    made = own.instantiate(own.parse_args(["--config", str(tmp_path / "config.yaml")])).callback
    expected = METHODS[name](**NEEDED.get(name, {}))
    assert options_of(made.settings) == options_of(expected.settings)
    assert (repr(made), made.stages, made.display) == (repr(expected), expected.stages, expected.display)


def defaults_of_the_docs():
    """Options and defaults of the table on the callback's page; `-` for none."""
    page = (DOCS / "callback.md").read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in page.splitlines() if row.startswith("| `")]
    return {option.strip("`"): default for option, default, _ in rows}


def in_the_docs(value):
    if value in (None, inspect.Parameter.empty):
        return "none" if value is None else "-"
    if isinstance(value, str):
        return f'`"{value}"`'
    return str(value) if isinstance(value, bool) else f"{value:g}"


def test_the_table_of_the_docs_has_every_option_and_its_default():
    parameters = inspect.signature(ABPEM).parameters
    expected = {}
    for name, own in parameters.items():
        values = own.default if isinstance(own.default, tuple) else (own.default,)
        expected[name] = ", ".join(map(in_the_docs, values))
    assert defaults_of_the_docs() == expected


@pytest.mark.parametrize("name", CALLBACKS)
def test_an_unknown_option_is_named_with_its_value_and_what_there_is(name):
    given = NEEDED.get(name, {}) if name != "TestTimeAdaptation" else {"method": EntropyMinimization()}
    with pytest.raises(TypeError) as caught:
        CALLBACKS[name](**given, learnin_rate=0.25)
    words = str(caught.value)
    assert words.startswith(f"Expected options of {name}, ")
    assert words.endswith("but got `learnin_rate` (0.25). Did you mean `learning_rate`?")
    assert all(option in words for option in SHARED)


def test_an_unknown_option_of_the_published_form():
    with pytest.raises(TypeError, match="Expected options of ABPEM, fusion, .* but got `step`"):
        ABPEM.published("fusion", "auto", "kinetics50-audio", step=2)


def test_a_subclass_takes_what_its_own_constructor_takes():
    class Mine(Tent):
        def __init__(self, own=1, **others):
            super().__init__(**others)

    assert Mine(own=2, steps=0).settings.steps == 0
    assert list(inspect.signature(Mine).parameters) == ["own", "others"]
    with pytest.raises(TypeError, match=r"Expected options of Mine|unexpected keyword argument 'nothing'"):
        Mine(nothing=1)


def test_a_callback_is_copied_and_pickled_with_its_line():
    tent = Tent(steps=0, reset="640 samples")
    for other in (copy.copy(tent), copy.deepcopy(tent), pickle.loads(pickle.dumps(tent))):
        assert repr(other) == repr(tent) == "Tent(steps=0, reset='640 samples')"
        assert other.line() == "Tent(steps=0, reset='640 samples')"


class Odd:
    def __repr__(self):
        raise RuntimeError("no words")


ODD = [
    *(None, True, False, -1, 0, 1.5, float("nan"), float("inf"), 10**30, 10**400, "", "x", b"x"),
    *([], [1], [None], ["a", 2], {}, {1: 2}, {"a": None}, {"a": {}}, set(), (1, 2), [["a"]], object(), print),
]


@pytest.mark.parametrize("name", METHODS)
def test_an_odd_value_of_any_option_is_taken_or_named(name):
    """Whatever its kind: a callback is made and can be printed, or one sentence says which option and which value."""
    taken = 0
    for option in inspect.signature(METHODS[name]).parameters:
        for value in ODD:
            try:
                made = METHODS[name](**{**NEEDED.get(name, {}), option: value})
            except ValueError as error:
                words = str(error)
                assert f"`{option}`" in words, (option, words)
                assert words.startswith("Expected "), words
                assert len(words) < 1000, words
            else:
                taken += 1
                assert type(made).__name__ in repr(made)
                assert len(repr(made)) < 1000
    assert taken > len(SHARED)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ABPEM(5), "Expected `fusion` to be a name pattern or several, .* but got 5"),  # type: ignore[arg-type]
        (lambda: READ({("a", "b"): 5}), r"Expected `fusion` to be .* but got \{\('a', 'b'\): 5\}"),  # type: ignore[arg-type]
        (lambda: EATA(fisher_batches=3), "Expected `fisher_batches` to hold, .* but got 3"),  # type: ignore[arg-type]
        (lambda: EATA(fisher_batches=[(1,), {"x": 1}]), "`fisher_batches` .* but got dict at position 1"),  # type: ignore[list-item]
        (lambda: SAR(exclude=3), "Expected `exclude` to be a start of names, or several, but got 3"),  # type: ignore[arg-type]
        (lambda: SuMi({"a": 0, "b": 1}, 3), r"Expected `encoders` for \['a', 'b'\], as in `inputs`, but got 3"),  # type: ignore[arg-type]
        (lambda: SuMi({"a": 0, "b": 1}, {"a": 0, "b": 1}), "Expected `encoders` to name modules, but got"),  # type: ignore[dict-item]
        (lambda: Tent(steps=10**30), r"Expected `steps` to be an integer in \[0, 10000\], but got 1000"),
        (lambda: Tent(steps=10**5000), r"Expected `steps` .* but got int without a repr \(ValueError\)"),
        (lambda: Tent(target=Odd()), r"Expected `target` .* but got Odd without a repr \(RuntimeError\)"),  # type: ignore[arg-type]
        (lambda: Tent(restore="no"), "Expected `restore` to be True or False, but got 'no'"),  # type: ignore[arg-type]
        (lambda: Tent(logits="logits"), "Expected `logits` to be None or a function .* but got 'logits'"),  # type: ignore[arg-type]
        (lambda: Tent(anchor=10**400), r"Expected `anchor` to be a number in \[0, 1\), but got 1000"),
        (lambda: Tent(stages=[["test"]]), r'Expected `stages` to hold some of "test", "predict", "validate", but got'),  # type: ignore[list-item]
        (lambda: Tent(guard="halt"), 'Expected `guard` to be one of "rollback", .*"off", but got \'halt\''),  # type: ignore[arg-type]
        (lambda: Tent(verbose=True), "Expected `verbose` to be one of 0, 1, 2, but got True"),  # type: ignore[arg-type]
    ],
)
def test_values_of_an_odd_kind_end_in_a_sentence(made, message):
    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tent", {"steps": 10**15}, "Expected `steps` to be an integer in [0, 10000], but got 1000000000000000"),
        ("abpem", {"fusion": 5}, "Expected `fusion` to be a name pattern or several"),
        ("abpem", {"fusion": {"a->b": [1]}}, "Expected `fusion` to be a name pattern or several"),
        ("abpem", {"modalities": 3}, "Expected `modalities` to map names to tokens"),
        ("eata", {"fisher_batches": 7}, "Expected `fisher_batches` to hold"),
        ("eata", {"fisher_batches": ["audio"]}, "Expected `fisher_batches` to hold"),
        ("sumi", {"encoders": [1, 2]}, "Expected `encoders` for ['audio', 'image']"),
        ("mmtta", {"inputs": {"audio": [0], "video": 1}}, "Expected `inputs` to say at which position"),
        ("tent", {"stepz": 1}, "Expected options of tent"),
    ],
)
def test_values_of_an_odd_kind_in_a_config_end_in_a_sentence(tmp_path, capsys, method, options, message):
    config = {"variants": {"mine": {"method": method, "options": options}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "methods": ["mine"]}))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "digits-avc", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--callback.steps=100000000000"], r"Expected `steps` to be an integer in \[0, 10000\]"),
        (["--callback.stepz=1"], "'stepz' is not accepted"),
        (["--callback.guard=halt"], "callback"),
    ],
)
def test_a_command_line_of_lightnings_names_the_option(options, message):
    own = jsonargparse.ArgumentParser(exit_on_error=False)
    own.add_argument("--callback", type=Callback)
    with pytest.raises((ValueError, jsonargparse.ArgumentError), match=message):
        own.instantiate(own.parse_args(["--callback=lightning_abpem.methods.Tent", *options]))
