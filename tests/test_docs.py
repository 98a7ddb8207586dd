"""The examples of the documentation, run."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

import lightning_abpem
from lightning_abpem import metrics
from lightning_abpem.bench.command import run_benchmark
from lightning_abpem.bench.variants import METHODS
from lightning_abpem.cli import main
from tests import landing
from tests.toy import listed

DOCS = Path(__file__).parent.parent / "docs"


def text(page):
    return (DOCS / page).read_text(encoding="utf-8")


EXAMPLES = {
    match[1]: match[2]
    for match in re.finditer(r"\n#+ ([^\n]+)\n(?:(?!\n#).)*?```python\n(.*?)```", text("models.md"), flags=re.DOTALL)
}


def blocks(page, language="python"):
    """The code of a page."""
    return re.findall(rf"```{language}\n(.*?)```", text(page), flags=re.DOTALL)


def test_every_family_has_one():
    families = {"ViLT", "FLAVA", "VisualBERT", "LXMERT", "BridgeTower", "torch's own transformers"}
    assert families < set(EXAMPLES)
    assert len(EXAMPLES) == 11


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:A frozen module gave another output", "ignore:.*nested tensor")
def test_example(name):
    if "from transformers" in EXAMPLES[name]:
        pytest.importorskip("transformers")
    namespace: dict[str, Any] = {}
    exec(EXAMPLES[name], namespace)
    if "model" in namespace or "trainer" in namespace:  # else it shows options alone
        assert namespace["adaptation"].updates >= 1


def test_a_method_of_ones_own():
    use, unimodal = blocks("methods.md")
    [own] = blocks("write-a-method.md")
    namespace: dict[str, Any] = {}
    exec(use, namespace)
    assert namespace["read"].settings.reset == "dataloader"
    exec(unimodal, namespace)
    assert namespace["sumi"].settings.method.total_batches == 308
    exec(own, namespace)
    assert namespace["adaptation"].updates == 1
    assert list(namespace["adaptation"].params) == ["head.bias"]


def test_metrics_in_a_module_of_ones_own(capsys):
    module, by_hand = blocks("metrics.md")
    namespace: dict[str, Any] = {}
    exec(module, namespace)
    tokens = torch.randn(6, 10, 16)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    [results] = trainer.test(namespace["Model"](), listed(tokens, batch_size=4), verbose=False)
    assert set(results) == {"entropy", "information", "gap"}
    exec(by_hand, namespace)
    assert capsys.readouterr().out.startswith("{'audio_to_video': tensor(")


def test_the_page_of_metrics_names_them_all():
    assert set(re.findall(r"^\| `(\w+)\(", text("metrics.md"), flags=re.MULTILINE)) == set(metrics.__all__)


def test_the_page_on_tuning():
    before, while_it_runs = blocks("tune.md")
    namespace: dict[str, Any] = {}
    exec(before, namespace)
    assert namespace["tuning"].batches == 4
    assert len(namespace["tuning"].rows) == 5
    exec(while_it_runs, namespace)
    assert namespace["abpem"].updates == len(namespace["batches"]) == len(namespace["predicted"])


def test_the_page_on_whether_to_adapt():
    [block] = blocks("should-i-adapt.md")
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    assert namespace["abpem"].updates == 4
    assert {"flip_rate", "information", "class_share", "drift"} <= set(namespace["figures"])


@pytest.mark.usefixtures("undrawn")
def test_a_benchmark_of_ones_own(tmp_path):
    [own] = blocks("benchmark-your-model.md")
    namespace: dict[str, Any] = {}
    exec(own, namespace)
    run_benchmark(namespace["Mine"], {}, out=tmp_path, protocol="iid,missing", seeds=1, workers=1)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + (2 + 2) * len(METHODS)


@pytest.mark.parametrize("command", ["inspect", "tune", "report", "bench", "corrupt", "demo"])
def test_the_page_of_the_command_line_has_every_option(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = set(re.findall(r"^  (?:-\w[^,\n]*, )?(--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)) - {"--help"}
    sections = dict(re.findall(r"\n## abpem (\w+)\n(.*?)(?=\n## |$)", text("command-line.md"), flags=re.DOTALL))
    inherited = sections["inspect"] if command == "tune" else ""
    rows = re.findall(r"^\| (.*?) \|", sections[command] + inherited, flags=re.MULTILINE)
    assert {option for row in rows for option in re.findall(r"--[\w-]+", row)} == shown


def test_the_page_on_lightning_cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [config], [program] = blocks("lightning-cli.md", "yaml"), blocks("lightning-cli.md")
    (tmp_path / "config.yaml").write_text(config.replace("pairs: 64", "pairs: 16"))
    [command] = blocks("lightning-cli.md", "console")
    monkeypatch.setattr("sys.argv", command.split()[2:])
    exec(program, {})
    monkeypatch.setattr("sys.argv", [*command.split()[2:], "--trainer.callbacks.init_args.fusion=nothing"])
    with pytest.raises(ValueError, match="nothing"):
        exec(program, {})


# The grammar of an option's error, whose words are elsewhere; what goes on from another text; what is no sentence.
_IN_PARTS = re.compile(r"Expected `\0` to be \0, but got \0\.$|\0(\0|, but got)|[\0 ]*.{0,8}[\0 ]*$")


def messages():
    """The errors and notices of the package: what is raised or warned of, and texts that begin as errors do."""
    package = Path(lightning_abpem.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in {"bench", "cli", "data", "demo", "models", "report"}:
            continue  # their messages name a file or an option of a command, and are read where they are typed
        said = openings(ast.parse(path.read_text(encoding="utf-8")))
        yield from ((path.name, words) for words in sorted(said) if not _IN_PARTS.match(words))


def openings(node):
    """The texts in a tree that are raised or warned of, or begin as errors do."""
    if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and opening(node).strip("\0"):
        return {opening(node)} if opening(node).startswith("Expected ") else set()
    said = set().union(*map(openings, ast.iter_child_nodes(node)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        if name.endswith(("Error", "Exception", "warn", "warning", "zero_info")):
            said |= {opening(argument) for argument in node.args}
    return said


def opening(node):
    """The words of a string, with a NUL for each value in it."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sdr]|%%", "\0", node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (opening(node.left) or "\0") + (opening(node.right) or "\0")
    return ""


def test_every_message_is_on_the_page_of_troubles():
    rows = re.findall(r"^\| (`.*?) \|", text("troubleshoot.md"), flags=re.MULTILINE)
    entries = [entry for row in rows for entry in re.findall(r"`([^`]+)`", row)]
    patterns = {entry: re.compile(r".*?".join(map(re.escape, map(str.strip, entry.split("…"))))) for entry in entries}
    said = list(messages())
    assert len(said) > 150
    missing = [(file, words) for file, words in said if not any(p.match(words) for p in patterns.values())]
    assert missing == []
    assert [entry for entry, pattern in patterns.items() if not any(pattern.match(words) for _, words in said)] == []


def test_the_landing_page_has_the_readmes_program():
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert blocks("index.md") == re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


def test_the_landing_pages_figure_is_that_of_the_table():
    drawn = landing.FIGURE.read_text(encoding="utf-8")
    assert drawn == landing.figure(text("method.md"))
    assert drawn.count("<circle") == 2 + 2 * 10


def sentences(path):
    """The sentences of a page: of its paragraphs, list items and table cells, without code; a name in code is one."""
    prose = re.sub(r"^---\n.*?\n---\n|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = re.sub(r"`[^`]+`", lambda code: f"`{code[0][1:-1].split()[0]}`", prose)
    for part in re.split(r"\n\s*\n|\n(?= *[-|#]| *\d+\. )|\|", prose):
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\[])", " ".join(part.split()))


WRITTEN = [
    *DOCS.rglob("*.md"),
    *(DOCS.parent / f"{name}.md" for name in ("README", "CONTRIBUTING", "RELEASING", "SECURITY")),
]


@pytest.mark.parametrize("path", sorted(WRITTEN), ids=lambda path: path.name)
def test_no_sentence_is_long(path):
    assert [sentence for sentence in sentences(path) if len(sentence.split()) > 31] == []


@pytest.mark.parametrize("path", sorted(WRITTEN), ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path):
    named = re.findall(r"`((?:benchmarks|lightning_abpem|tests)/[\w./-]+)(?:::\w+)?`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (DOCS.parent / name).exists()] == []
