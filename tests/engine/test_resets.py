"""Memory, resets and observing through `attach`."""

import pytest
import torch
from torch import nn

from tests.engine.attached import abpem, predictions
from tests.reference import same_state
from tests.toy import (
    FusedAttention,
    batches,
    make_toy,
)


@pytest.mark.parametrize("hides", [False, True])
def test_memory_that_misses_a_bypass(hides):
    """A residual around the remembered module: with a batch of one it broadcasts silently, and is found out."""

    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_toy()

        def forward(self, audio, video):
            x = torch.cat((self.inner.audio(audio), self.inner.video(video)), dim=1)
            logits = self.inner.head((x + self.inner.fusion[0](x)).mean(1))
            return logits.index_fill(1, torch.tensor(4), -torch.inf) if hides else logits

    model = Bypass().eval()
    with pytest.raises(ValueError, match="'inner.fusion.0' to give the same logits again.*memory_at"):
        predictions(model, batches(3, size=1), fusion="inner.fusion.0.attn", memory_batches=2)


def test_memory_needs_a_block():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = FusedAttention()

        def forward(self, x):
            return self.attn(x).mean(1)

    with (
        pytest.raises(ValueError, match="'attn' has no block of its own"),
        abpem(fusion="attn", memory_batches=2).attach(Bare().eval()),
    ):
        pass


def test_memory_at_a_module_that_is_not_called():
    model = make_toy()
    model.unused = nn.Sequential(*model.fusion).eval()
    with pytest.raises(ValueError, match="a module that the target calls, but got 'unused'"):
        predictions(model, batches(1), memory_batches=2, memory_at="unused")


def test_memory_at_a_module_without_the_attention():
    model = make_toy()
    with pytest.raises(ValueError, match="'fusion.0.attn' to attend over stored samples .* it is outside 'audio'"):
        predictions(model, batches(1), memory_batches=2, memory_at="audio")


def test_uneven_batches_in_memory():
    stream = [batches(1, size, seed=size)[0] for size in (4, 1, 3, 2)]
    assert [len(x) for x in predictions(make_toy(), stream, memory_batches=3)] == [4, 1, 3, 2]


def test_episodic_reset():
    stream = batches(3)
    alone = [predictions(make_toy(), [args])[0] for args in stream]
    together = predictions(make_toy(), stream, reset="batch")
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_reset_after_a_number_of_updates():
    stream = batches(5)
    parts = [
        *predictions(make_toy(), stream[:2], memory_batches=2),
        *predictions(make_toy(), stream[2:4], memory_batches=2),
    ]
    whole = predictions(make_toy(), stream, reset=2, memory_batches=2)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=False))


def test_reset_after_a_number_of_samples():
    """Six samples: after batches of 4 and 2, and after one of 7. A step that is not taken counts too."""
    stream = [batches(1, size, seed=size)[0] for size in (4, 2, 7, 1, 1)]
    stream[1][0].fill_(torch.nan)
    parts = [x for part in (stream[:2], stream[2:3], stream[3:]) for x in predictions(make_toy(), part)]
    whole = predictions(make_toy(), stream, reset="6 samples")
    assert all(torch.equal(a, b) or b.isnan().all() for a, b in zip(parts, whole, strict=True))
    assert not torch.equal(whole[-1], predictions(make_toy(), stream)[-1])


def test_observing_moves_nothing():
    model = make_toy()
    with torch.no_grad():
        plain = [model(*args) for args in batches()]
    with torch.no_grad(), abpem(steps=0).attach(model) as adaptation:
        assert all(torch.equal(model(*args), p) for args, p in zip(batches(), plain, strict=True))
        assert adaptation.updates == adaptation.skipped == adaptation.record["updated"] == 0
        assert adaptation.record["entropy"] > 0
        assert "no weight moves" in adaptation.describe()


def test_a_single_sample_is_said_once(caplog):
    predictions(make_toy(), batches(3, size=1))
    assert caplog.text.count("A batch of one sample") == 1


def test_memory_failures_name_the_memory():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_toy()

        def forward(self, audio, video, labels):
            logits = self.inner(audio, video)
            return nn.functional.cross_entropy(logits, labels), logits

    model = WithLoss().eval()
    labelled = [(*args, torch.zeros(4, dtype=torch.long)) for args in batches(2)]
    options = {"fusion": "inner.fusion.*.attn", "logits": lambda output: output[1]}
    assert len(predictions(model, labelled, **options)) == 2
    with pytest.raises(ValueError, match="Expected input batch_size") as caught:
        predictions(model, labelled, memory_batches=2, **options)
    notes = getattr(caught.value, "__notes__", None)  # Python 3.10 has none and logs it
    assert notes is None or "4 stored samples in front of the batch at 'inner.fusion.0'" in notes[0]


def test_observing_is_of_each_batch_by_itself():
    """Also where the loss looks back along the stream."""
    stream = batches(3)
    alone = []
    with torch.no_grad():
        for args in stream:
            with abpem(steps=0, balance="stream").attach(make_toy()) as adaptation:
                adaptation.model(*args)
                alone.append(dict(adaptation.record))
        model = make_toy()
        with abpem(steps=0, balance="stream").attach(model) as adaptation:
            for args, own in zip(stream, alone, strict=True):
                model(*args)
                assert same_state(adaptation.record, own)
