"""The program for a GPU, without one: a dry run, going on, failures, the budget, checks that fail, targets."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.costs import gpu_checks, gpu_stress
from benchmarks.costs.gpu import Budget, Journal, Task, environment, main, plan, work_off
from benchmarks.costs.gpu_checks import CHECKS, CheckError
from benchmarks.costs.gpu_report import as_markdown, verdicts
from benchmarks.costs.gpu_rows import Machine, NeedsGPUError, Row, counted_waits
from lightning_abpem import ABPEM

MACHINE = Machine("cpu", tiny=True)
ABSENT = ("matplotlib", "scipy", "sklearn", "PIL", "soundfile", "jsonargparse", "tensorboard", "kaldi_native_fbank")
"""What may not be installed where a GPU is."""
PROGRAM = f"""
import runpy, sys
import lightning.pytorch
sys.modules.update(dict.fromkeys({ABSENT}))
runpy.run_module("benchmarks.costs.gpu", run_name="__main__")
"""
FIGURES = {"seconds": 1.0, "peak": 2**20, "waits": 0, "operations": 1}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    options = ["--device", "cpu", "--tiny", "--minutes", "60", "--out", str(folder)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_dry_run_records_everything(dry_run):
    folder, output = dry_run
    (only,) = json.loads((folder / "results.json").read_text())
    entries = only["entries"]
    assert only["environment"] == environment(MACHINE)
    assert list(entries) == [task.name for task in plan(MACHINE)]
    statuses = {name: entry["status"] for name, entry in entries.items()}
    assert {name for name, status in statuses.items() if status == "needs a GPU"} == {
        "several streams",
        "CUDA graph of a small model's step by hand",
    }
    assert set(statuses.values()) == {"done", "needs a GPU"}, statuses
    for task in plan(MACHINE):
        entry = entries[task.name]
        if task.kind == "row":
            assert entry["seconds"] > 0
            assert entry["operations"] > 50
            assert ("plain" in entry) == (task.plain is not None)
    assert f"{len(entries)} of {len(entries)} done, 0 failed, 0 left out" in output
    page = (folder / "results.md").read_text()
    assert page.count("\n| ABPEM attached |") == sum("ABPEM attached" in name for name in entries)
    assert "A dry run" in page


@pytest.mark.slow
def test_a_second_call_runs_nothing_again(dry_run):
    folder, _ = dry_run
    before = [(folder / name).read_text() for name in ("results.json", "results.md")]
    tasks = [replace(task, run=pytest.fail) for task in plan(MACHINE)]
    assert work_off(tasks, Journal(folder, environment(MACHINE)), Budget(1), pytest.fail) == []
    assert [(folder / name).read_text() for name in ("results.json", "results.md")] == before


def test_the_full_plan_begins_with_what_the_targets_need():
    tasks = plan(Machine("cpu"))
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    assert names[0] == "plain loop: cavmae, batch 32, bf16-mixed"
    checks = [i for i, task in enumerate(tasks) if task.kind == "check"]
    assert set(CHECKS) < {names[i] for i in checks}
    assert all(task.settings["batch"] == 32 for task in tasks[: checks[0]])
    for i, task in enumerate(tasks):
        assert task.plain is None or task.plain in names[:i]
    wanted = {
        (p, b, m) for p in ("bf16-mixed", "16-mixed", "float32", "float32, TF32") for b in (8, 32) for m in (1, 4)
    }
    wanted |= {(p, 64, 1) for p, _, _ in wanted}
    for program in ("ABPEM attached", "published way", "by hand"):
        rows = [task.settings for task in tasks if task.kind == "row" and task.settings["program"] == program]
        assert wanted <= {(row["precision"], row["batch"], row["memory"]) for row in rows if row["model"] == "cavmae"}
        assert program == "by hand" or 32768 in {row["tokens"] for row in rows}


# ----------------------------------------------------------------------------------------------- going on and giving up


def task(name, run=lambda: FIGURES, plain=None, guess=1.0):
    return Task(name, "row", run, guess, name, Row("by hand", "float32", 2).__dict__, plain)


def journal(folder):
    return Journal(folder, {"device": "none"})


def fail(error):
    raise error


def test_a_row_that_fails_does_not_end_the_run(tmp_path):
    tasks = [
        task("memory", lambda: fail(torch.OutOfMemoryError("out of memory\nTried to allocate"))),
        task("wrong", lambda: fail(CheckError("1 is not 2"))),
        task("none", lambda: fail(NeedsGPUError())),
        task("good"),
    ]
    own = journal(tmp_path)
    assert work_off(tasks, own, Budget(1), lambda line: None) == []
    assert [entry["status"] for entry in own.entries.values()] == ["failed", "failed", "needs a GPU", "done"]
    assert own.entries["memory"]["reason"] == "OutOfMemoryError: out of memory"
    assert "- wrong: CheckError: 1 is not 2" in (tmp_path / "results.md").read_text()
    tasks[0] = task("memory")
    work_off(tasks, journal(tmp_path), Budget(1), lambda line: None)
    assert journal(tmp_path).entries["memory"]["status"] == "failed"
    work_off(tasks, journal(tmp_path), Budget(1), lambda line: None, retry=True)
    assert journal(tmp_path).entries["memory"]["status"] == "done"


def test_what_does_not_fit_into_the_budget_is_left_out(tmp_path):
    own, now = journal(tmp_path), [0.0]
    budget = Budget(1, clock=lambda: now[0])

    def run(seconds):
        now[0] += seconds
        return FIGURES

    tasks = [
        task("first", partial(run, 45.0), guess=60),
        task("long", pytest.fail, guess=16),
        task("short", partial(run, 15.0), guess=15),
        task("last", pytest.fail),
    ]
    assert work_off(tasks, own, budget, lambda line: None) == ["long", "last"]
    page = (tmp_path / "results.md").read_text()
    assert "## Left out for want of time\n\n- long\n- last\n" in page
    own.entries["first"]["wall"] = 45.0
    assert own.expected(replace(tasks[1], alike="first")) == 45.0


def test_rows_are_held_against_plain_inference_of_the_same_call(tmp_path):
    seconds = iter((1.0, 2.0, 3.0))
    tasks = [
        task("plain", lambda: FIGURES | {"seconds": next(seconds)}),
        task("first", plain="plain"),
        task("second", plain="plain"),
    ]
    work_off(tasks[:2], journal(tmp_path), Budget(1), lambda line: None)
    work_off(tasks, journal(tmp_path), Budget(1), lambda line: None)
    work_off(tasks, journal(tmp_path), Budget(1), lambda line: None)
    entries = journal(tmp_path).entries
    assert [entries[name]["plain"]["seconds"] for name in ("first", "second")] == [1.0, 2.0]
    assert next(seconds) == 3.0


def test_results_of_another_device_stay(tmp_path):
    work_off([task("row")], journal(tmp_path), Budget(1), lambda line: None)
    work_off([task("row")], Journal(tmp_path, {"device": "other"}), Budget(1), lambda line: None)
    assert [one["environment"]["device"] for one in json.loads((tmp_path / "results.json").read_text())] == [
        "none",
        "other",
    ]


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_one_line(device, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^Expected [^\n]+\.$"):
        main(["--device", device, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------- what is found, if it is so


@pytest.mark.parametrize(
    "name",
    [
        "golden runs in float64",
        "parity, bf16-mixed",
        "narrow weights move",
        "loss scale under float16",
        "out of memory",
        "saved on the device, resumed on a CPU",
    ],
)
def test_checks_fail_where_no_weight_moves(name, monkeypatch):
    for module in ("benchmarks.costs.gpu_toy", "benchmarks.costs.gpu_stress", "tests.golden_runs"):
        monkeypatch.setattr(f"{module}.ABPEM", partial(ABPEM, steps=0))
    with pytest.raises(CheckError):
        CHECKS[name](MACHINE)


@pytest.mark.parametrize("name", ["replay on and off", "an LSTM behind the fusion", "a process group of one"])
def test_checks_fail_where_predictions_differ(name, monkeypatch):
    values = iter(range(1000))
    for module in (gpu_checks, gpu_stress):
        monkeypatch.setattr(module, "predictions", lambda *_, **__: [torch.full((1,), float(next(values)))] * 4)
    with pytest.raises(CheckError):
        CHECKS[name](MACHINE)


def test_an_lstm_that_is_refused_has_to_be_named(monkeypatch):
    for message, names in (("cudnn RNN backward can only be called in training mode", False), ("LSTM 'lstm'", True)):
        outcomes = iter([[torch.zeros(1)], RuntimeError(message)])

        def predictions(*_, outcomes=outcomes):
            outcome = next(outcomes)
            return fail(outcome) if isinstance(outcome, Exception) else outcome

        monkeypatch.setattr(gpu_checks, "predictions", predictions)
        check = partial(CHECKS["an LSTM behind the fusion"], MACHINE)
        if names:
            assert check() == "RuntimeError: LSTM 'lstm'"
        else:
            with pytest.raises(CheckError, match="training mode"):
                check()


def test_memory_that_grows_is_found(monkeypatch):
    sizes = iter((0, 2**20))
    monkeypatch.setattr(gpu_stress, "_tensors", lambda: next(sizes))
    with pytest.raises(CheckError, match="1048576 bytes"):
        CHECKS["memory does not grow"](MACHINE)


def test_host_waits_are_counted_by_their_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr("torch.cuda.Event.synchronize", lambda event: None)
    kind: Any = torch.cuda.Event
    with counted_waits("cuda") as waits:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        for is_there in (True, False):
            kind.synchronize(SimpleNamespace(query=lambda there=is_there: there))
    assert waits is not None
    assert sorted(waits.values()) == [1, 1]
    assert all(place.startswith("tests/test_gpu_program.py:") for place in waits)
    with counted_waits("cpu") as none:
        assert none is None


def entry(program, seconds, memory=1, waits=0, plain=None, **settings):
    row = Row(program, "bf16-mixed", 32, memory, **settings).__dict__
    figures = FIGURES | {"seconds": seconds, "waits": waits, "plain": plain}
    return {"kind": "row", "status": "done", "settings": row, **figures}


def test_targets_by_hand():
    plain = {"seconds": 1.0, "peak": 0, "waits": 1}
    entries = {
        "ours": entry("ABPEM attached", 1.2, waits=1, plain=plain),
        "ours, 4": entry("ABPEM attached", 1.81, 4, waits=2, plain=plain),
        "published": entry("published way", 1.41, plain=plain),
        "published, 4": entry("published way", 2.61, 4, plain=plain),
        "compiled": entry("ABPEM attached", 9.0, waits=0, plain=plain, compiled=True),
    }
    assert list(verdicts(entries["ours"], entries).values()) == [True, True, True]
    assert list(verdicts(entries["ours, 4"], entries).values()) == [False, False, False]
    assert verdicts(entries["published"], entries) == {}
    assert list(verdicts(entries["compiled"], entries).values()) == [True]
    page = as_markdown({"device": "none"}, entries, [])
    assert "| no host wait more than plain | 2 of 3 | missed |" in page
    assert "| at most 1.20 of plain with memory 1 | 1 of 1 | met |" in page


@pytest.mark.parametrize(("power", "word"), [(1, "met"), (2, "missed")])
def test_the_sweeps_exponent(power, word):
    entries = {
        str(n): entry("ABPEM attached", 1.0, plain=FIGURES | {"peak": 0}, model="fusion", tokens=n)
        | {"peak": 2**20 * (n // 512) ** power}
        for n in (512, 1024, 2048, 4096)
    }
    assert f"| added memory grows as tokens to the power of at most 1.1 | {power:.2f} | {word} |" in as_markdown(
        {"device": "none"}, entries, []
    )
