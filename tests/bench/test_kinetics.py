"""The published benchmarks on a small copy of their layout: settings, corruptions made here and before, results."""

import json
import re
import shutil
from functools import partial
from io import StringIO
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from lightning_abpem.bench import kinetics
from lightning_abpem.bench.cells import Cell, run_cell
from lightning_abpem.bench.command import run_benchmark
from lightning_abpem.bench.kinetics import Kinetics50C, VGGSoundC
from lightning_abpem.bench.variants import METHODS, Variant
from lightning_abpem.data.corrupt_files import corrupt_data_set
from lightning_abpem.data.corrupt_work import CorruptOptions
from lightning_abpem.data.corruptions import Corruption, Sensor
from lightning_abpem.models import CAVMAE
from tests.data.test_audio_visual import folder  # noqa: F401  # a fixture

FOG, WIND = Corruption("image", "fog", 5), Corruption("audio", "wind", 3)
small = partial(CAVMAE, embed_dim=24, num_heads=2)


@pytest.fixture
def arguments(folder, tmp_path, monkeypatch):  # noqa: F811
    """The data under the names of the published archive, and a checkpoint of a small CAV-MAE."""
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    lists = root / "json_csv_files"
    (lists / "ks50" / "clean").mkdir(parents=True)
    shutil.copy(root / "list.json", lists / "ks50" / "clean" / "severity_0.json")
    shutil.copy(root / "classes.csv", lists / "class_labels_indices_ks50.csv")
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in small(10).state_dict().items()}
    torch.save(state, tmp_path / "cav_mae_ks50.pth")
    monkeypatch.setattr(kinetics, "CAVMAE", _Small)
    return {"data_root": root, "checkpoint": tmp_path / "cav_mae_ks50.pth", "num_workers": 0}


class _Small:
    modalities = CAVMAE.modalities

    def __new__(cls, classes):
        return small(classes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_it(arguments, method):
    bench = Kinetics50C(**arguments)
    cell = Cell("both", 5, "image: gaussian noise + audio: gaussian noise", 111, "CAV-MAE", 3, method)
    found = run_cell(bench, cell, Variant(method), bench.source("CAV-MAE"))
    assert found["rows"][0]["samples"] == 6
    assert found["updates"] + found["skipped"] <= 2


def test_samples_are_corrupted_as_they_are_read(arguments):
    bench = Kinetics50C(**arguments)
    clean, foggy, both = bench.sample(2, ()), bench.sample(2, (FOG,)), bench.sample(2, (FOG, WIND))
    assert clean[0].shape == (1024, 128)
    assert clean[1].shape == (3, 224, 224)
    assert torch.equal(clean[0], foggy[0])
    assert not torch.equal(clean[1], foggy[1])
    assert torch.equal(both[1], foggy[1])
    assert not torch.equal(both[0], clean[0])
    assert bench.provenance() == {"noise": "procedural", "frost": "procedural", "skipped": 0}


def test_data_corrupted_beforehand(arguments, tmp_path):
    clean_list = arguments["data_root"] / "list.json"
    for fault in (FOG, WIND):
        corrupt_data_set(clean_list, tmp_path / "made", fault, CorruptOptions(quality=100))
    lists = tmp_path / "made" / "json"
    here, before = Kinetics50C(**arguments), Kinetics50C(**arguments, corrupted_lists=lists)
    for index in (0, 4):
        made, read = here.sample(index, (FOG, WIND)), before.sample(index, (FOG, WIND))
        assert (made[1] - read[1]).abs().mean() < 0.05  # a JPEG lies between
        assert (made[0] - read[0]).abs().mean() < 0.05  # and 16 bits
    assert torch.equal(before.sample(1, ())[0], here.sample(1, ())[0])
    assert before.provenance() == {"corrupted": str(lists), "noise": "procedural", "skipped": 0}
    with pytest.raises(FileNotFoundError, match=r"list for each of 3 corruptions, but 2 are missing: .*fog/severity_4"):
        before.load([FOG, Corruption("image", "fog", 4), Corruption("audio", "rain", 4)])


def test_lists_lead_nowhere_else_unless_told(arguments, tmp_path):
    """Neither the clean list nor those made beforehand, whose originals and copies lie apart."""
    secret = tmp_path / "secret.wav"
    clean_list = arguments["data_root"] / "json_csv_files" / "ks50" / "clean" / "severity_0.json"
    made = corrupt_data_set(arguments["data_root"] / "list.json", tmp_path / "made", WIND)
    before = {"corrupted_lists": tmp_path / "made" / "json"}
    shutil.copy(arguments["data_root"] / json.loads(clean_list.read_text())["data"][0]["wav"], secret)
    Kinetics50C(**arguments, **before).load([WIND])
    moved = shutil.copytree(tmp_path / "made" / "json", tmp_path / "made" / "lists")
    with pytest.raises(ValueError, match=r"Expected `wav` of data\[0\] of .*lists/audio/wind.* to stay in"):
        Kinetics50C(**arguments, corrupted_lists=moved).load([WIND])
    for path in (clean_list, made):
        text = path.read_text()
        document = json.loads(text)
        document["data"][1]["wav"] = str(secret)
        path.write_text(json.dumps(document))
        with pytest.raises(ValueError, match=r"Expected `wav` of data\[1\] of .* to stay in .*secret\.wav"):
            Kinetics50C(**arguments, **before).load([WIND])
        Kinetics50C(**arguments, **before, allow_outside=True).load([WIND])
        path.write_text(text)


def test_the_authors_settings(arguments):
    bench = Kinetics50C(**arguments)
    published: list[tuple[list[Sensor], tuple[int, float, int]]] = [
        (["audio"], (7, 5.0, 4)),
        (["image"], (8, 1.0, 4)),
        (["audio", "image"], (7, 5.0, 4)),
    ]
    for sensors, expected in published:
        settings = Variant("abpem-published").build(bench, sensors, 6, bench.batch_size).settings
        method: Any = settings.method
        objective = method.objective
        assert (objective.k, objective.attention_weight, settings.memory_batches) == expected
        assert objective.balance == "marginal"
    assert (VGGSoundC.batch_size, VGGSoundC.recipes["image"]) == (32, "vggsound-video")


def test_published_rows_stand_beside_ours(arguments, tmp_path):
    written = StringIO()
    console = Console(file=written, width=100)
    run_benchmark(Kinetics50C, arguments, out=tmp_path / "out", methods="source", seeds=1, workers=1, console=console)
    shown = written.getvalue()
    assert re.search(r"ABPEM, BriMPR's paper \(published\) +64\.1 +7\d\.\d *\n", shown)
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| READ, READ's paper (published) |" in tables
    row = next(line for line in tables.splitlines() if line.startswith("| ABPEM, BriMPR's paper (published)"))
    assert row.split("|")[-2].strip() == "64.1"  # images come first
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 1 + 21
    state = torch.load(arguments["checkpoint"])
    torch.save({name: value + 1 for name, value in state.items()}, arguments["checkpoint"])
    with pytest.raises(ValueError, match="`sources.CAV-MAE` is "):  # another model by the same name
        run_benchmark(Kinetics50C, arguments, out=tmp_path / "out", methods="source", seeds=1, workers=1)


def test_no_checkpoint(arguments, tmp_path):
    with pytest.raises(ValueError, match="Expected `checkpoint` to be the published state dict, but .* is no file"):
        Kinetics50C(**{**arguments, "checkpoint": tmp_path / "none.pth"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "EOFError"),
        (b"text", "pop from empty list"),
        (b"<!DOCTYPE html>", "it is no file of torch.save's, or holds more than tensors"),
        ([1, 2], "it holds a list"),
        ({"a": 1}, "it holds a dict of other things than tensors"),
        ("truncated", "PytorchStreamReader failed"),
    ],
)
def test_a_broken_checkpoint_is_told_before_anything_is_written(arguments, tmp_path, content, words):
    path = arguments["checkpoint"]
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"Expected {re.escape(str(path))} to be a state dict.*{words}"):
        run_benchmark(Kinetics50C, arguments, out=tmp_path / "out", methods="source", seeds=1, workers=1)
    assert not list(tmp_path.glob("out/*.json"))


def test_missing_recordings_are_told_before_anything_is_computed(arguments, tmp_path):
    soundfile.write(tmp_path / "traffic.wav", np.full(900, 0.1), 16000)
    with pytest.raises(FileNotFoundError, match=r"to have crowd\.wav, rain\.wav, thunder\.wav, wind\.wav \(or"):
        run_benchmark(Kinetics50C, arguments | {"recordings": tmp_path}, out=tmp_path / "out", seeds=1, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_sample_that_corrupted_lists_lack_is_told_when_they_are_read(arguments, tmp_path):
    clean_list = arguments["data_root"] / "list.json"
    made = corrupt_data_set(clean_list, tmp_path / "made", WIND)
    document = json.loads(made.read_text())
    gone = document["data"].pop(2)["video_id"]
    made.write_text(json.dumps(document))
    bench = Kinetics50C(**arguments, corrupted_lists=tmp_path / "made" / "json")
    with pytest.raises(ValueError, match=rf"to have every sample of the clean list, but 1 are missing, .* '{gone}'"):
        bench.load([WIND])
