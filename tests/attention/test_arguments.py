"""The parts of a call's arguments that tell one kind of batch from another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_abpem.attention.arguments import changed_values, describe


def same(a, b):
    return describe((a,), {}) == describe((b,), {})


def test_the_batch_does_not_count():
    assert same(torch.ones(2, 6, 3), torch.zeros(4, 6, 3))
    assert not same(torch.ones(2, 6, 3), torch.ones(2, 5, 3))
    assert same(np.ones((2, 6)), np.ones((3, 6)))
    assert not same(np.ones((2, 6)), np.ones((2, 5)))
    assert same(torch.tensor([1]), torch.tensor([2]))
    assert not same(torch.tensor(1), torch.tensor(2))


@pytest.mark.parametrize(
    ("a", "b"),
    [(1, 2), (1, True), (1, 1.0), ("a", b"a"), (None, "None"), ([1], (1,)), ({"a": 1}, {"b": 1}), (1 + 0j, 1.0)],
)
def test_scalars_count_by_kind_and_value(a, b):
    assert same(a, a)
    assert not same(a, b)


def test_what_is_always_the_same():
    assert same(float("nan"), float("nan"))
    assert same({"b", "a"}, {"a", "b"})
    assert same(nn.Linear(2, 2), nn.Linear(2, 2))
    assert same(lambda: 1, lambda: 2)
    assert same(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert same(torch.ones((), device="meta"), torch.ones((), device="meta"))
    a, b = SimpleNamespace(rate=1), SimpleNamespace(rate=1)
    a.itself, b.itself = a, b
    assert same(a, b)
    b.rate = 2
    assert not same(a, b)


def test_places_of_what_differs():
    def arguments(rate, size=3):
        return describe((torch.ones(2, size), SimpleNamespace(rate=rate)), {"names": ["a", f"b{rate}"]})

    assert changed_values(arguments(1), arguments(1)) == []
    assert changed_values(arguments(1), arguments(2)) == ["args[1].rate", "kwargs['names'][1]"]
    assert changed_values(arguments(1), arguments(2, size=4)) == []
    assert changed_values({}, arguments(1)) == []


def test_long_values_are_not_kept():
    described = describe((b"x" * 10**6, ["y" * 10**6]), {})
    assert len(repr(described)) < 2000
    assert not same("y" * 10**6, "y" * (10**6 - 1) + "z")
    assert same("\ud800" * 200, "\ud800" * 200)
