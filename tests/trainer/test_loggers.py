"""Runs with MLflow's and W&B's loggers, without a network, read back from their files by other means."""

import json
import sqlite3
import zlib
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from PIL import Image

from lightning_abpem import __version__
from tests.toy import CLASSES, MODALITIES, loader, make_toy
from tests.trainer.test_callback import trainer
from tests.trainer.test_pictures import assert_shows
from tests.trainer.test_reporting import adapting, record_of

BATCHES, FIGURES = 4, ("loss", "entropy", "balance", "attention_gap/audio_to_video")


class Records(pl.Callback):
    """Keeps the figures of each step."""

    def __init__(self):
        self.rows = []

    def on_test_batch_end(self, trainer, *_):
        self.rows.append({name: float(value) for name, value in trainer.callbacks[0].record.items()})


def figures_of(logger, folder):
    """Test a model with a logger: what the run itself has of its figures."""
    model, callback, records = make_toy(), adapting(folder / "report.html", predicts="before"), Records()
    trainer(callback, records, logger=logger, log_every_n_steps=1).test(model, loader(BATCHES), verbose=False)
    averages = {name: float(callback.averages[0][name]) for name in FIGURES}
    pairs = record_of(folder / "report.html")["blocks"]["pairs"]
    named = {f"abpem/test/attention/{pair['query']}_to_{pair['key']}": pair for pair in pairs}
    assert len(named) == len(MODALITIES) ** 2
    return SimpleNamespace(seen=model.seen, rows=records.rows, averages=averages, pairs=named)


def assert_options(options):
    """The callback's options, which a logger may keep as words."""
    wanted = {"learning_rate": 0.01, "memory_batches": 1, "predicts": "before", "version": __version__}
    assert {name: str(options[f"abpem/{name}"]) for name in wanted} == {name: str(own) for name, own in wanted.items()}


# ------------------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow(monkeypatch):
    """The library, told to call nobody before it is imported."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which the logger sets
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    return pytest.importorskip("mlflow")


@pytest.mark.slow
def test_mlflow(mlflow, tmp_path):
    database, artifacts = tmp_path / "mlflow.db", tmp_path / "artifacts"
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{database}", artifact_location=artifacts.as_uri())
    run = figures_of(logger, tmp_path)
    connection = sqlite3.connect(database)

    def column(name):
        rows = connection.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (name,))
        return dict(rows.fetchall())

    for name in FIGURES:
        steps = {step: row[name] for step, row in enumerate(run.rows)}
        assert column(f"abpem/test/{name}_step") == pytest.approx(steps)
        assert list(column(f"abpem/test/{name}").values()) == pytest.approx([run.averages[name]])
    assert_options(dict(connection.execute("SELECT key, value FROM params").fetchall()))
    connection.close()
    images = {path.name.partition("+")[0].replace("~", "/"): path for path in artifacts.rglob("*.png")}
    assert set(images) == set(run.pairs)
    for name, pair in run.pairs.items():
        with Image.open(images[name]) as image:
            assert_shows(image, pair)


# ---------------------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The library, offline, with all that it writes in the test's folder."""
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind.lower()))
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    library = pytest.importorskip("wandb")
    yield library
    library.teardown()  # which ends its process


def records_of(path):
    """The records of a .wandb file: blocks of 32 KiB, in them parts with a checksum, length and kind before each."""
    from wandb.proto import wandb_internal_pb2

    made: Any = wandb_internal_pb2

    data, part, at = path.read_bytes(), b"", 7
    assert data[:4] == b":W&B"
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:  # too few bytes for another part: zeros
            at += left
            continue
        checksum, size, kind = (int.from_bytes(data[at + i : at + j], "little") for i, j in ((0, 4), (4, 6), (6, 7)))
        piece = data[at + 7 : at + 7 + size]
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        part, at = part + piece, at + 7 + size
        if kind in (1, 4):  # a record in one part, or the last part of one
            yield made.Record.FromString(part)
            part = b""


def items(entries):
    """The items of a record by their names; those of one item have its name in front of theirs."""
    found: dict[str, Any] = {}
    for entry in entries:
        *outer, last = entry.nested_key or [entry.key]
        inside = found
        for name in outer:
            inside = inside.setdefault(name, {})
        inside[last] = json.loads(entry.value_json)
    return found


@pytest.mark.slow
def test_wandb(wandb, tmp_path):
    quiet = wandb.Settings(console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True)
    logger = WandbLogger(save_dir=tmp_path, offline=True, mode="offline", settings=quiet)
    run = figures_of(logger, tmp_path)
    logger.experiment.finish()
    wandb.teardown()  # only the end of its process is the end of the file
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = list(records_of(file))
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    for name in FIGURES:
        steps = [row for row in rows if f"abpem/test/{name}_step" in row]
        assert [row["trainer/global_step"] for row in steps] == list(range(BATCHES))
        own = [row[name] for row in run.rows]
        assert [row[f"abpem/test/{name}_step"] for row in steps] == pytest.approx(own)
        [average] = [row[f"abpem/test/{name}"] for row in rows if f"abpem/test/{name}" in row]
        assert average == pytest.approx(run.averages[name])
    options: dict[str, Any] = {}
    for record in records:
        options |= items(record.run.config.update) | items(record.config.update)
    assert_options(options)
    parts = [row for row in rows if "abpem/test/predicted_class" in row]
    assert [row["trainer/global_step"] for row in parts] == list(range(BATCHES))
    for row, logits in zip(parts, run.seen, strict=True):
        histogram = row["abpem/test/predicted_class"]
        assert histogram["bins"] == [edge - 0.5 for edge in range(len(histogram["values"]) + 1)]
        assert np.pad(histogram["values"], (0, CLASSES - len(histogram["values"]))).tolist() == (
            np.bincount(logits.argmax(1), minlength=CLASSES).tolist()
        )
    images = {name: value for row in rows for name, value in row.items() if name.startswith("abpem/test/attention/")}
    assert set(images) == set(run.pairs)
    for name, pair in run.pairs.items():
        [path] = images[name]["filenames"]
        with Image.open(file.parent / "files" / path) as image:
            assert_shows(image, pair)


@pytest.mark.slow
def test_wandb_takes_histograms_of_more_classes_than_it_has_buckets(wandb):
    from lightning_abpem.trainer.pictures import log_pictures

    class Rows(WandbLogger):
        def __init__(self):
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((metrics, step))

    logger = Rows()
    log_pictures([logger], "tent/test", {"names": [0, 1999], "counts": [[3], [1], [0]], "first": [5]}, None, 2)
    [(metrics, step)] = logger.rows
    histogram = metrics["tent/test/predicted_class"]
    assert step == 7
    assert (histogram.bins[0], histogram.bins[-1]) == (-0.5, 1999.5)
    assert (histogram.histogram[0], histogram.histogram[-1], sum(histogram.histogram)) == (3, 1, 4)
