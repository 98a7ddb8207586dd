"""The commands and the lines of the callback in the docs: each is run, or held against what the command takes."""

import re
import shlex
from contextlib import suppress

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_abpem import ABPEM
from lightning_abpem.cli import main
from tests.test_docs import DOCS, blocks, text

PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.name != "changelog.md")


class Fusion(nn.Module):
    """A block over 512 tokens of sound and 196 of a picture, by the names that the pages have."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.attn(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fusion, self.head = nn.Sequential(Fusion()), nn.Linear(8, 5)

    def forward(self, audio, video):
        return self.head(self.fusion(torch.cat([audio, video], dim=1)).mean(1))


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, audio, video):
        return self.model(audio, video)

    def test_step(self, batch, batch_idx):
        self(*batch)

    def predict_step(self, batch, batch_idx):
        return self(*batch)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Make the names and files that the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    stream = [(torch.randn(2, 512, 8), torch.randn(2, 196, 8)) for _ in range(2)]
    own = {"model": Model(), "stream": stream, "data": DataLoader(stream, batch_size=None)}
    return {
        **own,
        "torch": torch,
        "ABPEM": ABPEM,
        "Trainer": lambda **options: Trainer(accelerator="cpu", logger=False, **options),
    }


def test_the_page_of_options(names, capsys):
    for block in blocks("callback.md"):
        exec(block, names)
    assert names["adaptation"].updates == len(names["stream"])
    assert len(re.findall(r"^(?:tensor\()?\d\.\d+\)?$", capsys.readouterr().out, flags=re.MULTILINE)) == len(
        names["stream"]
    )


@pytest.mark.parametrize("page", ["reliability.md", "report.md"])
def test_a_page_that_shows_options_alone(page, names):
    [block] = blocks(page)
    assert isinstance(eval(block, names), ABPEM)


def test_the_page_on_saving(names, tmp_path):
    save, resume = blocks("saving.md")
    abpem = ABPEM("model.fusion.*.attn", {"audio": 512, "video": 196}, verbose=0)
    trainer = names["Trainer"](callbacks=[abpem], enable_progress_bar=False)
    trainer.test(names["model"], names["data"], verbose=False)
    exec(save, {"abpem": abpem})
    trainer.test(names["model"], names["data"], verbose=False)
    assert abpem.updates == 2 * len(names["stream"])
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    exec(resume, {"abpem": abpem, "torch": torch})
    trainer.test(names["model"], names["data"], verbose=False)
    assert abpem.updates == 3 * len(names["stream"])


def test_the_page_on_models_shows_what_inspect_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    [shown] = blocks("models.md", "console")
    command, _, output = shown.partition("\n")
    main(shlex.split(command)[2:])
    printed = [
        line.rstrip().replace("\N{NO-BREAK SPACE}", " ")
        for line in capsys.readouterr().out.splitlines()
        if line.strip()
    ]
    assert [line.rstrip() for line in output.splitlines() if line.strip()] == printed


def commands():
    """Every `abpem` command of the pages' console blocks."""
    for page in PAGES:
        for block in blocks(page, "console"):
            joined = block.replace("\\\n", " ")
            yield from ((page, line) for line in re.findall(r"^(?:\$ )?(abpem .*)$", joined, flags=re.MULTILINE))


def options_of(words, capsys):
    """The options that the help of a command shows, of `abpem bench` also those of its benchmark."""
    helps = [[words[1], "--help"]]
    if words[1] == "bench" and not words[2].startswith("-"):
        helps.append([*words[1:3], "--options"])
    shown = ""
    for one in helps:
        with suppress(SystemExit):  # by which argparse ends after its help
            main(one)
        shown += capsys.readouterr().out.partition("examples:")[0]
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_has_options_that_exist(page, command, capsys):
    words = shlex.split(command, comments=True)
    used = {word for word in words if re.match(r"--?[a-z]", word) and not re.match(r"--(model|data)\.", word)}
    known = {option.replace("_", "-") for option in options_of(words, capsys)}
    assert {option.replace("_", "-") for option in used} <= known


def test_no_page_hides_commands_in_blocks_of_another_kind():
    for page in PAGES:
        others = re.findall(r"```(?!console)\w*\n(.*?)```", text(page), flags=re.DOTALL)
        assert not [block for block in others if re.match(r"(\$ )?abpem [a-z]", block)], page
