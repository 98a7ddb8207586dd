"""`abpem bench`: cells against a plain loop, resuming, several processes, the command, its files and its errors."""

import csv
import json
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from lightning_abpem.bench.cells import Cell, run_cell, stream_of
from lightning_abpem.bench.command import _make, compare_runs, run_benchmark
from lightning_abpem.bench.runner import list_cells, load_cells, run_cells
from lightning_abpem.bench.settings import plain
from lightning_abpem.bench.variants import METHODS, VARIANTS, Variant, find_variants
from lightning_abpem.cli import main
from lightning_abpem.methods import ABPEM
from tests.reference import same_state
from tests.toybench import ToyBench

CELL = Cell("iid", 3, "image: fog", 111, "one", 8, "abpem")


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def run(folder, **options):
    quick = {"methods": "source,abpem", "seeds": 2, "workers": 1}
    run_benchmark(ToyBench, options.pop("arguments", {}), out=folder, **(quick | options))


def lines(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------------------- a cell


def test_a_cell_is_a_plain_loop():
    bench, variant = ToyBench(samples=20), Variant("abpem", {"learning_rate": 0.01})
    found = run_cell(bench, CELL, variant, bench.source("one"))
    items = stream_of(bench, CELL)
    model, hits, confidences, gaps = bench.source("one"), [], [], []
    method = ABPEM(
        "fusion.*.attn",
        bench.modalities,
        k=2,
        memory_batches=2,
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )
    with torch.no_grad(), method.attach(model) as adaptation:
        for start in (0, 8, 16):
            batch = items[start : start + 8]
            samples = [bench.sample(item.index, item.corruptions) for item in batch]
            logits = model(*map(torch.stack, zip(*samples, strict=True)))
            hits += [int(row.argmax() == item.index % 5) for row, item in zip(logits, batch, strict=True)]
            confidences += logits.softmax(1).max(1).values.tolist()
            gaps += [adaptation.record["attention_gap/audio_to_video"].item()] * len(batch)
    assert len(hits) == 20
    (row,) = found["rows"]
    assert row["accuracy"] == pytest.approx(100 * np.mean(hits))
    by_batch = [np.mean(hits[:8]), np.mean(hits[8:16]), np.mean(hits[16:])]
    assert row["batch_accuracy"] == pytest.approx(100 * np.mean(by_batch))
    assert row["batch_accuracy"] != row["accuracy"]  # the last batch is of four
    assert found["hits"] == [sum(hits[:8]), sum(hits[8:16]), sum(hits[16:])]
    assert found["figures"]["attention_gap/audio_to_video"] == pytest.approx(np.mean(gaps), rel=1e-5)
    counts, sums, correct = np.array(found["reliability"]).T
    assert counts.sum() == 20
    assert sums.sum() == pytest.approx(sum(confidences), rel=1e-5)
    assert correct.sum() == sum(hits)
    expected = np.histogram(confidences, bins=10, range=(0, 1))[0]
    assert counts.tolist() == expected.tolist()
    assert found["updates"] == 3


def test_the_model_is_as_before_after_a_cell():
    bench = ToyBench()
    model = bench.source("one")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = run_cell(bench, CELL, Variant("abpem", {"learning_rate": 0.1}), model)
    assert same_state(before, model.state_dict())
    again = run_cell(bench, CELL, Variant("abpem", {"learning_rate": 0.1}), model)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_streams_are_the_same_for_all_methods_sources_and_batch_sizes():
    bench = ToyBench()
    other = Cell("iid", 3, "image: fog", 111, "two", 4, "source")
    assert stream_of(bench, CELL) == stream_of(bench, other)
    assert stream_of(bench, CELL) != stream_of(bench, Cell("iid", 3, "image: fog", 222, "one", 8, "abpem"))


def test_a_missing_modality_is_zeros():
    bench, seen = ToyBench(), []
    model = bench.source("one")
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    cell = Cell("missing", 0, "image missing", 111, "one", 6, "source")
    run_cell(bench, cell, Variant("source"), model)
    items = stream_of(bench, cell)
    video = torch.cat([args[1] for args in seen])
    for item, frame in zip(items, video, strict=True):
        assert torch.equal(frame, torch.zeros_like(frame) if item.missing else bench.video[item.index])


def test_a_benchmarks_options_follow_the_sensors_that_fail():
    bench = ToyBench()
    fitting = Variant("abpem").build(bench, ["audio"], 24, 8)
    assert fitting.settings.method.objective.k == 3
    assert fitting.settings.memory_batches == 2
    own = Variant("abpem", {"k": 4, "memory_samples": 4, "steps": 2}).build(bench, ["image"], 24, 8)
    assert (own.settings.method.objective.k, own.settings.memory_batches, own.settings.steps) == (4, 1, 2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cell", [("iid", 5, "audio: wind"), ("mixed", 0, "all"), ("missing", 0, "audio missing")])
def test_every_method_runs(name, cell, caplog):
    bench = ToyBench()
    found = run_cell(bench, Cell(*cell, 111, "two", 4, name), Variant(name), bench.source("two"))
    assert sum(row["samples"] for row in found["rows"]) == 24
    assert found["updates"] + found["skipped"] == (0 if name == "source" else 6)
    assert "not finite" not in caplog.text


@pytest.mark.parametrize("label", VARIANTS)
def test_every_variant_can_be_built(label):
    assert VARIANTS[label].build(ToyBench(), ["image"], 24, 8).settings.method.name


# ---------------------------------------------------------------------------------------------------------- many cells


def test_cells_of_a_run():
    cells = list_cells(ToyBench(), ["iid", "mixed"], [3, 5], [1, 2], ["one"], [4], ["source", "abpem"])
    assert len(cells) == 3 * 2 * 2 * 2 + 1 * 2 * 2  # the mixed protocol has its own severities
    assert len({cell.key for cell in cells}) == len(cells)
    assert cells[0].method != cells[1].method  # on the same stream


def test_an_interrupt_loses_nothing_that_was_finished(tmp_path):
    cells = list_cells(ToyBench(), ["iid"], [5], [1], ["one"], [8], ["source", "read"])
    done = []

    def stop():
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(ToyBench, cells, VARIANTS, tmp_path, 1, "cpu", stop)
    kept = files(tmp_path)
    assert len(kept) == 4
    (tmp_path / "iid.json.partial-1").write_text("{")  # of a process that was killed
    counted = []
    run_cells(ToyBench, cells, VARIANTS, tmp_path, 1, "cpu", lambda: counted.append(1))
    assert len(counted) == 2
    assert len(files(tmp_path)) == 6
    assert kept.items() <= files(tmp_path).items()


@pytest.mark.slow
def test_processes_agree(tmp_path):
    cells = list_cells(ToyBench(), ["iid", "skewed-1"], [5], [1], ["one", "two"], [8], ["source", "abpem"])
    found = []
    for workers in (1, 2):
        run_cells(ToyBench, cells, VARIANTS, tmp_path / str(workers), workers, "cpu", lambda: None)
        found.append([{**result, "seconds": 0} for result in load_cells(tmp_path / str(workers), cells)])
    for one, two in zip(*found, strict=True):
        assert one["hits"] == two["hits"]
        assert one["figures"] == pytest.approx(two["figures"], rel=1e-4)


@pytest.mark.slow
def test_an_interrupt_stops_all_processes(tmp_path):
    """What is under way is finished, what waits is not begun."""
    cells = list_cells(ToyBench(), ["iid"], [5], range(40), ["one"], [8], ["source"])

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(ToyBench, cells, VARIANTS, tmp_path, 2, "cpu", stop)
    assert 1 <= len(files(tmp_path)) < len(cells) / 2


def test_names_that_files_cannot_have():
    with pytest.raises(ValueError, match=r"Expected labels of letters, .* but got \['a/b', 'a b'\]"):
        list_cells(ToyBench(), ["iid"], [5], [1], ["one"], [8], ["source", "a/b", "a b", "a_b+1.e-3"])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_in_a_cell_is_shown_and_the_rest_kept(tmp_path, workers):
    cells = list_cells(ToyBench(), ["iid"], [5], [1], ["one"], [8], ["source"])
    with pytest.raises(ValueError, match="sample 3 is broken"):
        run_cells(partial(ToyBench, fail_at=3), cells, VARIANTS, tmp_path, workers, "cpu", lambda: None)
    assert not files(tmp_path)


def test_a_damaged_cell_is_named(tmp_path):
    run(tmp_path)
    path = next((tmp_path / "cells").iterdir())
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .* Delete it, and run again"):
        run(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"a": 1, "a": 2}', "{"])
def test_damaged_settings_are_named(tmp_path, content):
    run(tmp_path, methods="source", sources="one")
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"Expected .*settings\.json to "):
        run(tmp_path, methods="source", sources="one")


@pytest.mark.parametrize("change", [("accuracy", "a"), ("iid,5", "iid,five"), (",source,", "\n"), ("method,", "")])
def test_damaged_results_are_named(tmp_path, change):
    run(tmp_path, methods="source", sources="one")
    path = tmp_path / "results.csv"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=r"Expected .*results\.csv to be of a finished run, but it is damaged: "):
        compare_runs(str(tmp_path), str(tmp_path))


def test_numbers_that_are_not_finite_are_recorded_as_words():
    assert plain({"a": [float("inf"), float("nan"), 1.0]}) == {"a": ["inf", "nan", 1.0]}


# --------------------------------------------------------------------------------------------------- the whole command


def test_what_a_run_leaves(tmp_path):
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
    (own,) = {json.dumps(own["optimizer"]) for own in record["hyper_parameters"]["abpem"]}
    assert json.loads(own).items() >= {"class": "Adam", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8}.items()
    assert [own["memory_batches"] for own in record["hyper_parameters"]["source"]] == [1]
    of_iid = next(a for a in record["averages"] if (a["severity"], a["batch_size"]) == (5, 8))
    own = [
        float(line["accuracy"])
        for line in table
        if (line["protocol"], line["severity"], line["batch_size"], line["method"]) == ("iid", "5", "8", "abpem")
    ]
    assert of_iid["accuracy"]["abpem"]["mean"] == pytest.approx(np.mean(own))
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


# --------------------------------------------------------------------------------------------------------------- kinds


def cells_in(folder):
    return {path.name: {**json.loads(path.read_text()), "seconds": 0} for path in (folder / "cells").iterdir()}


def test_chosen_kinds_alone_are_run_and_as_among_all(tmp_path):
    run(tmp_path / "some", kinds="fog,wind", seeds=1, protocol="iid,gradual")
    run(tmp_path / "all", seeds=1, protocol="iid,gradual")
    some, every = cells_in(tmp_path / "some"), cells_in(tmp_path / "all")
    assert {line["row"] for line in lines(tmp_path / "some")} == {"image: fog", "audio: wind"}
    assert {line["row"] for line in lines(tmp_path / "all")} == {"image: fog", "image: gaussian noise", "audio: wind"}
    assert len(some) * 3 == len(every) * 2
    assert some.items() <= every.items()
    assert json.loads((tmp_path / "some" / "results.json").read_text())["run"]["kinds"] == {
        "image": ["fog"],
        "audio": ["wind"],
    }


def test_a_run_goes_on_with_other_kinds(tmp_path):
    run(tmp_path, kinds=["fog"], seeds=1)
    before = files(tmp_path / "cells")
    run(tmp_path, kinds="audio:wind", seeds=1)
    assert {line["row"] for line in lines(tmp_path)} == {"audio: wind"}
    run(tmp_path, seeds=1)
    assert before.items() <= files(tmp_path / "cells").items()
    assert len({line["row"] for line in lines(tmp_path)}) == 3


@pytest.mark.parametrize("protocol", ["continual", "mixed"])
def test_streams_of_all_kinds_go_on_with_the_same_ones_only(tmp_path, protocol):
    quick = {"methods": "source", "sources": "one", "seeds": 1, "protocol": protocol}
    run(tmp_path / "a", kinds="fog,wind", **quick)
    for other in ({"kinds": "fog"}, {}):
        with pytest.raises(ValueError, match=rf"`kinds\.{protocol}` is .*'fog'.*, and now .* Choose another `out`"):
            run(tmp_path / "a", **quick, **other)
    run(tmp_path / "a", kinds="wind,fog", **quick)
    run(tmp_path / "a", **{**quick, "protocol": "iid"})
    with pytest.raises(ValueError, match=rf"`kinds\.{protocol}` is "):  # still
        run(tmp_path / "a", **quick)
    run(tmp_path / "b", **quick)
    run(tmp_path / "b", kinds="fog,gaussian_noise,wind", **quick)  # which are all
    with pytest.raises(ValueError, match=rf"Expected two runs on the same data, but `kinds\.{protocol}` is "):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    del settings[f"kinds.{protocol}"]  # as runs had it that could not choose
    (tmp_path / "b" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"`kinds\.{protocol}` is all, and now "):
        run(tmp_path / "b", kinds="fog", **quick)
    run(tmp_path / "b", **quick)


def test_chosen_kinds_reach_other_processes(tmp_path):
    """By what they are made with, sent to them."""
    make = pickle.loads(pickle.dumps(partial(_make, ToyBench, {"samples": 3}, {"audio": ("wind",)})))
    assert (make().kinds, len(make().labels)) == ({"audio": ("wind",)}, 3)


def test_a_modality_without_a_chosen_kind_does_not_fail(tmp_path):
    run(tmp_path, kinds="fog", protocol="missing", seeds=1, methods="source")
    assert {line["row"] for line in lines(tmp_path)} == {"image missing"}
    with pytest.raises(ValueError, match="Expected two modalities that can fail .* but got image"):
        run(tmp_path, kinds="fog", protocol="both")


@pytest.mark.parametrize("words", [["--kinds", "fog", "wind"], ["--kinds=fog,wind"], ["--kinds", "[fog, wind]"], None])
def test_kinds_by_the_command(tmp_path, words):
    (tmp_path / "c.yaml").write_text("kinds: [fog, wind]\nmethods: source\nseeds: 1\nsources: one\n")
    words = words or ["--config", str(tmp_path / "c.yaml")]
    rest = ["--methods", "source", "read", "--seeds=1", "--sources=one", "--workers=1", "--out", str(tmp_path / "out")]
    main(["bench", "tests.toybench.ToyBench", *words, *rest])
    assert {(line["row"], line["method"]) for line in lines(tmp_path / "out")} == set(
        product(("image: fog", "audio: wind"), ("source", "read"))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": {"samples": 20}}, "`arguments.samples` is 24, and now 20"),
        ({"variants": {"abpem": {"method": "abpem", "options": {"k": 4}}}}, "`methods.abpem` is .*and now .*'k': 4"),
    ],
)
def test_other_settings_do_not_mix(tmp_path, change, words):
    run(tmp_path)
    before = files(tmp_path / "cells")
    with pytest.raises(ValueError, match=words):
        run(tmp_path, **change)
    assert files(tmp_path / "cells") == before


class Retrained(ToyBench):
    """Its source models have the names of `ToyBench`'s, and other weights."""

    def source(self, name):
        model = super().source(name)
        torch.nn.init.normal_(model.head[1].bias, generator=torch.Generator().manual_seed(3))
        return model


def test_other_source_models_of_the_same_name_do_not_mix(tmp_path):
    run(tmp_path / "a", sources="one")
    with pytest.raises(ValueError, match=r"in .*a `sources\.one` is \w{64}, and now \w{64}\. Choose another `out`"):
        run_benchmark(Retrained, {}, out=tmp_path / "a", methods="read", sources="one", seeds=1, workers=1)
    run_benchmark(Retrained, {}, out=tmp_path / "b", methods="source", sources="one", seeds=2, workers=1)
    with pytest.raises(ValueError, match=r"Expected two runs on the same data, but `sources\.one` is "):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    run_benchmark(Retrained, {}, out=tmp_path / "a", methods="source", sources="two", seeds=2, workers=1)


def test_a_run_that_never_got_a_cell_does_not_lock_its_folder(tmp_path):
    with pytest.raises(ValueError, match="sample 0 is broken"):
        run(tmp_path, arguments={"fail_at": 0})
    run(tmp_path)
    with pytest.raises(ValueError, match="Expected `k` to be an integer"):
        run(tmp_path, methods="x", variants={"x": {"method": "abpem", "options": {"k": 300}}})
    run(tmp_path, methods="x", variants={"x": {"method": "abpem", "options": {"k": 3}}})


class Loading(ToyBench):
    """With processes that load samples."""

    immaterial = ("num_workers",)

    def __init__(self, num_workers: int = 0, fail_at: int = -1, where: Path = Path()) -> None:
        super().__init__(fail_at=fail_at)
        self.num_workers = num_workers


def test_what_changes_no_number_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"out": tmp_path / "out", "methods": "source", "sources": "one", "seeds": 1, "workers": 1}
    run_benchmark(Loading, {"where": tmp_path}, **options)
    run_benchmark(Loading, {"where": Path(), "num_workers": 1}, **options)
    with pytest.raises(ValueError, match=r"`arguments\.where` is "):
        run_benchmark(Loading, {"where": tmp_path / "elsewhere"}, **options)


def test_an_error_of_a_loading_process_has_no_traceback_in_its_words():
    bench = Loading(num_workers=1, fail_at=3)
    with pytest.raises(ValueError, match=r"^sample 3 is broken$"):
        run_cell(bench, CELL, Variant("source"), bench.source("one"))


def test_a_variants_memory_goes_before_the_benchmarks():
    bench = ToyBench()
    for options, held in (({}, 2), ({"memory_batches": 1}, 1), ({"memory_samples": 24}, 3)):
        assert Variant("abpem", options).build(bench, ["image"], 24, 8).settings.memory_batches == held


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
    console = Console(file=StringIO(), width=200)
    options = {"methods": "source", "seeds": 1, "workers": 1, "averaging": "batches", "console": console}
    run_benchmark(Made, {}, out=tmp_path, **options)
    note = "Procedural: noise. Samples left out, for they are missing or broken: 1. Means over batches"
    for shown in (console.file.getvalue(), *((tmp_path / f"tables.{kind}").read_text() for kind in ("md", "tex"))):
        assert note in shown


class Marked(ToyBench):
    """Its names have markup."""

    name = "[red]Toy[/red] :smile: <b>|"

    def provenance(self):
        return {"skipped": "[bold]2[/bold] <script>"}


def test_a_benchmarks_names_are_shown_as_they_are(tmp_path):
    console = Console(file=StringIO(), width=300, force_terminal=True, color_system=None)
    run_benchmark(Marked, {}, out=tmp_path / "[b]:fire:", methods="source", seeds=1, workers=1, console=console)
    shown = console.file.getvalue()
    for words in (Marked.name, "broken: [bold]2[/bold] <script>.", f"{tmp_path}/[b]:fire:/tables.md"):
        assert words in shown
    assert "<script>" not in (tmp_path / "[b]:fire:" / "tables.md").read_text()


def test_a_label_that_begins_with_an_underscore_is_in_the_legends(tmp_path, monkeypatch):
    shown = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        legends = [legend for legend in (*(axes.get_legend() for axes in figure.axes), *figure.legends) if legend]
        shown.extend([text.get_text().strip() for text in legend.get_texts()] for legend in legends)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    run(tmp_path, methods="source,_own_", variants={"_own_": {"method": "abpem"}}, severity="3,5", seeds=1)
    assert len(shown) == 4  # of two tables, the gap, the stream
    assert all("_own_" in names for names in shown)


def test_the_command_with_a_config_and_a_comparison(tmp_path, capsys):
    config = {
        "methods": ["source", "gentle"],
        "variants": {"gentle": {"method": "abpem", "options": {"learning_rate": 1e-5}}},
        "protocol": "iid",
        "seeds": [7, 8],
        "samples": 20,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    bench, out = "tests.toybench.ToyBench", str(tmp_path / "a")
    main(["bench", bench, "--config", str(tmp_path / "run.yaml"), "--out", out, "--workers", "1"])
    shown = capsys.readouterr().out
    assert "iid, severity 5, batch size 8" in shown
    assert "gentle" in shown
    assert {line["seed"] for line in lines(tmp_path / "a")} == {"7", "8"}
    main(
        [
            "bench",
            bench,
            "--out",
            str(tmp_path / "b"),
            "--workers=1",
            "--methods=read",
            "--seeds=7,8",
            "--samples",
            "20",
        ]
    )
    capsys.readouterr()
    main(["bench", "--compare", f"{out}:source", f"{tmp_path / 'b'}:read"])
    shown = capsys.readouterr().out
    assert "difference" in shown
    assert "12" in shown  # pairs: 3 rows, 2 seeds, 2 sources
    assert "| p |" in compare_runs(f"{out}:source", f"{tmp_path / 'b'}:read")
    assert compare_runs(out, out).count("+0.00") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Expected a benchmark, digits-avc, kinetics50-c, vggsound-c or an import path"),
        (["toys"], "Expected a benchmark first, digits-avc, .* such as my_package.MyBenchmark, .* but got 'toys'"),
        (["--workers", "1", "B"], "Expected a benchmark first, .* and the options after it, but got '1'"),
        (["--learning-rate", "0.1", "B"], "Expected a benchmark first, .* but got '0.1'"),
        (["--config", "./run.yaml", "B"], "Expected a benchmark first, .* but got './run.yaml'"),
        (["--config", "run.yaml", "digits-avc"], "Expected a benchmark first, .* but got 'run.yaml'"),
        (["tests.toybench.Nothing"], "tests.toybench has no Nothing"),
        (["tests.toy.Toy"], "Expected tests.toy.Toy to be a Benchmark"),
        (["B", "--methods", "tent,sources"], "Expected `methods` to be among source, .* but got sources"),
        (["B", "--methods", "tent,tent"], "Expected `methods` to have one at least, and each once, but got tent, tent"),
        (["B", "--methods", "[]"], "Expected `methods` to have one at least, and each once, but got none"),
        (["B", "--protocol", "[]"], "Expected `protocol` to have one at least, and each once, but got none"),
        (["B", "--seeds", "1,1"], "Expected `seeds` to have one at least, and each once, but got 1, 1"),
        (["B", "--workers", "0"], "Expected `workers` to be an integer >= 1, but got 0"),
        (
            ["B", "--methods", "x", "--variants", '{"x": {"method": "abpem", "options": {"memory_samples": "32"}}}'],
            "Expected `memory_samples` to be an integer >= 1, but got '32'",
        ),
        (
            ["B", "--variants", '{"x": {"method": "abpem", "options": {"memory_samples": 8, "memory_batches": 1}}}'],
            "Expected `memory_samples` or `memory_batches`, which say the same, but got both",
        ),
        (["digits-avc", "--pairs", "0"], "Expected `pairs` to be an integer >= 1, but got 0"),
        (["B", "--protocol", "idd"], "Expected `protocol` to be one of clean, iid"),
        (["B", "--severity", "6"], r"Expected `severity` in \[1, 5\], but got 6"),
        (["B", "--severity", "high"], "Expected `severity` to be an integer or several with commas, but got 'high'"),
        (["B", "--seeds", "9"], "Expected `seeds` to be how many of .* or a list, but got 9"),
        (["B", "--batch-size", "0"], r"Expected `batch_size` in \[1, "),
        (["B", "--sources", "three"], r"Expected `sources` to be among one, two, but got \['three'\]"),
        (["B", "--sample", "3"], "--sample"),
        (
            ["B", "--kinds", "fog", "haze", "audio:fog"],
            "among those of image: fog, gaussian_noise; of audio: wind; but got haze, audio:fog",
        ),
        (["B", "--kinds", "fog,fog"], "Expected `kinds` to have one at least, and each once, but got fog, fog"),
        (["B", "--kinds"], "--kinds"),
        (["B", "--device", "cpu", "wind"], "wind"),
        (["B", "--variants", '{"x": {"method": "tant"}}'], "Expected `method` to be one of source, tent"),
        (["B", "--variants", '{"x": {"method": "tent", "options": {"kk": 1}}}'], r"but got \['kk'\]"),
        (["B", "--variants", '{"x": {"method": "tent", "options": {"restore": false}}}'], r"but got \['restore'\]"),
        (["B", "--variants", '{"x": {"method": "tent", "options": {"report": "x.html"}}}'], r"but got \['report'\]"),
        (["B", "--variants", '{"x": {"methd": "tent"}}'], "Expected variant 'x' to have a `method` and its `options`"),
        (
            ["B", "--methods", "x", "--variants", '{"x": {"method": "abpem", "options": {"k": -1}}}'],
            "Expected `k` to be",
        ),
        (
            ["B", "--methods", "x", "--variants", '{"x": {"method": "tent", "options": {"learning_rate": "fast"}}}'],
            "Expected `learning_rate` to be a finite number above 0, but got 'fast'",
        ),
        (["B", "--device", "cuda:7"], "Expected `device` to be one that torch has here, but got 'cuda:7'"),
        (["--compare", "no", "where"], "Expected no to be the folder of a finished run"),
        (["B", "--compare", "no", "where"], "Expected --compare alone"),
    ],
)
def test_errors_of_the_command(tmp_path, capsys, arguments, words):
    arguments = ["tests.toybench.ToyBench" if word == "B" else word for word in arguments]
    if arguments and "--compare" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out" / "cells").exists() or not files(tmp_path / "out" / "cells")


def test_comparing_runs_on_other_data(tmp_path):
    run(tmp_path / "a", methods="source")
    run(tmp_path / "b", methods="source", arguments={"samples": 20})
    with pytest.raises(
        ValueError, match="Expected two runs on the same data, but `arguments.samples` is 24 in .* and 20"
    ):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))


def test_comparing_methods_that_are_not_there(tmp_path):
    run(tmp_path / "a", methods="source")
    run(tmp_path / "b", methods="read")
    with pytest.raises(ValueError, match="Expected a method of source, but got tent of .*a:tent"):
        compare_runs(f"{tmp_path / 'a'}:tent", f"{tmp_path / 'b'}:read")
    with pytest.raises(ValueError, match="Expected a method of read, but got source of .*b"):
        compare_runs(f"{tmp_path / 'a'}:source", str(tmp_path / "b"))
    with pytest.raises(ValueError, match="Expected runs with a method in common"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))


def interrupted(out, workers):
    words = [sys.executable, "-m", "tests.interrupted", str(out), str(workers)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=root, env=os.environ, start_new_session=True)
    assert ended.returncode == 130, ended.stderr
    assert "the same command goes on from here" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_an_interrupt_of_workers_that_start_is_as_quiet_as_later_ones(tmp_path):
    """They get Ctrl-C too, while they import, when no handler of ours is there yet."""
    interrupted(tmp_path, workers=2)


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on(tmp_path):
    """A real process, which gets a signal when its first cell is there."""
    interrupted(tmp_path, workers=1)
    kept = files(tmp_path / "cells")
    assert kept
    run(tmp_path, methods="source,abpem", seeds=5)
    assert kept.items() <= files(tmp_path / "cells").items()


def test_find_variants_prefers_ones_own():
    own = {"abpem": Variant("abpem", {"k": 1})}
    assert find_variants(["source", "abpem"], own)["abpem"].options == {"k": 1}


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
