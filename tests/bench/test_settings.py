"""Settings that the folder of a run remembers: other settings, source models and data do not mix."""

from pathlib import Path

import pytest
import torch

from lightning_abpem.bench.cells import run_cell
from lightning_abpem.bench.command import compare_runs, run_benchmark
from lightning_abpem.bench.settings import plain
from lightning_abpem.bench.variants import Variant
from tests.bench.runs import CELL, files, run
from tests.toybench import ToyBench


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


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"a": 1, "a": 2}', "{"])
def test_damaged_settings_are_named(tmp_path, content):
    run(tmp_path, methods="source", sources="one")
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"Expected .*settings\.json to "):
        run(tmp_path, methods="source", sources="one")


def test_numbers_that_are_not_finite_are_recorded_as_words():
    assert plain({"a": [float("inf"), float("nan"), 1.0]}) == {"a": ["inf", "nan", 1.0]}
