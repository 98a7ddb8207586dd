"""The weights that move, by themselves: steps, narrow dtypes, the way back."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_abpem.engine.weights import AdaptedWeights, all_finite

SGD = partial(torch.optim.SGD, lr=1e-4)
LOSS = torch.zeros(())


@pytest.fixture(autouse=True, params=[False, True], ids=["host", "device"])
def _reading_waits(request, monkeypatch):
    """Steps that the host decides on, and those on a device that nobody waits for."""
    monkeypatch.setattr("lightning_abpem.engine.weights.reading_waits", lambda x: request.param)


def ones(dtype=torch.float32):
    return [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.full((2,), 2.0, dtype=dtype))]


def named(params):
    return {str(i): p for i, p in enumerate(params)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_small_steps_add_up(dtype):
    """A hundred steps of 1e-4: each is lost on a bfloat16 1.0, all of them together are not."""
    params = ones(dtype)
    weights = AdaptedWeights(named(params), SGD)
    for _ in range(100):
        assert weights.step([torch.ones(3, dtype=dtype), None], LOSS)
    assert params[0].tolist() == pytest.approx([0.99] * 3, abs=4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.equal(params[1], torch.full((2,), 2.0, dtype=dtype))
    assert all(p.grad is None for p in params)
    weights.restore()
    assert torch.equal(params[0], torch.ones(3, dtype=dtype))


def test_a_reset_forgets_the_momentum():
    params = ones()
    weights = AdaptedWeights(named(params), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    gradients = [torch.ones(3), torch.ones(2)]
    weights.step(gradients, LOSS)
    first = params[0].clone()
    weights.step(gradients, LOSS)
    weights.reset()
    weights.step(gradients, LOSS)
    assert torch.equal(params[0], first)


def test_an_overflowing_step_is_taken_back():
    params = ones()
    weights = AdaptedWeights(named(params), partial(torch.optim.SGD, lr=1e30))
    assert not weights.step([torch.full((3,), 1e30), None], LOSS)
    assert torch.equal(params[0], torch.ones(3))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_a_step_that_is_not_finite_leaves_the_moments_as_they_were(kind, fused):
    """A stream with a bad batch in it ends where one without that batch does, whoever skips it."""
    ends = []
    for with_bad in (True, False):
        params = ones()
        weights = AdaptedWeights(named(params), partial(kind, lr=0.1, fused=fused))
        for value in (1.0, float("nan"), -3.0, 2.0):
            gradients = [torch.full((3,), value), torch.full((2,), value)]
            if value == value or with_bad:
                assert bool(weights.step(gradients, LOSS)) == (value == value)
        ends.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("fused", [True, False])
def test_autograd_knows_of_a_step(fused):
    """A fused kernel does not tell it: a backward through a forward before the step would be silently wrong."""
    params = ones()
    weights = AdaptedWeights(named(params), partial(torch.optim.Adam, lr=0.1, fused=fused))
    output = params[0].square().sum()
    weights.step([torch.ones(3), None], LOSS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_the_way_back_writes_nothing_where_nothing_moved():
    """A graph that the user keeps, of a run with steps=0, is as good as before."""
    params = ones()
    weights = AdaptedWeights(named(params), SGD)
    loss = (params[0] * params[0]).sum()
    weights.restore()
    loss.backward(retain_graph=True)
    weights.step([torch.ones(3), torch.ones(2)], LOSS)
    weights.restore()
    assert all(map(torch.equal, params, ones()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_hides_the_gradients_of_the_user():
    params = ones()
    params[0].grad = own = torch.full((3,), 5.0)
    weights = AdaptedWeights(named(params), SGD)
    weights.step([torch.ones(3), torch.ones(2)], LOSS)
    assert params[0].grad is own
    assert params[1].grad is None
    assert torch.equal(own, torch.full((3,), 5.0))
    assert torch.equal(params[0], 1 - 1e-4 * torch.ones(3))


def test_steps_are_counted_once_they_are_settled():
    params = ones()
    weights = AdaptedWeights(named(params), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert weights.settle() is None
    for loss, taken in ((0.0, True), (float("nan"), False), (1.0, True)):
        weights.step([torch.ones(3), None], torch.tensor(loss))
        assert weights.settle() is taken
        assert weights.settle() is None
    assert (weights.updates, weights.skips.total, weights.updates_since_reset) == (2, 1, 2)
    weights.reset()
    assert (weights.updates, weights.updates_since_reset) == (2, 0)


def test_moments_that_ruin_the_weights_are_forgotten():
    params = ones()
    weights = AdaptedWeights(named(params), partial(torch.optim.SGD, lr=1.0, momentum=0.9))
    weights.step([torch.full((3,), 3e38), None], LOSS)  # from 1 to -3e38
    weights.settle()
    weights.step([torch.full((3,), 3e38), None], LOSS)  # past the largest float
    assert weights.settle() is False
    before = params[0].clone()
    weights.step([torch.ones(3), None], LOSS)
    assert weights.settle() is True
    assert torch.equal(params[0], before - 1)


def test_all_finite():
    assert all_finite(torch.ones(2), None, torch.zeros(1))
    assert not all_finite(torch.ones(2), torch.tensor([1.0, float("nan")]))
    assert not all_finite(torch.tensor(float("inf")))
    assert all_finite(torch.empty(0), torch.zeros(1))
    assert all_finite(torch.empty(0), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    x = torch.full((40, 37), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x, -x, torch.zeros(3))
    x[20, 3] = float(value)
    assert not all_finite(torch.zeros(3), x)
