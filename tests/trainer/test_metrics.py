"""Averages of records."""

import pytest
import torch

from lightning_abpem.trainer.metrics import RecordMean


def test_it_is_the_sample_weighted_mean_of_what_is_finite():
    mean = RecordMean()
    steps = [(1.0, 2.0, 4), (3.0, float("nan"), 2), (5.0, float("inf"), 1), (7.0, 6.0, 3)]
    for a, b, samples in steps:
        mean.update({"a": torch.tensor(a), "b": torch.tensor(b)}, samples)
    result = mean.compute()
    assert set(result) == {"a", "b"}
    assert result["a"].item() == pytest.approx((4 + 6 + 5 + 21) / 10)
    assert result["b"].item() == pytest.approx((8 + 18) / 7)


def test_a_figure_that_not_every_step_has():
    mean = RecordMean()
    for i, record in enumerate(({"a": 1.0}, {"b": 2.0, "a": 3.0}, {"a": 5.0}, {"b": 8.0})):
        mean.update({name: torch.tensor(value) for name, value in record.items()}, i + 1)
    result = mean.compute()
    assert result["a"].item() == pytest.approx((1 + 2 * 3 + 3 * 5) / 6)
    assert result["b"].item() == pytest.approx((2 * 2 + 4 * 8) / 6)


def test_two_halves_add_up_to_the_whole():
    values = torch.rand(10)
    whole, halves = RecordMean(), [RecordMean(), RecordMean()]
    for i, value in enumerate(values):
        record = {"a": value} if i % 2 else {"b": value, "a": value**2}
        whole.update(record, i + 1)
        halves[i % 2].update(record, i + 1)
    halves[1].add(halves[0])
    merged, expected = halves[1].compute(), whole.compute()
    assert set(merged) == {"a", "b"}
    assert all(merged[name].item() == pytest.approx(expected[name].item()) for name in merged)


def test_nothing_finite():
    mean = RecordMean()
    mean.update({"a": torch.tensor(float("nan"))}, 3)
    assert mean.compute()["a"].isnan()
