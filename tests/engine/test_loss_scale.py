"""The scale of losses whose gradients pass through float16."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.engine.loss_scale import LossScale, passes_float16
from lightning_abpem.methods import READ, Tent
from tests.engine.attached import abpem
from tests.toy import batches, make_toy

SGD = partial(torch.optim.SGD, lr=1e3)
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def in_float16(scale):
    with torch.autocast("cpu", torch.float16):
        return scale.of(torch.zeros(2, 3), [])


def test_it_is_for_float16_alone():
    scale = LossScale()
    assert scale.of(torch.zeros(2, 3), []) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert scale.of(torch.zeros(2, 3), []) is None
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


class WithinForward(nn.Module):
    """A model that opens autocast in its own forward, as many that are published do."""

    def __init__(self, toy, where, dtype=torch.float16):
        super().__init__()
        self.toy, self.where, self.dtype = toy, where, dtype

    def forward(self, audio, video):
        with torch.autocast("cpu", self.dtype):
            if self.where == "all":  # float16 logits
                return self.toy(audio, video)
            if self.where == "float logits":
                return self.toy(audio, video).float()
            tokens = self.toy.fusion(torch.cat((self.toy.audio(audio), self.toy.video(video)), 1))
        return self.toy.head(tokens.float().mean(1))


def faint_toy():
    """Behind a head of 1e-5 gradients are too small for float16."""
    model = make_toy()
    with torch.no_grad():
        model.head[1].weight.mul_(1e-5)
        model.head[1].bias.mul_(1e-5)
    return model


@pytest.mark.parametrize("start", [1.0, 2.0**16])
def test_small_gradients_do_not_vanish(start):
    model = faint_toy()
    settings = abpem(attention_weight=0.0, optimizer=SGD).settings
    before = model.fusion[0].attn.qkv.weight.clone()
    with torch.no_grad(), Adaptation(model, settings, scale=LossScale(start)), torch.autocast("cpu", torch.float16):
        model(*batches(1)[0])
        moved = not torch.equal(model.fusion[0].attn.qkv.weight, before)
    assert moved == (start > 1)


METHODS: dict[str, Any] = {
    "abpem": partial(abpem, fusion="toy.fusion.*.attn", attention_weight=0.0),
    "read": partial(READ, "toy.fusion.*.attn"),  # whose attention calls are not watched
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["all", "float logits", "float head"])
@pytest.mark.parametrize("start", [1.0, 2.0**16])
def test_nor_under_an_autocast_inside_the_forward(name, where, start):
    model = WithinForward(faint_toy(), where).eval()
    weight = model.toy.fusion[0].attn.qkv.weight
    before = weight.clone()
    settings = METHODS[name](optimizer=SGD).settings
    with torch.no_grad(), Adaptation(model, settings, scale=LossScale(start)) as adaptation:
        model(*batches(1)[0])
        moved = not torch.equal(weight, before)
    assert adaptation.updates == 1
    assert moved == (start > 1)


def test_an_overflow_inside_the_forward_halves_the_scale():
    scale = LossScale(2.0**40)
    model = WithinForward(make_toy(), "float head").eval()
    with torch.no_grad(), Adaptation(model, Tent(optimizer=SGD).settings, scale=scale) as adaptation:
        model(*batches(1)[0])
        assert (adaptation.updates, adaptation.skipped) == (0, 1)
    assert scale.value == 2.0**39


def test_what_passes_float16():
    """By `_input_metadata` of autograd's nodes, a private name of torch: without it this fails."""
    args = batches(1)[0]
    for where in ("all", "float logits", "float head"):
        assert passes_float16(WithinForward(make_toy(), where)(*args))
        assert not passes_float16(WithinForward(make_toy(), where, torch.bfloat16)(*args))
    assert not passes_float16(make_toy()(*args))
    assert not passes_float16(make_toy().double()(*(x.double() for x in args)).float())
    wide, half = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.float16)
    assert passes_float16(wide + half * torch.layer_norm(half, (3,), wide, wide))  # without any cast
    with torch.no_grad():
        assert not passes_float16(WithinForward(make_toy(), "all")(*args))  # no gradient passes


def test_weights_of_float16_have_no_scale():
    """As with Lightning's precision="16-true"."""
    weights = [nn.Parameter(torch.ones(3, dtype=torch.float16))]
    logits = (weights[0] * 2).float()  # as many norms have it inside
    assert passes_float16(logits)
    assert LossScale().of(logits, weights) is None
    assert LossScale().of(logits, [nn.Parameter(torch.ones(3)), *weights]) == 2**16  # norms are often kept wide
