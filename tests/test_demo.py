"""The demo: a run's row, the table's and the figure's arithmetic, its promises."""

import csv

import pytest

from lightning_abpem.cli import main
from lightning_abpem.data.corruptions import Corruption
from lightning_abpem.demo.check import broken_promises
from lightning_abpem.demo.protocol import RECIPE, Run, evaluate, recipe
from lightning_abpem.demo.run import GAPS, KINDS, _curves, _name, _runs, _summary
from lightning_abpem.demo.trainer import silent_trainer
from lightning_abpem.models.digits import DigitsModel


def fabricated(source=60.0, adapted=70.0, clean=99.0, clean_adapted=98.9):
    """Rows as `evaluate` makes them; seeds differ by one point, severities by ten."""
    rows = []
    for run in _runs(recipe()):
        labels = run.labels
        level = {"source": (clean, source), "adapted": (clean_adapted, adapted)}[labels["method"]]
        accuracy = level[labels["severity"] > 0] + 10 * (5 - labels["severity"]) * (labels["severity"] > 0) + run.seed
        gaps = {name: sign * 0.5 for name, sign in zip(GAPS, (1, -1), strict=True)}
        rows.append({**labels, "seed": run.seed, "accuracy": accuracy, "entropy": 1.0, **gaps})
    return rows


def test_a_row_of_an_untrained_model(tmp_path):
    trainer = silent_trainer()
    trainer.strategy.connect(DigitsModel())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    corruption = Corruption("image", "fog", 5)
    rows = [
        evaluate(Run(corruption, 0, options, {"method": name}, pairs=24), tmp_path / "model.ckpt")
        for name, options in (("source", None), ("adapted", recipe()))
    ]
    assert rows[1].keys() >= rows[0].keys() >= {"method", "seed", "accuracy", "entropy", "updated", *GAPS}
    assert (rows[0]["updated"], rows[1]["updated"]) == (0, 1)
    assert 0 <= rows[0]["accuracy"] <= 100
    assert RECIPE["memory_batches"] * 8 == 32


def test_the_table():
    lines = {line["name"]: line for line in _summary(fabricated())}
    assert list(lines) == ["clean", *(_name(*kind) for kind in KINDS), "mean of the corruptions"]
    fog = lines["image: fog"]
    assert fog["source_accuracy"] == pytest.approx(61)
    assert fog["adapted_accuracy"] == pytest.approx(71)
    assert (fog["change"], fog["spread"]) == (pytest.approx(10), pytest.approx(0))
    assert fog["source_gap"] == 0.5  # the mean size, not the mean of both signs
    assert lines["clean"]["change"] == pytest.approx(-0.1)


def test_the_curves():
    points = _curves(fabricated())
    assert len(points) == len(KINDS) * 6 * 2
    by_severity = [p["accuracy"] for p in points if (p["corruption"], p["method"]) == ("image: fog", "source")]
    assert by_severity == [100, 100, 90, 80, 70, 61]  # three seeds at 0 and 5, the first between


def test_promises():
    def broken(**levels):
        return broken_promises([{k: str(v) for k, v in row.items()} for row in fabricated(**levels)])

    assert broken() == []
    assert "97.0 % on clean" in broken(clean=96.0, clean_adapted=96.0)[0]
    assert "+4.0 points" in broken(adapted=64.0)[0]
    assert "-0.50 points" in broken(clean_adapted=98.5)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "0"], "Expected `--learning-rate` to be a number > 0, but got 0"),
        (["quickly"], "Expected no arguments but those of --help, but got quickly"),
    ],
)
def test_errors_of_the_command(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    """On made-up rows, for the runs take minutes."""
    monkeypatch.setattr("lightning_abpem.demo.run.train_digits_model", lambda: tmp_path / "model.ckpt")
    monkeypatch.setattr("lightning_abpem.demo.run.evaluate_all", lambda runs, checkpoint, title: fabricated())
    main(["demo", "--out", str(tmp_path / "out")])
    assert "image: fog" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == len(fabricated())
    assert broken_promises(rows) == []
    assert (tmp_path / "out" / "severity.png").stat().st_size > 0
