"""The engine's own passes: gradients read what a pass made of the model's state."""

import pytest
import torch

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method, record_of
from tests.toy import Toy, batches


class Scales(Toy):
    """Multiplies by a buffer that each call edits in place."""

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
