"""The scale of losses whose gradients pass through float16."""

import pytest
import torch

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.loss_scale import LossScale
from tests.engine.test_adaptation import abpem
from tests.toy import batches, make_toy

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def in_float16(scale):
    with torch.autocast("cpu", torch.float16):
        return scale.of(torch.device("cpu"))


def test_it_is_for_float16_alone():
    scale = LossScale()
    assert scale.of(torch.device("cpu")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert scale.of(torch.device("cpu")) is None
    scale.update(FALSE)
    assert in_float16(scale) == 2**16


def test_it_falls_at_an_overflow_and_grows_after_many_steps():
    """As torch.amp.GradScaler does, but never below 1."""
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    ours = LossScale.like(theirs)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for taken in (True, True, False, True, True, True, True, True, True, False, False):
        assert in_float16(ours) == theirs.get_scale()
        weight.grad = torch.full((1,), 1.0 if taken else torch.inf)
        theirs.scale(torch.zeros(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(TRUE if taken else FALSE)
    for _ in range(20):
        in_float16(ours)
        ours.update(FALSE)
    assert in_float16(ours) == 1


@pytest.mark.parametrize("start", [1.0, 2.0**16])
def test_small_gradients_do_not_vanish(start):
    """Behind a head of 1e-5 they are too small for float16."""
    model = make_toy()
    with torch.no_grad():
        model.head[1].weight.mul_(1e-5)
        model.head[1].bias.mul_(1e-5)
    settings = abpem(attention_weight=0.0, optimizer=lambda params: torch.optim.SGD(params, lr=1e3)).settings
    before = model.fusion[0].attn.qkv.weight.clone()
    with torch.no_grad(), Adaptation(model, settings, scale=LossScale(start)), torch.autocast("cpu", torch.float16):
        model(*batches(1)[0])
        moved = not torch.equal(model.fusion[0].attn.qkv.weight, before)
    assert moved == (start > 1)
