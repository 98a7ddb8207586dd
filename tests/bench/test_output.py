"""The folder of a run: results, tables, figures, links in their way."""

import json
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from lightning_abpem.bench.command import compare_runs, run_benchmark
from tests.bench.runs import files, lines, run
from tests.toybench import ToyBench


def test_what_a_run_leaves(tmp_path, undrawn):
    undrawn.undo()
    run(tmp_path, protocol="iid,clean", severity="3,5", batch_size="8")
    table = lines(tmp_path)
    assert len(table) == (3 * 2 + 1) * 2 * 2 * 2
    assert {line["seed"] for line in table} == {"111", "222"}
    assert {line["method"] for line in table} == {"source", "abpem"}
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["run"]["seeds"] == [111, 222]
    assert record["provenance"] == {"noise": "made up"}
    by_k = {own["objective"]["k"]: own["conditions"] for own in record["hyper_parameters"]["abpem"]}
    assert by_k == {2: ["image: fog", "image: gaussian noise", "clean"], 3: ["audio: wind"]}
    (optimizer,) = {json.dumps(own["optimizer"]) for own in record["hyper_parameters"]["abpem"]}
    assert json.loads(optimizer).items() >= {"class": "Adam", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8}.items()
    assert [own["memory_batches"] for own in record["hyper_parameters"]["source"]] == [1]
    of_iid = next(a for a in record["averages"] if (a["severity"], a["batch_size"]) == (5, 8))
    accuracies = [
        float(line["accuracy"])
        for line in table
        if (line["protocol"], line["severity"], line["batch_size"], line["method"]) == ("iid", "5", "8", "abpem")
    ]
    assert of_iid["accuracy"]["abpem"]["mean"] == pytest.approx(np.mean(accuracies))
    assert (tmp_path / "tables.md").read_text().count("###") == 3
    assert "tabular" in (tmp_path / "tables.tex").read_text()
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"attention-gap.png", "running-accuracy.png", "reliability.png"} < names
    assert "accuracy-iid-severity-5-batch-size-8.png" in names
    for path in (tmp_path / "figures").iterdir():
        assert np.asarray(Image.open(path)).std() > 1


def test_a_run_can_grow(tmp_path):
    run(tmp_path)
    before = files(tmp_path / "cells")
    run(tmp_path, methods="source,abpem,read", seeds=3)
    assert before.items() <= files(tmp_path / "cells").items()
    assert len(lines(tmp_path)) == 3 * 3 * 2 * 3


@pytest.mark.parametrize("change", [("accuracy", "a"), ("iid,5", "iid,five"), (",source,", "\n"), ("method,", "")])
def test_damaged_results_are_named(tmp_path, change):
    run(tmp_path, methods="source", sources="one")
    path = tmp_path / "results.csv"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=r"Expected .*results\.csv to be of a finished run, but it is damaged: "):
        compare_runs(str(tmp_path), str(tmp_path))


class Recorded(ToyBench):
    """It has a recording of nothing."""

    def load(self, corruptions):
        raise FileNotFoundError(f"no recording of {', '.join(str(c) for c in corruptions if c.modality == 'audio')}")


def test_what_is_missing_is_told_before_anything_is_computed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recording of audio: wind$"):
        run_benchmark(Recorded, {}, out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


class Made(ToyBench):
    """Its noise is procedural, and a sample is left out."""

    def provenance(self):
        return {"noise": "procedural", "frost": "/pictures", "skipped": 1}


def test_tables_say_what_is_procedural_left_out_or_unweighted(tmp_path):
    written = StringIO()
    console = Console(file=written, width=200)
    options: dict[str, Any] = {
        "methods": "source",
        "seeds": 1,
        "workers": 1,
        "averaging": "batches",
        "console": console,
    }
    run_benchmark(Made, {}, out=tmp_path, **options)
    note = "Procedural: noise. Samples left out, for they are missing or broken: 1. Means over batches"
    for shown in (written.getvalue(), *((tmp_path / f"tables.{kind}").read_text() for kind in ("md", "tex"))):
        assert note in shown


class Marked(ToyBench):
    """Its names have markup."""

    name = "[red]Toy[/red] :smile: <b>|"

    def provenance(self):
        return {"skipped": "[bold]2[/bold] <script>"}


def test_a_benchmarks_names_are_shown_as_they_are(tmp_path):
    written = StringIO()
    console = Console(file=written, width=300, force_terminal=True, color_system=None)
    run_benchmark(Marked, {}, out=tmp_path / "[b]:fire:", methods="source", seeds=1, workers=1, console=console)
    shown = written.getvalue()
    for words in (Marked.name, "broken: [bold]2[/bold] <script>.", f"{tmp_path}/[b]:fire:/tables.md"):
        assert words in shown
    assert "<script>" not in (tmp_path / "[b]:fire:" / "tables.md").read_text()


def test_a_label_that_begins_with_an_underscore_is_in_the_legends(tmp_path, monkeypatch):
    shown: list[list[str]] = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        legends = [legend for legend in (*(axes.get_legend() for axes in figure.axes), *figure.legends) if legend]
        shown.extend([text.get_text().strip() for text in legend.get_texts()] for legend in legends)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    run(tmp_path, methods="source,_own_", variants={"_own_": {"method": "abpem"}}, severity="3,5", seeds=1)
    assert len(shown) == 4  # of two tables, the gap, the stream
    assert all("_own_" in names for names in shown)


RESULTS = ("results.csv", "results.json", "tables.md", "tables.tex", "settings.json", "figures/reliability.png")


def test_results_take_the_place_of_links(tmp_path):
    """A folder from elsewhere may hold links under the names of results: what they lead to stays as it is."""
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    (out / "figures").mkdir(parents=True)
    for name in RESULTS:
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("{}")
        (out / name).symlink_to(theirs / name)
    run(out)
    for name in RESULTS:
        assert (theirs / name).read_text() == "{}"
        assert not (out / name).is_symlink()
        assert (out / name).stat().st_size > 2


@pytest.mark.parametrize("name", ["cells", "figures"])
def test_a_folder_of_results_that_is_a_link_is_refused(tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "theirs", target_is_directory=True)
    with pytest.raises(ValueError, match=f"Expected '.*{name}' to be a folder of the run's own, but it is a link"):
        run(tmp_path / "out")
    assert not list((tmp_path / "theirs").iterdir())
