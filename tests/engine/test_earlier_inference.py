"""Tensors that an earlier run in inference mode has left in places of every kind: as gradients want them, or named."""

import copy
import functools
import sys
from collections import UserDict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import pytest
import torch

from tests.engine.attached import abpem
from tests.toy import Toy, batches

CACHE: dict[str, torch.Tensor] = {}


def made():
    return torch.linspace(0.5, 1.5, 12)


def by_partial(model):
    model.scale_of = functools.partial(lambda x: x, made())


def by_default(model):
    def scale_of(x=made()):  # noqa: B008  (it is what is tried)
        return x

    model.scale_of = scale_of


def by_cache(model):
    model.scale_of = functools.lru_cache(maxsize=4)(made)


def by_variable(model):
    CACHE.clear()

    def scale_of():
        if "scale" not in CACHE:
            CACHE["scale"] = made()
        return CACHE["scale"]

    model.scale_of = scale_of


class Scaled(Toy):
    """Multiplies the tokens, ahead of the fusion, by a scale that it gets somewhere."""

    def forward(self, audio, video):
        x, scale = torch.cat((self.audio(audio), self.video(video)), dim=1), vars(self)["scale_of"]()
        return self.head((self.fusion(x) * scale).mean(1))


def scaled(place):
    """A model that has run under inference mode once, in which the scale was made."""
    torch.manual_seed(0)
    model = Scaled().eval()
    with torch.inference_mode():
        place(model)
        model(*batches(1)[0])
    return model


PLACES = [by_partial, by_default, by_cache, by_variable]


@pytest.mark.parametrize("place", PLACES)
def test_observing_is_a_plain_call(place):
    model = scaled(place)
    with torch.no_grad():
        plain = [model(*batch) for batch in batches(3)]
        with abpem(steps=0).attach(model):
            assert all(torch.equal(model(*batch), x) for batch, x in zip(batches(3), plain, strict=True))


@pytest.mark.parametrize("place", PLACES[:2])
def test_a_tensor_within_reach_has_a_stand_in(place):
    predictions, earlier = [], scaled(place)
    torch.manual_seed(0)
    never = Scaled().eval()  # the same model, whose scale was not made in inference mode
    place(never)
    for model in (earlier, never):
        with torch.no_grad(), abpem().attach(model) as adaptation:
            predictions.append(torch.cat([model(*batch) for batch in batches(3)]))
            assert adaptation.updates == 3
    assert torch.equal(*predictions)
    assert earlier.scale_of().is_inference()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no notes")
@pytest.mark.parametrize("place", PLACES[2:])
def test_a_tensor_out_of_reach_is_explained(place):
    model = scaled(place)
    with pytest.raises(RuntimeError, match="Inference tensors") as error, torch.no_grad(), abpem().attach(model):
        model(*batches(1)[0])
    assert any("Trainer(inference_mode=False)" in note for note in error.value.__notes__)


@dataclass
class Stream:
    state: torch.Tensor


class Pair(NamedTuple):
    hidden: torch.Tensor
    cell: torch.Tensor


class StaticCache:
    """As those of Hugging Face transformers: an object with a layer for each level, which holds tensors."""

    def __init__(self, x):
        self.layers = [SimpleNamespace(keys=x)]


class OfAClass:
    held: ClassVar[dict[str, torch.Tensor]] = {}


def of_a_class(x):
    OfAClass.held["state"] = x
    return OfAClass


def in_a_closure(x):
    return lambda: x


def in_a_cache(held):
    return held()


HELD = {
    "dict in dict": (lambda x: {"session": {"state": x}}, lambda held: held["session"]["state"]),
    "list in dict": (lambda x: {"state": [x]}, lambda held: held["state"][0]),
    "tuple": (lambda x: (x, "text"), lambda held: held[0]),
    "named tuple in a dict": (lambda x: {1: Pair(x, x)}, lambda held: held[1].cell),
    "deque": (lambda x: deque([x], maxlen=2), lambda held: held[0]),
    "dataclass": (Stream, lambda held: held.state),
    "namespace": (lambda x: SimpleNamespace(state=x), lambda held: held.state),
    "UserDict": (lambda x: UserDict(state=x), lambda held: held["state"]),
    "cache": (StaticCache, lambda held: held.layers[0].keys),
    "class": (of_a_class, lambda held: held.held["state"]),
    "closure": (in_a_closure, lambda held: held()),
}


class Stateful(Toy):
    """Adds a running mean of its tokens to them, which it edits in place."""

    def __init__(self, make, read, moves=True):
        super().__init__()
        self.make, self.read, self.moves, self.held = make, read, moves, None

    def forward(self, audio, video):
        x = torch.cat((self.audio(audio), self.video(video)), dim=1)
        if self.held is None:
            self.held = self.make(torch.ones(x.shape[-1]))
        state = self.read(self.held)
        if self.moves:
            state.mul_(0.9).add_(x.detach().mean((0, 1)))
        return self.head(self.fusion(x + state).mean(1))


def after_a_run(mode, *how):
    torch.manual_seed(0)
    model = Stateful(*how).eval()
    with mode():
        model(*batches(1)[0])
    return model


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("held", HELD)
def test_state_of_an_earlier_run_moves_on(held, steps):
    seen = []
    for mode in (torch.no_grad, torch.inference_mode):
        model = after_a_run(mode, *HELD[held])
        with torch.no_grad(), abpem(steps=steps, on_error="raise").attach(model) as adaptation:
            logits = [model(*batch) for batch in batches(4)]
            assert adaptation.updates == 4 * steps
        seen.append((torch.cat(logits), model.read(model.held).clone()))
    assert all(torch.equal(x, expected) for x, expected in zip(seen[1], seen[0], strict=True))


@pytest.mark.parametrize("held", HELD)
def test_what_an_earlier_run_left_is_there_afterwards(held):
    model = after_a_run(torch.inference_mode, *HELD[held], False)
    before, state = model.held, model.read(model.held)
    with torch.no_grad(), abpem().attach(model):
        assert not model.read(model.held).is_inference()
        for batch in batches(2):
            model(*batch)
    assert model.held is before
    assert model.read(model.held) is state


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no notes")
@pytest.mark.parametrize("steps", [0, 1])
def test_state_out_of_reach_that_moves_is_explained(steps):
    model = after_a_run(torch.inference_mode, lambda x: functools.lru_cache(maxsize=1)(lambda: x.clone()), in_a_cache)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor") as error, torch.no_grad():  # noqa: SIM117
        with abpem(steps=steps).attach(model):
            model(*batches(1)[0])
    assert sum("Trainer(inference_mode=False)" in note for note in error.value.__notes__) == 1


class WithoutGradients(Toy):
    """Does with its tokens, behind the fusion, what torch refuses where gradients are on."""

    def forward(self, audio, video):
        x = self.fusion(torch.cat((self.audio(audio), self.video(video)), dim=1))
        vars(self)["use"](x)
        return self.head(x.mean(1))


USES = {
    "numpy": lambda x: x.cpu().numpy(),
    "deepcopy": copy.deepcopy,
    "out": lambda x: torch.mul(x, 2, out=torch.empty_like(x, requires_grad=False)),
    "a part edited in place": lambda x: x.split([1, x.shape[1] - 1], 1)[0].mul_(2),
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no notes")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_gradients_forbid_is_explained(use):
    torch.manual_seed(0)
    model = WithoutGradients().eval()
    vars(model)["use"] = use
    with torch.no_grad():
        model(*batches(1)[0])
        with pytest.raises(RuntimeError) as error, abpem().attach(model):
            model(*batches(1)[0])
        with abpem(steps=0).attach(model):
            model(*batches(1)[0])
    assert any("x.detach().cpu().numpy()" in note for note in error.value.__notes__)
