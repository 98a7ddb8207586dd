"""Tensors that an earlier run in inference mode has left in places of every kind: as gradients want them, or named."""

import copy
import functools
import sys

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
