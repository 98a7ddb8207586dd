"""Stand-ins for a forward: each calls the original of the moment, and lets go of it."""

import functools
import inspect
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.modules.stand_ins import StandIn, hides_attribute
from tests.toy import MODALITIES, PAPER, Toy, batches, make_toy


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


class Trebles(Doubles):
    def forward(self, x):
        return super().forward(x) * 1.5


class Static(nn.Module):
    forward = staticmethod(lambda x: -x)


def plus_one(forward, *args):
    return forward(*args) + 1


@pytest.mark.parametrize(("kind", "given"), [(Doubles, 2), (Trebles, 3), (Static, -1)])
def test_the_original_is_that_of_the_class_of_the_moment(kind, given):
    module = Doubles()
    stand_in = StandIn(module, "forward", plus_one)
    stand_in.place()
    assert module(1) == 3
    assert inspect.signature(module.forward) == inspect.signature(Doubles().forward)
    module.__class__ = kind
    assert module(1) == given + 1
    stand_in.put_back()
    assert module(1) == given


def test_what_others_put_in_its_place_stays():
    module = Doubles()
    stand_in = StandIn(module, "forward", plus_one)
    stand_in.place()
    module.forward = functools.partial(plus_one, module.forward)
    assert module(1) == 4
    again = stand_in.renewed()
    again.place()
    assert module(1) == 5
    for own in (stand_in, again, stand_in):  # the order does not matter
        own.put_back()
    assert module.forward.func is plus_one


def test_a_property_hides_what_stands_in():
    class Property(nn.Module):
        forward = property(lambda self: None)

    assert hides_attribute(Property(), "forward")
    assert not hides_attribute(Doubles(), "forward")


class Keeps(Toy):
    """Keeps its own forward and that of an encoder in its first call."""

    def __init__(self):
        super().__init__()
        self.kept: Any = None

    def forward(self, audio, video):
        if self.kept is None:
            self.kept = [self.forward, self.audio.forward]
        return super().forward(audio, video)


def test_a_forward_that_is_kept_elsewhere_is_the_plain_one_after_the_run():
    model = Keeps().eval()
    model.load_state_dict(make_toy().state_dict())
    (batch,) = batches(1)
    with torch.no_grad(), ABPEM("fusion.*.attn", MODALITIES, **PAPER).attach(model):
        model(*batch)
        with pytest.raises(TypeError, match="cannot be copied"):
            deepcopy(model)
    before = deepcopy(model.state_dict())
    with torch.no_grad():
        expected = make_toy()(*batch)
        assert torch.equal(model.kept[0](*batch), expected)
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        copy = deepcopy(model)
        assert copy.kept[0].__self__ is copy
        assert copy.kept[1].__self__ is copy.audio
        assert torch.equal(copy.kept[0](*batch), expected)


def test_a_stand_in_has_what_a_method_has():
    """Code that reads a forward, as to tell whether it was overridden, reads the original."""
    module = Doubles()
    StandIn(module, "forward", plus_one).place()
    own: Any = module.forward
    assert own.__func__ is Doubles.forward
    assert own.__self__ is module
    assert own.__code__ is Doubles.forward.__code__
    assert own.__defaults__ is None
    assert not hasattr(own, "missing")
    assert inspect.getfullargspec(own).args == inspect.getfullargspec(Doubles().forward).args
    with pytest.raises(TypeError, match="cannot be copied or pickled while it adapts"):
        deepcopy(own)
