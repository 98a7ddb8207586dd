"""Bounds on a step and on the way from the source, against the equations written out."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_abpem.engine.limits import Limits, way
from lightning_abpem.engine.weights import AdaptedWeights
from lightning_abpem.methods import Tent
from tests.toy import batches, make_toy

LOSS = torch.zeros(())


@pytest.fixture(autouse=True, params=[False, True], ids=["host", "device"])
def _reading_waits(request, monkeypatch):
    """Steps that the host decides on, and those on a device that nobody waits for."""
    monkeypatch.setattr("lightning_abpem.engine.weights.reading_waits", lambda x: request.param)


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,))]


def weights_of(params, lr=0.1, **limits):
    named = {str(i): p for i, p in enumerate(params)}
    return AdaptedWeights(named, partial(torch.optim.SGD, lr=lr), limits=Limits(**limits))


@pytest.mark.parametrize("greatest", [0.01, 1.0, 1e6])
def test_gradients_are_clipped_as_torch_does(greatest):
    params, twins = pair(), pair()
    gradients = [torch.full_like(p, 0.7) for p in params]
    assert weights_of(params, clip_gradients=greatest).step([*gradients], LOSS)
    optimizer = torch.optim.SGD(twins, lr=0.1)
    for twin, gradient in zip(twins, gradients, strict=True):
        twin.grad = gradient.clone()
    nn.utils.clip_grad_norm_(twins, greatest)
    optimizer.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.data, twin.data, rtol=1e-6, atol=1e-7)  # torch adds 1e-6 to the length


def test_a_parameter_without_a_gradient_stays_when_others_are_clipped():
    params = pair()
    before = params[1].detach().clone()
    assert weights_of(params, clip_gradients=0.1).step([torch.ones_like(params[0]), None], LOSS)
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_clipping_hides_no_broken_gradient(broken):
    params = pair()
    before = [p.detach().clone() for p in params]
    weights = weights_of(params, clip_gradients=0.1)
    assert not weights.step([torch.full_like(params[0], broken), torch.ones_like(params[1])], LOSS)
    assert all(torch.equal(p, own) for p, own in zip(params, before, strict=True))


def test_the_anchor_pulls_after_every_step():
    """Theta <- (1 - a) (theta - lr g) + a theta_0, five times."""
    params, a, lr = pair(), 0.2, 0.1
    start = [p.detach().clone() for p in params]
    weights = weights_of(params, lr, anchor=a)
    expected = [p.clone() for p in start]
    for i in range(5):
        gradients = [torch.full_like(p, i + 1.0) for p in start]
        assert weights.step(gradients, LOSS)
        expected = [(1 - a) * (x - lr * g) + a * s for x, g, s in zip(expected, gradients, start, strict=True)]
    for p, own in zip(params, expected, strict=True):
        torch.testing.assert_close(p.data, own, rtol=1e-12, atol=1e-12)
    weights.restore()
    assert all(torch.equal(p, own) for p, own in zip(params, start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_stay_within_the_greatest_way(dtype):
    params = pair(dtype)
    start = [p.detach().clone().double() for p in params]
    weights = weights_of(params, 1.0, max_drift=0.5)
    assert weights.step([torch.ones_like(p) for p in params], LOSS)
    moved = [p.detach().double() - s for p, s in zip(params, start, strict=True)]
    length = torch.cat([x.flatten() for x in moved]).norm() / torch.cat([x.flatten() for x in start]).norm()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert length.item() == pytest.approx(0.5, abs=tolerance)
    assert weights.drift.item() == pytest.approx(0.5, abs=tolerance)
    if dtype == torch.float64:  # straight back: all values went down alike
        values = torch.cat([x.flatten() for x in moved])
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", ["max_step", "max_drift"])
def test_weights_within_the_bound_are_left_alone(bound):
    params, twins = pair(), pair()
    gradients = [torch.ones_like(p) for p in params]
    weights_of(params, 1e-3, **{bound: 0.5}).step([*gradients], LOSS)
    weights_of(twins, 1e-3).step([*gradients], LOSS)
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_step_is_longer_than_the_greatest(dtype):
    """Three steps of SGD, each scaled to a tenth of the source's length; a fourth is short enough as it is."""
    params = pair(dtype)
    start = torch.cat([p.detach().double().flatten() for p in params])
    weights = weights_of(params, 1.0, max_step=0.1)
    expected = start
    for size in (7.0, -7.0, 7.0, 1e-3):
        assert weights.step([torch.full_like(p, size) for p in params], LOSS)
        step = torch.full_like(start, -size)
        expected = expected + step * min(1, 0.1 * start.norm().item() / step.norm().item())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    seen = torch.cat([p.detach().double().flatten() for p in params])
    torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("times", [1e3, 1e5, 1e6, 1e7, 1e8, 1e12])
@pytest.mark.parametrize("bound", ["max_step", "max_drift"])
def test_however_long_a_step_would_be_it_is_as_long_as_its_bound(bound, times):
    """In float32, where 1 - 1e-8 is 1."""
    params = pair(torch.float32)
    start = torch.cat([p.detach().double().flatten() for p in params])
    weights = weights_of(params, times, **{bound: 0.1})
    assert weights.step([torch.ones_like(p) for p in params], LOSS)
    moved = torch.cat([p.detach().double().flatten() for p in params]) - start
    assert (moved.norm() / start.norm()).item() == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=1e-4, atol=0)


def test_a_step_is_bounded_before_the_anchor_pulls():
    params, a = pair(), 0.2
    start = [p.detach().clone() for p in params]
    assert weights_of(params, 1.0, max_step=0.1, anchor=a).step([torch.ones_like(p) for p in params], LOSS)
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(params, start, strict=True)])
    assert (moved.norm() / torch.cat([x.flatten() for x in start]).norm()).item() == pytest.approx((1 - a) * 0.1)


@pytest.mark.parametrize("bound", ["max_step", "max_drift"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_bound_hides_no_broken_step(bound, broken):
    params = pair()
    before = [p.detach().clone() for p in params]
    weights = weights_of(params, torch.finfo(torch.float64).max, **{bound: 0.1})
    gradients = [torch.full_like(params[0], broken), torch.full_like(params[1], 1e300)]
    assert not weights.step(gradients, LOSS)
    assert not weights.step([torch.full_like(p, 1e300) for p in params], LOSS)  # finite, and its step is not
    assert all(torch.equal(p, own) for p, own in zip(params, before, strict=True))


def test_the_way_from_a_source_of_zeros_is_its_own_length():
    assert way([torch.full((4,), 3.0)], [torch.zeros(4)], [torch.zeros(4)]).item() == 6.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_gradients", 0),
        ("clip_gradients", float("nan")),
        ("clip_gradients", True),
        ("max_step", 0),
        ("max_step", float("nan")),
        ("max_drift", -1),
        ("max_drift", "far"),
        ("anchor", 1),
        ("anchor", -0.1),
        ("anchor", None),
        ("learning_rate", 0),
        ("learning_rate", float("inf")),
        ("learning_rate", "fast"),
        ("monitor", 0),
        ("monitor", True),
        ("monitor", "model"),
        ("guard", "on"),
        ("guard", None),
    ],
)
def test_what_an_option_cannot_be(option, value):
    with pytest.raises(ValueError, match=f"Expected `{option}` to be .*{value!r}"):
        Tent(**{option: value})


def test_a_guard_needs_the_comparison():
    with pytest.raises(ValueError, match="Expected `monitor` .* guard='reset', .* \"off\""):
        Tent(guard="reset", monitor="off")


def test_the_learning_rate_is_that_of_any_optimizer():
    """As if the optimizer had been made with it."""

    def adapted(**options):
        model = make_toy().double()
        with torch.no_grad(), Tent(**options).attach(model) as adaptation:
            for batch in batches(3):
                model(*(x.double() for x in batch))
            return [p.detach().clone() for p in adaptation.params.values()]

    for make in (torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)):
        own = adapted(optimizer=partial(make, lr=7.0), learning_rate=1e-2)
        wanted = adapted(optimizer=partial(make, lr=1e-2))
        assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))
