"""`abpem bench` with chosen kinds of corruptions."""

import json
import pickle
from functools import partial
from itertools import product

import pytest

from lightning_abpem.bench.command import _make, compare_runs
from lightning_abpem.cli import main
from tests.bench.runs import cells_in, files, lines, run
from tests.toybench import ToyBench


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
