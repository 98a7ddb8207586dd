"""The programs whose cost is compared predict the same; turns are dealt rightly; exchanges on paper are as by hand."""

import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.costs.lockstep import in_lockstep
from benchmarks.costs.programs import FusionAlone, by_hand, engine, published_way
from benchmarks.costs.scaling import exchange_seconds
from lightning_abpem.models import CAVMAE
from lightning_abpem.models.digits import DigitsModel

MODELS: dict[str, Any] = {
    "cavmae": (lambda: CAVMAE(20, 32, 2, 2), ((1024, 128), (3, 224, 224))),
    "digits": (DigitsModel, ((64, 32), (1, 32, 32))),
    "fusion alone": (lambda: FusionAlone(80, 16, 2), ((40, 16), (40, 16))),
}


@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_all_programs_predict_the_same(model, memory):
    make, shapes = MODELS[model]
    generator = torch.Generator().manual_seed(1)
    data: Any = [tuple(torch.randn(2, *shape, generator=generator).double() for shape in shapes) for _ in range(4)]

    def fresh():
        torch.manual_seed(0)
        return make().double().eval()

    ours = fresh()
    with torch.no_grad():
        unadapted = [ours(*batch) for batch in data]
        with engine(ours, memory).attach(ours):
            predicted = [ours(*batch) for batch in data]
    for program in (by_hand, published_way):
        for step, logits in enumerate(program(fresh(), data, memory)):
            torch.testing.assert_close(logits, predicted[step], rtol=0, atol=1e-9)
            assert (logits - unadapted[step]).abs().max() > 1e-4


def count_turns(turns, least):
    """A program whose batches take at least that long, for two operators of torch's."""
    x = torch.ones(3)
    for _ in turns:
        x.exp().neg()
        end = time.perf_counter() + least
        while time.perf_counter() < end:
            pass


def fail(turns):
    raise RuntimeError


@pytest.mark.slow
def test_turns_are_timed_per_batch_in_processes_of_their_own():
    programs = {"long": (count_turns, (0.02,)), "short": (count_turns, (0.0,))}
    measured = in_lockstep(programs, rounds=3, batches=4, warmup=2)
    assert [len(own.seconds) for own in measured.values()] == [3, 3]
    assert all(seconds >= 0.02 for seconds in measured["long"].seconds)
    assert all(own.peak > 0 for own in measured.values())
    assert [own.operations for own in measured.values()] == [2, 2]


@pytest.mark.slow
def test_a_program_that_fails_ends_the_run():
    with pytest.raises(RuntimeError, match="program 'bad' ended early, with exit code 1"):
        in_lockstep({"good": (count_turns, (0.0,)), "bad": (fail, ())}, rounds=1)


def test_exchanges_on_paper_by_hand():
    """Two GPUs, 1 GB/s, 1 ms: a header; a row of 248 bytes from the other; half of 7,087,104 bytes, twice."""
    assert exchange_seconds(2, 1, 1, 1e9, 1e-3) == pytest.approx((1e-3) + (1e-3 + 248e-9) + (2e-3 + 7087104e-9))
    assert exchange_seconds(1, 32, 4, 1e9, 1e-3) == 0
    by_memory = [exchange_seconds(512, 32, memory, 1e9, 0) for memory in (1, 2, 3)]
    assert by_memory[2] - by_memory[1] == pytest.approx(by_memory[1] - by_memory[0])


def test_commands_name_what_is_there():
    """Programs and configs of `benchmarks`, wherever docs, targets and programs name them."""
    root = Path(__file__).parents[1]
    texts = [root / "Makefile", *root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/**/*.py")]
    named = "\n".join(path.read_text() for path in texts)
    programs = set(re.findall(r"-m (benchmarks\.[\w.]*\w)", named))
    configs = set(re.findall(r"benchmarks/[\w/-]+\.yaml", named))
    assert len(programs) >= 7
    assert {name for name in programs if importlib.util.find_spec(name) is None} == set()
    made = re.findall(r"^RESULTS := (.*)$", named, re.MULTILINE)[0].split()
    assert {root / name for name in configs} == {root / f"benchmarks/experiments/{name}.yaml" for name in made}
    assert {path.stem for path in root.glob("benchmarks/**/*.yaml")} == set(made)


def test_targets_named_in_the_docs_are_in_the_makefile():
    root = Path(__file__).parents[1]
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    texts = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/**/*.py")]
    texts.remove(root / "CHANGELOG.md")  # which also names earlier targets
    named = {name for path in texts for name in re.findall(r"`make ([a-z-]+)", path.read_text())}
    assert len(named) > 5
    assert named <= targets
