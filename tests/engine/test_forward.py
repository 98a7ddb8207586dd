"""The engine's own passes: gradients read what a pass made of the model's state."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

from lightning_abpem import ABPEM
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method, record_of
from tests.toy import MODALITIES, PAPER, Toy, batches, make_toy


class Scales(Toy):
    """Multiplies by a buffer that each call edits in place."""

    scale: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, audio, video):
        logits = super().forward(audio, video)
        with torch.no_grad():
            self.scale.add_(1)
        return logits * self.scale


class Twice(Method):
    """Two passes, of which the gradients need the first."""

    name = "Twice"

    def loss(self, step):
        return step.logits.square().mean(), record_of(step.logits.square().mean(), step.logits)

    def gradients(self, step, rerun):
        rerun()
        return super().gradients(step, rerun)


def test_gradients_of_an_earlier_pass_that_would_read_other_values_raise():
    model = Scales().eval()
    callback = TestTimeAdaptation(Twice(), "fusion.*.attn")
    message = "Expected a forward that gradients can go back through.* in place"
    with pytest.raises(ValueError, match=message), torch.no_grad(), callback.attach(model):
        model(*batches(1)[0])
    assert model.scale == 1


@pytest.mark.parametrize("replay", [True, False])
def test_a_cache_of_parametrizations_around_the_loop_changes_nothing(replay):
    """Neither the weights before a step are in it, nor those with a graph of a pass that is over."""
    outputs = []
    for cache in (nullcontext, parametrize.cached):
        model = make_toy()
        parametrizations.weight_norm(model.fusion[0].attn.qkv)
        parametrizations.weight_norm(model.audio.embed)
        model.eval()
        adapting = ABPEM("fusion.*.attn", MODALITIES, replay=replay, **PAPER).attach(model)
        with torch.no_grad(), adapting as adaptation, cache():
            outputs.append([model(*batch) for batch in batches(4)])
        assert adaptation.updates == 4
    assert all(map(torch.equal, *outputs))
