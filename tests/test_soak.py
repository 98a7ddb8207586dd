"""Hundreds of updates on batches of varying shapes leave nothing behind; `make soak` takes 50,000 in each way."""

import gc
import logging

import pytest
import torch

from benchmarks.costs.soak import Model, Reading, Shapes, growth, slower, soak, soak_together


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()  # what there is by now need not be looked through each time
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["attach", "Trainer"])
def test_nothing_grows(way):
    readings = soak(way, updates=400, every=20)
    assert readings[-1].updates == 400
    assert readings[-1].longest == 64  # kinds of shapes, of which there are more
    assert not growth(readings, warm=200)


@pytest.mark.slow
def test_nothing_grows_in_two_processes():
    both = soak_together("Trainer", updates=100, every=10, processes=2)
    assert [readings[-1].updates for readings in both] == [100, 100]
    assert [growth(readings, warm=40) for readings in both] == [[], []]


def test_what_is_kept_is_found(monkeypatch):
    kept, forward = [], Model.forward

    def keep(self, *args):
        kept.append([torch.zeros(3)])
        return forward(self, *args)

    monkeypatch.setattr(Model, "forward", keep)
    found = growth(soak("attach", updates=40, every=4), warm=8)
    assert {"objects", "tensors"} <= {word.split(":")[0] for word in found}


def test_growth_and_time_by_hand():
    flat = [Reading(i, 100.0, 1000 + i % 3, 50, 9, 0, 64, 2.0) for i in range(12)]
    assert growth(flat, warm=4) == slower(flat) == []
    steep = [reading._replace(memory=100.0 + i, files=9 + i, milliseconds=2.0 + i) for i, reading in enumerate(flat)]
    assert growth(steep, warm=4) == ["memory: 105.5 to 109.5", "files: 14.5 to 18.5"]
    assert slower(steep) == ["time of a step: 6.00 to 12.00 ms"]
    with pytest.raises(ValueError, match="Expected four readings or more after 10 updates, but got 2"):
        growth(flat, warm=10)


def test_shapes_vary_and_are_the_same_every_time():
    shapes = [[x.shape for x in batch] for batch in Shapes(300)]
    assert shapes == [[x.shape for x in batch] for batch in Shapes(300)]
    assert len({(audio[1], video[1]) for audio, video in shapes}) > 64
