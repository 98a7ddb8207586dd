"""One method on one stream, against a plain loop."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_abpem.bench.cells import Cell, run_cell, stream_of
from lightning_abpem.bench.variants import METHODS, VARIANTS, Variant, find_variants
from lightning_abpem.methods import ABPEM
from tests.bench.runs import CELL
from tests.reference import same_state
from tests.toybench import ToyBench


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
    fitting: Any = Variant("abpem").build(bench, ["audio"], 24, 8)
    assert fitting.settings.method.objective.k == 3
    assert fitting.settings.memory_batches == 2
    own: Any = Variant("abpem", {"k": 4, "memory_samples": 4, "steps": 2}).build(bench, ["image"], 24, 8)
    assert (own.settings.method.objective.k, own.settings.memory_batches, own.settings.steps) == (4, 1, 2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("protocol", "severity", "row"), [("iid", 5, "audio: wind"), ("mixed", 0, "all"), ("missing", 0, "audio missing")]
)
def test_every_method_runs(name, protocol, severity, row, caplog):
    bench = ToyBench()
    found = run_cell(bench, Cell(protocol, severity, row, 111, "two", 4, name), Variant(name), bench.source("two"))
    assert sum(row["samples"] for row in found["rows"]) == 24
    assert found["updates"] + found["skipped"] == (0 if name == "source" else 6)
    assert "not finite" not in caplog.text


@pytest.mark.parametrize("label", VARIANTS)
def test_every_variant_can_be_built(label):
    assert VARIANTS[label].build(ToyBench(), ["image"], 24, 8).settings.method.name


def test_find_variants_prefers_ones_own():
    own = {"abpem": Variant("abpem", {"k": 1})}
    assert find_variants(["source", "abpem"], own)["abpem"].options == {"k": 1}


def test_a_variants_memory_goes_before_the_benchmarks():
    bench = ToyBench()
    for options, held in (({}, 2), ({"memory_batches": 1}, 1), ({"memory_samples": 24}, 3)):
        assert Variant("abpem", options).build(bench, ["image"], 24, 8).settings.memory_batches == held
