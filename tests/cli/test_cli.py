"""The command line, in a directory of a user's."""

import inspect
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_abpem import __version__
from lightning_abpem.bench.command import run_benchmark
from lightning_abpem.cli import main

MINE = """
    import torch
    from lightning.pytorch import LightningDataModule, LightningModule
    from torch.utils.data import DataLoader
    from tests.toy import Toy, batches

    class Model(Toy):
        def __init__(self, depth: int = 1):
            super().__init__(depth=depth)

    class Inside(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Toy()

        def test_step(self, batch, batch_idx):
            return self.net(*batch[:2])

    class Probabilities(Toy):
        def forward(self, audio, video):
            return super().forward(audio, video).softmax(-1)

    class Data(LightningDataModule):
        def __init__(self, size: int = 4, count: int = 2):
            super().__init__()
            self.size, self.count = size, count

        def test_dataloader(self):
            labels = torch.zeros(self.size, dtype=torch.long)
            return DataLoader([(*b, labels) for b in batches(self.count, self.size)], batch_size=None)
"""
LINE = 'ABPEM(fusion="fusion.*.attn", modalities={"audio": 6, "video": 4})'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "own.yaml").write_text("model: {depth: 2}\ndata: {size: 2}\n")
    (tmp_path / "paths.yaml").write_text(
        "seed_everything: 1\n"
        "trainer: {max_epochs: 3, logger: {class_path: no.such.Logger}}\n"
        "model: {class_path: mine.Model, init_args: {depth: 3}}\n"
        "data: {class_path: mine.Data}\n"
    )
    (tmp_path / "test.yaml").write_text("test:\n  model: {depth: 2}\n  data: {size: 2}\n")
    (tmp_path / "trainer.yaml").write_text("trainer: {max_epochs: 3}\n")
    (tmp_path / "broken.yaml").write_text("model: [\n")
    torch.save((torch.randn(4, 6, 3), torch.randn(4, 4, 3), torch.zeros(4).long()), tmp_path / "batch.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ("mine.Model --data mine.Data", 1),
        ("mine.Model --data mine.Data --model.depth 2 --data.size=3", 2),
        ("--config paths.yaml --trust-config", 3),
        ("mine.Model --data mine.Data --config own.yaml", 2),
        ("mine.Model --data mine.Data --config test.yaml", 2),
        ("mine.Model --batch batch.pt --config own.yaml", 2),
        ("mine.Model --batch batch.pt --stage predict", 1),
    ],
)
def test_inspect(folder, capsys, arguments, layers):
    main(["inspect", *arguments.split()])
    shown = capsys.readouterr().out
    assert LINE in shown
    assert shown.count("fusion.0.attn") >= 1
    assert f"fusion.{layers - 1}.attn" in shown
    assert f"fusion.{layers}.attn" not in shown


@pytest.mark.parametrize("command", ["inspect", "tune"])
def test_a_config_that_is_printed_can_be_read_again(folder, capsys, command):
    words = [command, "mine.Model", "--data", "mine.Data"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--model.depth=2", "--print_config"])
    assert end.value.code == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    main(["inspect", *words[1:], "--config", "printed.yaml"])
    assert "fusion.1.attn" in capsys.readouterr().out


def test_the_module_that_the_step_calls(folder, capsys):
    main(["inspect", "mine.Inside", "--data", "mine.Data"])
    assert '    target="net",\n' in capsys.readouterr().out


def test_a_line_that_would_be_refused_is_not_printed(folder, capsys):
    main(["inspect", "mine.Probabilities", "--data", "mine.Data"])
    shown = capsys.readouterr().out
    assert "ABPEM(" not in shown
    assert "No line to paste: Expected logits, but every row" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mine.Model", "no data: give --data, or --batch, or --config"),
        ("mine.Missing --data mine.Data", "mine has no Missing"),
        ("elsewhere.Model --data mine.Data", "No module named 'elsewhere'"),
        ("Model --data mine.Data", "an import path such as my_package.MyModel, but got 'Model'"),
        ("./mine.Model --data mine.Data", "an import path such as my_package.MyModel, but got './mine.Model'"),
        ("mine.Data --data mine.Data", "mine.Data to be a LightningModule"),
        ("mine.Model --data mine.Data --model.dept 2", "unrecognized arguments: --model.dept"),
        ("mine.Model --data mine.Data --model.depth two", "two"),
        ("mine.Model --data mine.Data --stage predict", "`predict_dataloader` must be implemented"),
        ("mine.Model --data mine.Data --data.count 0", "the test loader gave no batch"),
        ("mine.Model --data mine.Data --config missing.yaml", "missing.yaml"),
        ("mine.Model --data mine.Data --config broken.yaml", "broken.yaml is not YAML"),
        ("mine.Model --data mine.Data --config trainer.yaml", "none of the sections ('model', 'data')"),
        ("mine.Model --batch missing.pt", "missing.pt"),
    ],
)
def test_bad_arguments(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "abpem inspect:" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data mine.Data --data.count 3", ["First 3 batches, 12 samples", "source", "0.0001", "0.01", "hits"]),
        ("--data mine.Data --rates 1e-3,0.5 --anchors 0,0.1", ["0.5, anchor 0.1", "harm"]),
        ("--data mine.Data --batches 1 --labels 2", ["First 1 batches, 4 samples", "accuracy"]),
        ("--batch batch.pt --stage predict --config own.yaml", ["First 1 batches, 4 samples"]),
        ("--data mine.Data --callback Tent() --rates 1e-3", ["0.001"]),
    ],
)
def test_tune(folder, capsys, arguments, words):
    main(["tune", "mine.Model", *arguments.split()])
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)


def test_tune_loads_trained_weights(folder, capsys):
    """Weights of a checkpoint or a state_dict: with a head that is all 0 every entropy is ln 5."""
    from tests.toy import Toy

    model = Toy()
    torch.nn.init.zeros_(model.head[1].weight)
    torch.nn.init.zeros_(model.head[1].bias)
    for name, saved in {"weights.pt": model.state_dict(), "model.ckpt": {"state_dict": model.state_dict()}}.items():
        torch.save(saved, folder / name)
        main(["tune", "mine.Model", "--data", "mine.Data", "--checkpoint", name, "--rates", "1e-3"])
        assert "1.609" in capsys.readouterr().out


def test_tune_takes_the_target_that_inspect_finds(folder, capsys):
    main(["tune", "mine.Inside", "--data", "mine.Data", "--rates", "1e-3"])
    assert "First 2 batches, 8 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing.Model", "Expected nothing.Model to be importable, but: No module named 'nothing'"),
        ("mine.Model --data nothing.Data", "Expected nothing.Data to be importable"),
        ("mine.Model", "no data: give --data, or --batch"),
        ("mine.Model --data mine.Data --rates fast", "Expected `--rates` to be numbers with commas, but got 'fast'"),
        ("mine.Model --data mine.Data --rates -1", "or 2 to 8 different ones, but got -1.0"),
        ("mine.Model --data mine.Data --batches 0", "Expected `batches` to be an integer >= 1"),
        ("mine.Model --data mine.Data --data.count 0", "the test loader gave no batch"),
        ("mine.Model --data mine.Data --labels 7", "Expected `--labels` to be in a batch, but '7' is in no"),
        ("mine.Model --data mine.Data --callback READ(", "Expected `--callback` to call one of ABPEM, EATA"),
        ("mine.Model --data mine.Data --callback print()", "ABPEM(\"fusion.*.attn\"), but got 'print()'"),
        ("mine.Model --data mine.Data --callback Tent(speed=1)", "but got `speed` (1)"),
        ("mine.Model --data mine.Data --callback READ('no')", "No candidate could adapt: Expected `fusion` to match"),
        ("mine.Model --data mine.Data --checkpoint no.ckpt", "Expected no.ckpt to be a file of weights, but there is"),
        ("mine.Model --data mine.Data --checkpoint own.yaml", "Expected own.yaml to be a checkpoint of Lightning or"),
        ("mine.Model --data mine.Data --checkpoint batch.pt", "Expected batch.pt to hold the weights of Model, but:"),
        ("mine.Probabilities --data mine.Data", "no line was found that fits the model. No line to paste: Expected"),
    ],
)
def test_bad_arguments_of_tune(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("abpem tune: ")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_is_installed(folder):
    """With its help, in a process of its own."""
    command = [sys.executable, "-m", "lightning_abpem.cli", "inspect", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "abpem inspect --config config.yaml" in shown


COMPLETES = r"""
source {script}
COMP_WORDS=({words}) COMP_CWORD={last}
$(complete -p abpem | sed 's/.*-F \([^ ]*\).*/\1/') abpem {word} before
echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("abpem in", "inspect"),
        ("abpem bench digits-avc --prot", "--protocol"),
        ("abpem tune --sta", "--stage"),
        ("abpem corrupt --sev", "--severity"),
    ],
)
def test_a_shell_completes_commands_and_options(words, expected, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert end.value.code == 0
    (tmp_path / "abpem.bash").write_text(capsys.readouterr().out)
    asked = words.split()
    program = COMPLETES.format(script=tmp_path / "abpem.bash", words=words, last=len(asked) - 1, word=asked[-1])
    found = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert expected in found


def test_the_command_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["abpem", "inspect", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lightning_abpem.cli", run_name="__main__")
    assert stopped.value.code == 0
    assert "abpem inspect --config config.yaml" in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"abpem {__version__}\n"


def test_the_help_on_benchmarks_lists_the_options_of_a_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    options = set(inspect.signature(run_benchmark).parameters) - {"benchmark", "arguments", "console"}
    assert len(options) >= 10
    assert all(f"--{name} " in shown for name in options)
    assert "abpem bench digits-avc" in shown


def test_an_import_path_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "no.such.Model"])
    assert capsys.readouterr().err.startswith("abpem inspect: Expected no.such.Model to be importable, but: No module")


def test_without_jsonargparse(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit):
        main(["inspect", "mine.Model", "--data", "mine.Data"])
    assert "pip install 'lightning_abpem[cli]'" in capsys.readouterr().err


def test_an_error_moves_no_cursor(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "a\x1b[2J\rb"])
    assert r"a\x1b[2J\rb" in capsys.readouterr().err
