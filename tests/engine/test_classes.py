"""A head whose number of classes changes from batch to batch, such as one over the names that a batch asks for."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.engine.watch import Watch
from lightning_abpem.methods import EATA, SAR, Tent
from lightning_abpem.methods.stream import extend_stream
from lightning_abpem.modules.patches import Changes
from tests.toy import MODALITIES, WIDTH, Toy, batches

CLASSES = (4, 4, 5, 6, 6, 4)


class Zeroshot(Toy):
    """Classifies by the vectors of as many names as a batch asks for."""

    names: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("names", torch.randn(6, WIDTH))

    def forward(self, audio: Any, video: Any, classes: int = 6) -> torch.Tensor:
        tokens = self.fusion(torch.cat((self.audio(audio), self.video(video)), 1))
        return tokens.mean(1) @ self.names[:classes].T


METHODS = {
    "ABPEM": lambda **own: ABPEM("fusion.*.attn", MODALITIES, balance="stream", **own),
    "ABPEM, memory": lambda **own: ABPEM("fusion.*.attn", MODALITIES, memory_batches=3, **own),
    "Tent": Tent,
    "EATA": lambda **own: EATA(entropy_margin=1.0, redundancy=1.0, **own),
    "SAR": lambda **own: SAR(entropy_margin=1.0, **own),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_every_batch_is_adapted_to(make):
    torch.manual_seed(0)
    model, callback = Zeroshot().eval(), make(monitor="source", guard="rollback", on_error="raise")
    with torch.no_grad(), callback.attach(model) as adaptation:
        for batch, classes in zip(batches(len(CLASSES)), CLASSES, strict=True):
            assert model(*batch, classes).shape[1] == classes
    assert (adaptation.updates, adaptation.skipped) == (len(CLASSES), 0)


def test_means_over_the_stream_begin_anew():
    first, other = torch.randn(3, 4), torch.randn(3, 5)
    for one, two in zip(extend_stream(extend_stream(None, first), other), extend_stream(None, other), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    watch, fresh = Watch(), Watch()
    watch.see(first, first.flip(0))
    assert watch.see(other, other.flip(0)) == fresh.see(other, other.flip(0))
    assert watch.state() is not None


def test_the_memory_is_held_against_logits_of_as_many_classes_alone():
    block = nn.Identity()
    memory = TokenMemory(block, "block", 3)
    for classes, expected in ((4, False), (5, False), (5, True)):
        with Changes() as changes:
            memory.attach(changes, {})
            block(torch.ones(2, 1, 1))
        memory.verify(torch.ones(memory.samples + 2, classes))
        memory.expect(torch.ones(2, classes))
        memory.push()
        assert memory.verified is expected
