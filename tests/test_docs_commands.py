"""The commands and the lines of the callback in the docs: each is run, or held against what the command takes."""

import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.cli import main
from tests.bench.runs import lines
from tests.ranks import WORLD, free_port
from tests.test_docs import DOCS, blocks, text
from tests.toy import listed
from tests.trainer.test_several_processes import compare_sampled, finish, start

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
    own = {"model": Model(), "stream": stream, "data": listed(stream)}
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


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_a_command_has_options_that_exist(page, command, capsys):
    words = shlex.split(command, comments=True)
    used = {word for word in words if re.match(r"--?[a-z]", word) and not re.match(r"--(model|data)\.", word)}
    known = {option.replace("_", "-") for option in options_of(words, capsys)}
    assert {option.replace("_", "-") for option in used} <= known


def test_no_page_hides_commands_in_blocks_of_another_kind():
    for page in PAGES:
        others = re.findall(r"```(?!console)\w*\n(.*?)```", text(page), flags=re.DOTALL)
        assert not [block for block in others if re.match(r"(\$ )?abpem [a-z]", block)], page


@pytest.mark.parametrize(("number", "methods"), [(0, {"source", "abpem", "gentle"}), (1, {"momentum"})])
def test_the_configs_of_the_benchmarks_page(number, methods, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(blocks("benchmark.md", "yaml")[number])
    rest = ["--sources=one", "--seeds=1", "--workers=1", f"--out={tmp_path / 'out'}"]
    if number:  # it has variants alone
        rest += ["--methods", *methods]
    main(["bench", "tests.toybench.ToyBench", "--config", str(config), *rest])
    assert {line["method"] for line in lines(tmp_path / "out")} == methods


def test_no_page_has_a_block_that_no_test_reads():
    """Blocks of settings and of shell stand on pages whose tests read them."""
    kinds = {(page, kind) for page in PAGES for kind in re.findall(r"^```(yaml|bash|sh)\b", text(page), re.MULTILINE)}
    assert kinds == {("benchmark.md", "yaml"), ("lightning-cli.md", "yaml"), ("distributed.md", "bash")}


@pytest.fixture
def on_nodes(tmp_path):
    """The blocks of the page on several nodes, in each of which one process stands for eight; and their `test.py`."""
    here = Path(__file__).parent.parent
    call = f"Program(Path({str(tmp_path)!r}), strategy='ddp', devices=1, nodes={WORLD}).sampled()"
    program = (
        f"import sys; sys.path.insert(0, {str(here)!r})\nfrom tests.trainer_program import Path, Program\n{call}\n"
    )
    (tmp_path / "test.py").write_text(program)
    shown = blocks("distributed.md", "bash")
    assert [block.count("=8") + block.count("-node 8") for block in shown] == [1, 2]
    return [
        block.replace("=8", "=1").replace("-node 8", "-node 1").replace(" test.py", f" {tmp_path / 'test.py'}")
        for block in shown
    ]


def path_with(folder):
    """The folders in which programs are found: this one, that of this Python, and those of before."""
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.slow
def test_two_nodes_by_hand(on_nodes, tmp_path):
    command = on_nodes[0].replace("29500", str(free_port()))
    shown = [command.replace("$RANK", str(rank)).replace("$HOST", "127.0.0.1") for rank in range(WORLD)]
    nodes = [start(["bash", "-ec", f"exec {own}"], PATH=path_with(tmp_path)) for own in shown]
    for output, code in [finish(node) for node in nodes]:
        assert code == 0, output
    compare_sampled(tmp_path, tmp_path)


_SRUN = """#!/bin/bash
# Starts a task on each node, with the variables that Slurm gives it.
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""


@pytest.mark.slow
def test_two_nodes_by_slurm(on_nodes, tmp_path):
    """With a stand-in for `srun`, and the variables that `sbatch` makes of the block's options."""
    script, srun = on_nodes[1], tmp_path / "srun"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", script, re.MULTILINE))
    assert asked == {"nodes": str(WORLD), "ntasks-per-node": "1", "gpus-per-node": "1"}
    srun.write_text(_SRUN)
    srun.chmod(0o755)
    env = {"NNODES": asked["nodes"], "NTASKS_PER_NODE": asked["ntasks-per-node"], "NTASKS": str(WORLD), "JOB_ID": "1"}
    env = {f"SLURM_{name}": value for name, value in {**env, "JOB_NAME": "test", "NODELIST": "127.0.0.1"}.items()}
    job = start(["bash", "-c", script], PATH=path_with(tmp_path), MASTER_PORT=str(free_port()), **env)
    output, code = finish(job)
    assert code == 0, output
    compare_sampled(tmp_path, tmp_path)
