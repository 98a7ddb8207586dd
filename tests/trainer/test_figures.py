"""Figures of a run: in the bar while it runs, in results and loggers, in a table at its end."""

import csv

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_abpem import ABPEM, __version__
from lightning_abpem.display import plain_text
from lightning_abpem.methods import EATA, Tent
from lightning_abpem.trainer.figures import HEADLINE
from tests.toy import MODALITIES, batches, listed, loader, make_toy
from tests.trainer.test_callback import abpem, trainer


class Looks(pl.Callback):
    """Keeps what a callback, and the progress bar, can see after each batch."""

    def __init__(self):
        self.bar, self.records = [], []

    def on_test_batch_end(self, trainer, *_):
        self.bar.append(dict(trainer.progress_bar_metrics))
        self.records.append({**trainer.callbacks[0].record})


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_the_bar_and_other_callbacks_see_the_last_step(bar):
    callback, looks = abpem(monitor="source"), Looks()
    trainer(callback, looks, bar(), enable_progress_bar=True).test(make_toy(), loader(5), verbose=False)
    assert [row["abpem/updates"] for row in looks.bar] == [1, 2, 3, 4, 5]
    for bar, record in zip(looks.bar, looks.records, strict=True):
        assert bar["abpem/entropy"] == pytest.approx(record["entropy"].item())
        assert bar["abpem/flip_rate"] == pytest.approx(record["flip_rate"].item())
        gaps = [value for name, value in record.items() if name.startswith("attention_gap/")]
        assert bar["abpem/attention_gap"] == pytest.approx(torch.stack(gaps).mean().item())
        assert not any(value.requires_grad for value in record.values())
    assert callback.record["loss"] == looks.records[-1]["loss"]


def test_without_a_bar_nothing_is_logged_for_it():
    looks = Looks()
    trainer(abpem(), looks).test(make_toy(), loader(2), verbose=False)
    assert looks.bar == [{}, {}]


def test_the_record_of_an_attach():
    callback = abpem()
    with callback.attach(make_toy().eval()) as adaptation, torch.no_grad():
        assert callback.record == {}
        adaptation.model(*batches(1)[0])
        assert callback.record == adaptation.record
    assert "loss" in callback.record


@pytest.mark.parametrize(
    ("figures", "wanted"),
    [
        ("headline", {"entropy", "attention_gap", "updated"}),
        (["balance"], {"balance", "updated"}),
        ("all", None),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_the_chosen_figures_are_in_the_results_and_all_in_the_loggers(figures, wanted, count, tmp_path):
    logger = CSVLogger(tmp_path)
    callback = abpem(figures=figures)
    loaders = [loader(3, seed=i) for i in range(count)]
    results = trainer(callback, logger=logger).test(make_toy(), loaders, verbose=False)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for index, result in enumerate(results):
        suffix = f"/dataloader_idx_{index}" if count > 1 else ""
        averages = callback.averages[index]
        own = {name for name in result if name.startswith("abpem/test/")}
        assert own == {f"abpem/test/{name}{suffix}" for name in wanted or averages}
        for name, value in averages.items():
            [logged] = [row[f"abpem/test/{name}{suffix}"] for row in rows if row[f"abpem/test/{name}{suffix}"]]
            assert float(logged) == pytest.approx(value.item(), rel=1e-5)


def test_steps_between_two_rows_are_averaged_over_samples(tmp_path):
    sizes = (4, 2, 3, 1, 5)
    stream = [(*batches(1, size, seed=size)[0], torch.zeros(size)) for size in sizes]
    stream[1] = (stream[1][0] * float("nan"), *stream[1][1:])

    def rows(every):
        logger = CSVLogger(tmp_path, version=every)
        runner = trainer(abpem(), logger=logger, log_every_n_steps=every)
        runner.test(make_toy(), listed(stream), verbose=False)
        logger.save()
        with open(f"{logger.log_dir}/metrics.csv") as file:
            own = [row for row in csv.DictReader(file) if row["abpem/test/updated_step"]]
        return [int(row["step"]) for row in own], [
            [float(row[f"abpem/test/{name}_step"] or "nan") for row in own] for name in ("loss", "updated")
        ]

    steps, (losses, updated) = rows(1)
    assert steps == [0, 1, 2, 3, 4]
    assert updated == [1, 0, 1, 1, 1]
    steps, (thinned, shares) = rows(2)
    assert steps == [1, 3, 4]
    assert thinned == pytest.approx([losses[0], (3 * losses[2] + losses[3]) / 4, losses[4]], rel=1e-5)
    assert shares == pytest.approx([4 / 6, 1, 1])


def test_options_are_hyper_parameters_once(tmp_path):
    csv_logger, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    runner = trainer(abpem(learning_rate=1e-3, memory_batches=2), logger=[csv_logger, board])
    runner.test(make_toy(), loader(2), verbose=False)
    runner.predict(make_toy(), loader(2))
    for logger in (csv_logger, board):
        logger.save()
    for folder in (csv_logger.log_dir, board.log_dir):
        with open(f"{folder}/hparams.yaml") as file:
            options = yaml.safe_load(file)
        assert options["abpem/learning_rate"] == 1e-3
        assert options["abpem/memory_batches"] == 2
        assert options["abpem/k"] == 2
        assert options["abpem/version"] == __version__
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert {"abpem/test/entropy", "abpem/test/loss", "abpem/predict/loss"} <= set(events.Tags()["scalars"])


def test_a_logger_that_refuses_options_is_warned_of(caplog):
    class Refuses(DummyLogger):
        def log_hyperparams(self, *args, **kwargs):
            raise ValueError("lr was 0.1 before")

    callback = abpem()
    trainer(callback, logger=Refuses()).test(make_toy(), loader(2), verbose=False)
    assert callback.updates == 2
    assert "Refuses did not take the options as hyper-parameters: ValueError('lr was 0.1 before')" in caplog.text


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_the_table_at_the_end(stage, capsys):
    callback = abpem(monitor="source", guard="rollback")
    getattr(trainer(callback), stage)(make_toy(), loader(3))
    out = capsys.readouterr().out
    assert f"ABPEM in {stage}" in out
    assert "3 updates in 3 batches" in out
    assert "spent adapting" in out
    means = callback.averages[0]
    line = next(line for line in out.splitlines() if line.startswith(" entropy of a prediction"))
    assert line.split()[-3:] == [f"{means['source_entropy']:.3f}", "→", f"{means['entropy']:.3f}"]


def test_the_table_has_no_source_of_other_batches(capsys):
    """A source of one batch in two would stand beside an average over all."""
    callback = abpem(monitor=2)
    trainer(callback).test(make_toy(), loader(2))
    out = capsys.readouterr().out
    assert "source_entropy" in callback.averages[0]
    assert "→" not in out
    assert "in one of 2 batches" in out
    assert plain_text(callback.summary).splitlines()[0] in out


def test_a_table_has_a_column_for_each_dataloader(capsys):
    trainer(abpem()).predict(make_toy(), [loader(2, seed=1), loader(2, seed=2)])
    out = capsys.readouterr().out
    assert "dataloader 0" in out
    assert "dataloader 1" in out


@pytest.mark.parametrize(("options", "verbose"), [({"verbose": 0}, True), ({}, False), ({"verbose": 0}, False)])
def test_no_table_where_none_is_wanted(options, verbose, capsys):
    callback = abpem(**options)
    trainer(callback).test(make_toy(), loader(2), verbose=verbose)
    assert "spent adapting" not in capsys.readouterr().out
    assert callback.summary.updates == 2


def test_how_much_is_said_at_the_start(caplog):
    for verbose, lines in ((0, 0), (1, 4), (2, 7)):
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer(abpem(verbose=verbose)).test(make_toy(), loader(1), verbose=False)
        said = [line for line in caplog.text.splitlines() if not any(word in line for word in ("PU available", "Tip"))]
        assert len(said) == lines, said
        assert ("fusion.0.attn.qkv.weight (36, 12)" in caplog.text) == (verbose == 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"verbose": 3}, "`verbose` to be one of 0, 1, 2, but got 3"),
        ({"verbose": True}, "`verbose` to be one of 0, 1, 2, but got True"),
        ({"figures": "entropy"}, "`figures` to be .* but got 'entropy'"),
        ({"figures": [1]}, r"`figures` to be .* but got \[1\]"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        abpem(**options)


def test_a_callback_shows_the_options_that_are_not_the_defaults():
    shown = repr(ABPEM("fusion.*.attn", MODALITIES, k=2, learning_rate=1e-3))
    assert shown == "ABPEM(fusion='fusion.*.attn', modalities={audio: 6, video: 4}, k=2, learning_rate=0.001)"
    assert repr(Tent()) == "Tent()"
    assert repr(EATA(fisher_batches=batches(2), predicts="after")) == "EATA(fisher_batches=2 items, predicts='after')"


def test_the_guard_is_among_the_figures(tmp_path):
    callback = abpem(monitor="source", guard="warn")
    trainer(callback).test(make_toy(), loader(3), verbose=False)
    assert callback.averages[0]["guard"] == 0
    assert "guard" not in HEADLINE
