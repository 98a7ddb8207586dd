"""Averages of records."""

import pytest
import torch

from lightning_abpem.metrics import RecordMean


def test_it_is_the_sample_weighted_mean_of_what_is_finite():
    mean = RecordMean(["a", "b"])
    steps = [(1.0, 2.0, 4), (3.0, float("nan"), 2), (5.0, float("inf"), 1), (7.0, 6.0, 3)]
    for a, b, samples in steps:
        mean.update({"a": torch.tensor(a), "b": torch.tensor(b), "more": torch.tensor(0.0)}, samples)
    result = mean.compute()
    assert set(result) == {"a", "b"}
    assert result["a"].item() == pytest.approx((4 + 6 + 5 + 21) / 10)
    assert result["b"].item() == pytest.approx((8 + 18) / 7)


def test_two_halves_merge_into_the_whole():
    """What a reduction over processes does: the states are sums."""
    values = torch.rand(10)
    whole, halves = RecordMean(["a"]), [RecordMean(["a"]), RecordMean(["a"])]
    for i, value in enumerate(values):
        whole.update({"a": value}, i + 1)
        halves[i % 2].update({"a": value}, i + 1)
    halves[0].merge_state(halves[1])
    assert halves[0].compute()["a"].item() == pytest.approx(whole.compute()["a"].item())


def test_nothing_finite():
    mean = RecordMean(["a"])
    mean.update({"a": torch.tensor(float("nan"))}, 3)
    assert mean.compute()["a"].isnan()
