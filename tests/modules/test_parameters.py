"""Flags and gradients of parameters: the user's, or those of a pass."""

from typing import Any

import torch

from lightning_abpem.modules.parameters import GradientFlags
from tests.toy import make_toy


def flags_of(model):
    return [p.requires_grad for p in model.parameters()]


def test_flags_and_gradients_are_those_of_a_pass_or_the_users_of_the_moment():
    model: Any = make_toy()
    own, frozen = model.head[1].weight, model.audio.embed.weight
    flags = GradientFlags(model, [own, frozen])
    frozen.requires_grad_(False)
    own.grad = kept = torch.ones_like(own)
    for _ in range(2):
        before = flags_of(model)
        flags.freeze()
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(own), id(frozen)}
        assert {id(p) for p, flag in zip(model.parameters(), before, strict=True) if flag} - {id(own)} == flags.frozen
        assert own.grad is None
        flags.thaw()
        assert flags_of(model) == before
        assert own.grad is kept
        assert not flags.frozen
        model.video.requires_grad_(False)  # as a forward may
        own.grad = kept = torch.zeros_like(own)


def test_a_pass_that_was_broken_off_is_not_taken_for_the_user():
    model = make_toy()
    flags = GradientFlags(model, [model.head[1].weight])
    before = flags_of(model)
    flags.freeze()
    flags.freeze()
    flags.thaw()
    flags.thaw()
    assert flags_of(model) == before
