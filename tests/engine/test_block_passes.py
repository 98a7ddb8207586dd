"""Large batches pass the fusion block one by one, the newest stored one in its prediction: the same, and safe."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_abpem import passes as block_passes
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.block_passes import BlockPasses
from lightning_abpem.engine.method import Method, record_of
from tests.engine.test_adaptation import MASKS, abpem, predictions
from tests.toy import (
    AUDIO,
    CLASSES,
    MODALITIES,
    VIDEO,
    WIDTH,
    EagerSplitAttention,
    FusedAttention,
    TorchAttention,
    Toy,
    batches,
    make_toy,
)

STEPS = 8


@contextmanager
def all_at_once():
    """Batches pass as small ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_passes, "LARGE", 2**62)
        yield


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """Batches pass as large ones do."""
    monkeypatch.setattr(block_passes, "LARGE", 0)


def both(run, bound=1e-10):
    """Hold what `run` gives against what it gives where all batches pass at once."""
    with all_at_once():
        expected = run()
    torch.testing.assert_close(run(), expected, rtol=0, atol=bound)


def doubles(count=STEPS, size=4):
    return [tuple(x.double() for x in batch) for batch in batches(count, size)]


class Counting(nn.Module):
    """A fusion block that counts its runs, and those of them with gradients."""

    def __init__(self, attention=None):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), attention or FusedAttention()
        self.runs, self.with_gradients = 0, 0

    def forward(self, x):
        self.runs += 1
        output = x + self.attn(self.norm(x))
        self.with_gradients += output.requires_grad
        return output


def counting_toy(block=Counting, kind=Toy):
    """`make_toy`, whose fusion is `block`, as a `kind` of model."""
    model = make_toy()
    torch.manual_seed(1)
    model.fusion[0] = block()
    model.__class__ = kind
    return model.eval()


@pytest.mark.parametrize("attention", [FusedAttention, EagerSplitAttention, TorchAttention])
@pytest.mark.parametrize(
    "options",
    [
        {"memory_batches": 2},
        {"memory_batches": 4},
        {"memory_batches": 3, "steps": 2},
        {"memory_batches": 3, "modalities": MASKS},
        {"memory_batches": 3, "modalities": "auto"},
        {"memory_batches": 3, "attention_weight": "auto", "balance": "stream"},
    ],
)
def test_one_by_one_is_all_at_once(attention, options):
    def run():
        torch.manual_seed(1)
        model = make_toy(attention()).double()
        with torch.no_grad(), abpem(**options).attach(model) as adaptation:
            predicted = torch.stack([model(*args) for args in doubles()])
        return predicted, torch.stack(list(adaptation.record.values()))

    both(run)


def test_the_newest_stored_batch_passes_in_its_prediction():
    """Of three remembered batches the oldest and the current one pass; the one between did when it was predicted."""
    model = counting_toy()
    block, runs = model.fusion[0], []
    with torch.no_grad(), abpem(memory_batches=3).attach(model):
        for args in batches(STEPS):
            before = block.runs
            model(*args)
            runs.append(block.runs - before)
    assert runs[0] == 2
    assert runs[4:] == [3] * (STEPS - 4)
    assert block.with_gradients == block.runs - 1  # of the first batch it is not known yet what the block does


@pytest.mark.parametrize("reason", ["replay is off", "a hook inside", "gradients are wanted", "steps=0", "it is small"])
def test_predictions_are_left_alone(reason, monkeypatch):
    model = counting_toy()
    block, outputs, options = model.fusion[0], [], {"memory_batches": 3}
    if reason == "replay is off":
        options["replay"] = False
    if reason == "a hook inside":
        block.attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    if reason == "steps=0":
        options["steps"] = 0
    if reason == "it is small":
        monkeypatch.setattr(block_passes, "LARGE", 2**62)
    with torch.set_grad_enabled(reason == "gradients are wanted"), abpem(**options).attach(model):
        for args in batches(STEPS):
            model.fusion[0].with_gradients = block.runs = 0
            logits = model(*args)
            engines = 0 if reason == "steps=0" else block.runs - 1
            assert logits.requires_grad == (reason == "gradients are wanted")
    if reason == "a hook inside":
        assert not outputs[-1].requires_grad
    assert engines == {"steps=0": 0, "it is small": 1}.get(reason, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_sees_no_gradient(mode):
    seen = []
    model = counting_toy()
    model.fusion[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with all_at_once():
        expected = torch.stack(predictions(counting_toy(), batches(STEPS), memory_batches=3))
    with mode(), abpem(memory_batches=3).attach(model):
        got = [model(*(x.clone() for x in args)) for args in batches(STEPS)]
        assert not any(x.requires_grad for x in got)
        assert not seen[-1].requires_grad
        seen[-1].numpy()
    torch.testing.assert_close(torch.stack(got), expected, rtol=0, atol=1e-5)


def test_who_edits_the_output_edits_no_memory():
    class Edits(Toy):
        def forward(self, audio, video):
            x = self.fusion(torch.cat((self.audio(audio), self.video(video)), 1))
            return self.head(x.mul_(2).mean(1))

    both(lambda: predictions(counting_toy(kind=Edits).double(), doubles(), memory_batches=3))


@pytest.mark.parametrize("what", ["an adapted weight", "a frozen weight", "another tensor", "precision", "a reset"])
def test_what_changes_between_batches_is_not_overlooked(what):
    """Then the pass of the prediction is not that of the weights of now."""

    def run():
        model, outputs = make_toy().double(), []
        attention = model.fusion[0].attn
        with torch.no_grad(), abpem(memory_batches=3).attach(model) as adaptation:
            for i, args in enumerate(doubles()):
                if i == 6:
                    if what == "an adapted weight":
                        attention.qkv.weight.mul_(1.5)
                    elif what == "a frozen weight":
                        attention.proj.weight.mul_(1.5)
                    elif what == "another tensor":
                        attention.proj.weight.data = attention.proj.weight.data * 1.5
                    elif what == "a reset":
                        adaptation.reset()
                with torch.autocast("cpu", torch.bfloat16, enabled=what == "precision" and i >= 6):
                    outputs.append(model(*args).double())
        return torch.stack(outputs)

    both(run, 1e-2 if what == "precision" else 1e-10)


class Carrying(Counting):
    """It mixes in what it saw last, as a recurrent block does."""

    share = 1.0

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 1, WIDTH))

    def forward(self, x):
        output = super().forward(x + self.share * self.last)
        self.last.copy_(output.detach().mean((0, 1), keepdim=True))
        return output


class CarryingLittle(Carrying):
    """So that it hardly matters."""

    share = 1e-6


class LeavingMaps(Counting):
    """It leaves its output in an attribute, for who draws it."""

    def forward(self, x):
        self.map = super().forward(x)
        return self.map


class Editing(Counting):
    """It edits its input."""

    def forward(self, x):
        x += self.attn(self.norm(x))
        return x


class Pairs(Counting):
    """It puts out two tensors, and one that has no row for each sample."""

    def forward(self, x):
        return super().forward(x), x.mean((0, 1), keepdim=True)


class Two(Counting):
    """It puts out two tensors with a row for each sample, and None."""

    def forward(self, x):
        return super().forward(x), {"tokens": x}, None


class First(Toy):
    """Its head takes the first of the tensors that the fusion puts out."""

    def forward(self, audio, video):
        x = self.fusion(torch.cat((self.audio(audio), self.video(video)), 1))
        return self.head((x[0] if isinstance(x, tuple) else x).mean(1))


@pytest.mark.parametrize("block", [CarryingLittle, LeavingMaps, Editing, Pairs, Two])
@pytest.mark.parametrize("size", [1, 4])
def test_blocks_that_do_more(block, size):
    both(lambda: predictions(counting_toy(block, First).double(), doubles(size=size), memory_batches=3))


@pytest.mark.usefixtures("batches_pass")
def test_a_block_whose_state_matters_has_no_memory():
    """Its stored tokens would meet another state than when they came."""
    with pytest.raises(ValueError, match="'fusion.0' to give the same logits again"):
        predictions(counting_toy(Carrying), batches(STEPS), memory_batches=3)


@pytest.mark.parametrize(
    ("block", "passes"), [(CarryingLittle, 3), (LeavingMaps, 3), (Pairs, 1), (Two, 3), (Counting, 3)]
)
def test_what_is_kept_of_blocks_that_do_more(block, passes):
    """The engine's own passes have gradients; the prediction has if it is kept, which spares one of them."""
    model = counting_toy(block, First)
    with torch.no_grad(), abpem(memory_batches=3).attach(model):
        for args in batches(STEPS):
            own = model.fusion[0]
            own.runs = own.with_gradients = 0
            model(*args)
    assert own.with_gradients == passes
    assert own.runs - own.with_gradients == (block not in (Two, Counting))
    if block is LeavingMaps:
        own.map.numpy()


def test_a_block_that_is_called_twice():
    """In one forward, as shared layers are: both calls' attention counts."""

    class Shared(Toy):
        def forward(self, audio, video):
            x = torch.cat((self.audio(audio), self.video(video)), 1)
            return self.head((self.fusion(x) + self.fusion(x.flip(1)).flip(1)).mean(1))

    both(lambda: predictions(counting_toy(kind=Shared).double(), doubles(), memory_batches=1))
    for run in (all_at_once, contextmanager(lambda: iter([None]))):
        with run(), torch.no_grad(), abpem(memory_batches=3).attach(counting_toy(kind=Shared).double()) as adaptation:
            adaptation.model(*doubles()[0])
            assert adaptation.updates == 1


def test_random_encoders_are_not_taken_on_trust():
    """Their tokens differ between the adapting pass and the prediction, so that no pass is kept."""
    model = counting_toy()
    plain = model.audio.forward
    model.audio.forward = lambda x: plain(x) + 0.01 * torch.randn(1)
    with pytest.warns(UserWarning, match="draw random numbers"):
        predictions(model, batches(STEPS), memory_batches=3)
    block = model.fusion[0]
    assert block.runs - block.with_gradients == STEPS


class Elsewhere(Counting):
    """It multiplies by a tensor that the model around it makes in every forward, in whatever mode it is called."""

    def forward(self, x):
        return super().forward(x) * self.scale[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_from_elsewhere(mode):
    """In inference mode autograd does not take them: that prediction runs as it would have."""

    class Scaled(Toy):
        def forward(self, audio, video):
            self.fusion[0].scale = [audio.new_full((1,), 1.5)]
            return super().forward(audio, video)

    def run():
        model = counting_toy(Elsewhere, Scaled)
        with mode(), abpem(memory_batches=3).attach(model) as adaptation:
            outputs = [model(*(x.clone() for x in args)) for args in batches(STEPS)]
            assert adaptation.updates == STEPS
        return torch.stack(outputs)

    both(run, 1e-5)


def test_nothing_is_kept_after_the_run():
    model, graphs = counting_toy(), []
    plain = BlockPasses._predict

    def watch(self, forward, batch, *rest, **named):
        output = plain(self, forward, batch, *rest, **named)
        if batch.prediction is not None:
            graphs.append(weakref.ref(batch.prediction.output))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPasses, "_predict", watch)
        with torch.no_grad(), abpem(memory_batches=3).attach(model):
            for args in batches(STEPS):
                model(*args)
            gc.collect()
            assert [graph() is None for graph in graphs] == [True] * (len(graphs) - 1) + [False]
    gc.collect()
    assert len(graphs) == STEPS - 1
    assert all(graph() is None for graph in graphs)
    assert "forward" not in model.fusion[0].__dict__


class Interrupted(Toy):
    """Its sixth prediction is interrupted, before or after the fusion."""

    where, forwards = "before", 0

    def forward(self, audio, video):
        self.forwards += 1
        x = torch.cat((self.audio(audio), self.video(video)), 1)
        self.interrupt("before")
        x = self.fusion(x)
        self.interrupt("after")
        return self.head(x.mean(1))

    def interrupt(self, where):
        if where == self.where and self.forwards == 2 * 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["before", "after"])
def test_an_interrupted_prediction(where):
    """Those that follow go on, and nothing is left behind."""

    def run():
        model, outputs = counting_toy(kind=Interrupted).double(), []
        model.where = where
        with torch.no_grad(), abpem(memory_batches=3).attach(model) as adaptation:
            for i, args in enumerate(doubles()):
                if i != 5:
                    outputs.append(model(*args))
                    continue
                with pytest.raises(KeyboardInterrupt):
                    model(*args)
                model.fusion(torch.zeros(4, AUDIO + VIDEO, WIDTH).double())  # by somebody else, outside a forward
            assert adaptation.updates == STEPS
        assert "forward" not in model.fusion[0].__dict__
        assert not any(x.requires_grad for x in outputs)
        return outputs

    both(run)


class Augmenting(Method):
    """Its loss is that of the batch with its sound halved."""

    name = "Augmenting"
    needs_attention = True

    def loss(self, step):
        entropy = -(step.logits.softmax(-1) * step.logits.log_softmax(-1)).sum(-1).mean()
        return entropy, record_of(entropy, step.logits)

    def gradients(self, step, again):
        return super().gradients(again(lambda args, kwargs: ((args[0] / 2, args[1]), kwargs)), again)


@pytest.mark.usefixtures("batches_pass")
def test_the_batch_is_remembered_as_it_came():
    """Not as a method edited it for a forward of its own."""
    model, (batch,) = make_toy(), batches(1)
    expected = torch.cat((model.audio(batch[0]), model.video(batch[1])), 1)
    options = {"modalities": MODALITIES, "memory_batches": 2}
    with torch.no_grad(), TestTimeAdaptation(Augmenting(), "fusion.*.attn", **options).attach(model) as adaptation:
        assert model(*batch).shape == (4, CLASSES)
        assert adaptation.updates == 1
        torch.testing.assert_close(adaptation.memory.state_dict()[0]["tensors"][0], expected)
