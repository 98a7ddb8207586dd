"""Steps through `attach`: skipped, taken back, kept apart from the caller's gradients, without waiting for a device."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_abpem import ABPEM
from tests.engine.attached import abpem, as_on_a_gpu, predictions
from tests.reference import same_state
from tests.toy import (
    AUDIO,
    CLASSES,
    MODALITIES,
    PAPER,
    VIDEO,
    EagerSplitAttention,
    FusedAttention,
    TorchAttention,
    batches,
    make_toy,
)


@pytest.mark.parametrize("memory_batches", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_is_skipped_and_counted(memory_batches, bad, caplog):
    clean = batches(4)
    poisoned = [*clean[:2], (clean[0][0] * bad, clean[0][1]), *clean[2:]]
    model = make_toy()
    with torch.no_grad(), abpem(memory_batches=memory_batches).attach(model) as adaptation:
        got = [model(*args) for args in poisoned]
        assert (adaptation.updates, adaptation.skipped) == (4, 1)
        assert adaptation.record["updated"] == 1
    assert "not finite" in caplog.text
    expected = predictions(make_toy(), clean, memory_batches=memory_batches)
    assert all(torch.equal(a, b) for a, b in zip([*got[:2], *got[3:]], expected, strict=True))


def test_a_non_finite_gradient_is_skipped():
    """The loss is finite, its gradient is not: the square root at zero, in the head."""
    model = make_toy()
    model.head.register_forward_hook(lambda module, args, output: output + (0 * output).sqrt())
    with torch.no_grad(), abpem().attach(model) as adaptation:
        model(*batches(1)[0])
        assert (adaptation.updates, adaptation.skipped) == (0, 1)
        assert adaptation.record["updated"] == 0
        assert adaptation.record["loss"].isfinite()


@pytest.mark.parametrize("attention", [FusedAttention, EagerSplitAttention, TorchAttention])
def test_a_sample_whose_tokens_are_all_alike_does_not_spoil_the_step(attention):
    """A silent sensor: its scores have no spread, so its divergence would be infinite. The others count."""
    audio, video = batches(1)[0]
    audio[1], video[2] = 1.0, 0.0

    def observed(*args):
        with torch.no_grad(), abpem(steps=0).attach(make_toy(attention())) as adaptation:
            adaptation.model(*args)
        return adaptation.record

    torch.manual_seed(0)
    record = observed(audio, video)
    for pair, others in (("audio_to_video", [0, 1, 3]), ("video_to_audio", [0, 2, 3])):
        torch.manual_seed(0)
        expected = observed(audio[others], video[others])[f"divergence/{pair}"]
        torch.testing.assert_close(record[f"divergence/{pair}"], expected)
    torch.manual_seed(0)
    with torch.no_grad(), abpem().attach(make_toy(attention())) as adaptation:
        adaptation.model(audio, video)
        adaptation.model(torch.ones_like(audio), torch.ones_like(video))
    assert adaptation.updates == 2


def test_shared_projections_are_stepped_once():
    model = make_toy(depth=2)
    model.fusion[1].attn.qkv = model.fusion[0].attn.qkv
    with torch.no_grad(), abpem(optimizer=partial(torch.optim.Adam, lr=1e-3)).attach(model) as adaptation:
        before = model.fusion[0].attn.qkv.weight.clone()
        model(*batches(1)[0])
        assert (model.fusion[0].attn.qkv.weight - before).abs().max() == pytest.approx(1e-3, rel=1e-2)
        assert set(adaptation.params) == {"fusion.0.attn.qkv.weight", "fusion.0.attn.qkv.bias"}
        assert "fusion.1.attn.qkv.weight is the same tensor" in adaptation.describe()


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_no_stale_casts_in_a_surrounding_autocast(reset):
    def run(around):
        model, logits = make_toy(), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
            with abpem(reset=reset, optimizer=partial(torch.optim.SGD, lr=0.5)).attach(model):
                for args in batches():
                    with torch.autocast("cpu", torch.bfloat16):
                        logits.append(model(*args))
            with torch.autocast("cpu", torch.bfloat16):
                logits.append(model(*batches(1)[0]))
        return torch.stack(logits)

    assert torch.equal(run(True), run(False))


def test_gradients_of_the_caller_stay_apart():
    expected = predictions(make_toy(), batches())
    model: Any = make_toy()
    outside = nn.Linear(5, 5)
    model.extra = [outside]
    with abpem(logits=lambda output: output + 0 * model.extra[0](output)).attach(model):
        for args, logits in zip(batches(), expected, strict=True):
            output = model(*args)
            torch.testing.assert_close(output, logits)
            (100 * output.sum()).backward()
    assert outside.weight.grad is None


@pytest.mark.parametrize("memory_batches", [1, 2])
def test_an_empty_batch_is_left_alone(memory_batches):
    model = make_toy()
    first, second = batches(2)
    empty = tuple(x[:0] for x in first)
    got = predictions(model, [first, empty, second], memory_batches=memory_batches)
    expected = predictions(make_toy(), [first, second], memory_batches=memory_batches)
    assert got[1].shape == (0, CLASSES)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_move_by_way_of_float32(dtype):
    """Adam at 1e-4 moves no bfloat16 weight of 1 by itself, and makes float16 ones non-finite."""
    model = make_toy().to(dtype)
    source = {name: p.clone() for name, p in model.named_parameters()}
    stream = [tuple(x.to(dtype) for x in args) for args in batches(12)]
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    with torch.no_grad(), abpem(optimizer=optimizer).attach(model) as adaptation:
        logits = [model(*args) for args in stream]
        assert (adaptation.updates, adaptation.skipped) == (12, 0)
        moved = (model.fusion[0].attn.qkv.weight - source["fusion.0.attn.qkv.weight"]).abs()
        assert moved.max() > 5e-3
        assert moved.ne(0).float().mean() > 0.9
    assert all(x.isfinite().all() for x in logits)
    assert same_state(source, dict(model.named_parameters()))


def test_a_step_that_ruins_the_weights_is_taken_back():
    class Ruin(torch.optim.SGD):
        countdown = 2

        def step(self, closure=None):
            super().step(closure)
            if Ruin.countdown == 0:
                self.param_groups[0]["params"][0].data.fill_(float("inf"))
            Ruin.countdown -= 1

    stream, model = batches(5), make_toy()
    with torch.no_grad(), abpem(optimizer=partial(Ruin, lr=0.1)).attach(model) as adaptation:
        got = [model(*args) for args in stream]
        assert (adaptation.updates, adaptation.skipped) == (4, 1)
    sgd = partial(torch.optim.SGD, lr=0.1)
    expected = predictions(make_toy(), [*stream[:2], *stream[3:]], optimizer=sgd)
    assert all(torch.equal(a, b) for a, b in zip([*got[:2], *got[3:]], expected, strict=True))


def test_a_part_without_weight_cannot_spoil_the_loss():
    """Tokens all alike: no divergence exists, but none is asked for."""
    alike = torch.ones(2, AUDIO, 3), torch.ones(2, VIDEO, 3)
    model = make_toy()
    with torch.no_grad(), abpem(attention_weight=0.0).attach(model) as adaptation:
        model(*alike)
        assert adaptation.updates == 1


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values that are read there, and comparisons that answer there."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_random_state = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.uint8  # of the host
        if func.name().partition("::")[2].partition(".")[0] in WAITING and not is_random_state:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def tokens_of(first):
    """A mask that the batch's own arguments give: the tokens of the first modality, or of the second."""
    return lambda audio, video: (torch.arange(AUDIO + VIDEO) < AUDIO).expand(len(audio), -1) == first


MASKS = {"audio": tokens_of(True), "video": tokens_of(False)}


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select"}


@pytest.mark.parametrize("options", [{}, PAPER, {"memory_batches": 3}, {"modalities": MASKS}])
def test_no_step_waits_for_the_device(monkeypatch, options):
    """As on a GPU, where comparisons are not looked at in the batch itself; the first batches are audited."""
    as_on_a_gpu(monkeypatch)
    model = make_toy()
    abpem = ABPEM("fusion.*.attn", **({"modalities": MODALITIES} | options))
    with torch.no_grad(), abpem.attach(model) as adaptation:
        reads = Reads()
        for i, args in enumerate(batches(8)):
            with reads if i >= 5 else nullcontext():
                model(*args)
        assert reads.seen == []
        assert adaptation.updates == 8
