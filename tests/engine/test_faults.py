"""Batches that cannot be adapted: predicted by the weights as they are, counted by reason, said once, no trace."""

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_abpem.engine.faults import Skips, is_out_of_memory
from lightning_abpem.methods import EATA, Tent
from tests.engine.interrupts import Stateful, abpem, left_behind, marks
from tests.toy import MODALITIES, Toy, batches, listed, make_toy

SGD = partial(torch.optim.SGD, lr=0.1)
WAYS = [{"memory_batches": 2}, {"replay": False}, {"predicts": "before"}, {"steps": 2}]
ERRORS = {  # where in a batch's adapting passes what is raised, and under which reason it counts
    "forward": (RuntimeError("a kernel without gradients"), "RuntimeError"),
    "no memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    "no host memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    "loss": (KeyError("a class without a name"), "KeyError"),
    "optimizer": (RuntimeError("the device is lost"), "RuntimeError"),
    "a prediction for the guard": (NotImplementedError("no such kernel"), "NotImplementedError"),
}


class Loses(torch.optim.SGD):
    """Raises with a part of a step made."""

    error: Exception | None = None

    def step(self, closure=None):
        if Loses.error:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(100.0)
            raise Loses.error
        return super().step(closure)


class Torn(Stateful):
    """Its forward fails in the passes of the engine alone, with its state moved and values edited in place."""

    error: Exception | None = None
    needs_gradients = True

    def forward(self, audio, video):
        output = super().forward(audio, video)
        if Torn.error and torch.is_grad_enabled() == Torn.needs_gradients:
            audio.zero_()
            raise Torn.error
        return output


@pytest.fixture(autouse=True)
def _heal(monkeypatch):
    for kind in (Loses, Torn):
        monkeypatch.setattr(kind, "error", None)


def set_error(where, error, monkeypatch):
    if where == "loss":
        monkeypatch.setattr("lightning_abpem.methods.abpem.Bootstrapping.loss", error and _raising(error))
    elif where == "optimizer":
        Loses.error = error
    elif where == "a prediction for the guard":
        monkeypatch.setattr("lightning_abpem.engine.forward.Forward.predict", _raising(error))
    else:
        Torn.error = error


def _raising(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "options"),
    [*((where, {}) for where in ERRORS), *((where, way) for where in ("forward", "optimizer") for way in WAYS)],
)
def test_an_error_in_the_adapting_alone_costs_one_step(where, options, monkeypatch, caplog):
    error, reason = ERRORS[where]
    monitored = {"monitor": "source"} if where == "a prediction for the guard" else {}
    first, second, bad = batches(3)
    last = batches(1, 3, seed=9)[0]  # smaller: where memory was short, batches as large are left out
    model, twin = Torn().eval(), Torn().eval()
    before = marks(model)
    options = {"optimizer": partial(Loses, lr=0.1), **options, **monitored}
    with torch.no_grad(), abpem(**options).attach(model) as adaptation:
        got = [model(*first), model(*second)]
        weights = {name: p.detach().clone() for name, p in adaptation.params.items()}
        plain = Torn().eval()
        plain.load_state_dict(model.state_dict())
        with monkeypatch.context() as patch:
            set_error(where, error, patch)
            arguments = [x.clone() for x in bad]
            prediction = model(*arguments)
        set_error("forward", None, monkeypatch)
        Loses.error = None
        assert adaptation.updates == 2 * options.get("steps", 1)
        assert adaptation.skipped_for == {reason: 1}
        assert adaptation.skipped == 1
        assert all(torch.equal(p, weights[name]) for name, p in adaptation.params.items())
        assert all(map(torch.equal, arguments, bad))
        got.append(model(*last))
        assert adaptation.skipped_for == {reason: 1}
    assert torch.equal(prediction, plain(*bad))
    assert model.calls == int(model.total) == len(model.history) == int(model.kept["video"][0]) == 4
    assert not left_behind(model, before)
    assert caplog.text.count("could not be adapted") == 1
    assert str(error) in caplog.text
    with torch.no_grad(), abpem(**options).attach(twin):
        expected = [twin(*args) for args in (first, second, last)]
    assert all(map(torch.equal, got, expected))


class Either(Toy):
    """Without video the audio passes the fusion alone, or goes around it."""

    goes_around = False

    def forward(self, audio, video):
        if video is not None:
            return super().forward(audio, video)
        tokens = self.audio(audio)
        return self.head((tokens if self.goes_around else self.fusion(tokens)).mean(1))


@pytest.mark.parametrize("memory_batches", [1, 3])
@pytest.mark.parametrize("goes_around", [False, True])
@pytest.mark.parametrize("modalities", [MODALITIES, "auto"])
def test_a_batch_without_a_modality(modalities, goes_around, memory_batches, caplog):
    """Also with one of other shapes; the other batches are adapted to as if these had never come."""
    whole = batches(3)
    audio, video = whole[0]
    stream = [whole[0], (audio, None), whole[1], (audio, None), (audio, video[..., :2]), whole[2]]
    model = Either().eval()
    model.goes_around = goes_around
    model.load_state_dict(make_toy().state_dict())
    twin = copy.deepcopy(model)
    callback = abpem(modalities=modalities, memory_batches=memory_batches)
    with torch.no_grad(), callback.attach(model):
        got = [model(*args) for args in stream if args[1] is None or args[1].shape[-1] == 3]
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # which is the forward's own
            model(*stream[4])
    assert (callback.updates, callback.skipped_for) == (3, {"does not fit": 2})
    assert caplog.text.count("could not be adapted") == 1
    with torch.no_grad(), abpem(modalities=modalities, memory_batches=memory_batches).attach(twin):
        expected = [twin(*args) for args in whole]
        assert torch.equal(got[4], expected[2])
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[1])


def test_raise_on_request():
    model, (first, second) = make_toy(), batches(2)
    callback = abpem(on_error="raise")
    with torch.no_grad(), callback.attach(model):
        model(*first)
        with pytest.raises(ValueError, match="but got 10 .* and 9 tokens"):
            model(second[0], second[1][:, 1:])
    assert (callback.updates, callback.skipped) == (1, 0)
    with pytest.raises(ValueError, match='`on_error` to be one of "predict", "raise", but got True'):
        abpem(on_error=True)


def test_a_configuration_that_never_worked_is_an_error():
    for options in ({"modalities": {"audio": 6, "video": 5}}, {"k": 99}):
        model = make_toy()
        with torch.no_grad(), abpem(**options).attach(model) as adaptation:
            for args in batches(2):
                with pytest.raises(ValueError, match="Expected"):
                    model(*args)
            assert adaptation.skipped == 0


class Skipping(Toy):
    """The head sees the encoder too, past the block whose input is remembered."""

    def forward(self, audio, video):
        tokens = torch.cat((self.audio(audio), self.video(video)), 1)
        return self.head(self.fusion(tokens).mean(1) + tokens.mean(1))


def test_a_memory_that_never_worked_is_an_error():
    """It first shows at the second batch, when a batch has adapted already."""
    model = Skipping().eval()
    with torch.no_grad(), abpem(memory_batches=2).attach(model):
        model(*batches(1)[0])
        with pytest.raises(RuntimeError, match="must match the size"):
            model(*batches(2)[1])


class Edits(Toy):
    """Edits a weight in place where a batch says so: a trace of an adapting pass that cannot be taken back."""

    def forward(self, audio, video):
        if audio[0, 0, 0] == 0:
            with torch.no_grad():
                self.head[1].weight += 1
        return super().forward(audio, video)


def test_what_leaves_a_trace_is_no_fault_of_a_batch():
    model = Edits().eval()
    first, (audio, video) = batches(2)
    audio[0, 0, 0] = 0
    with torch.no_grad(), abpem().attach(model):
        model(*first)
        with pytest.raises(ValueError, match="edited 'head.1.weight' in place"):
            model(audio, video)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(kind):
    model = Torn().eval()
    first, second = batches(2)
    with torch.no_grad(), abpem().attach(model) as adaptation:
        model(*first)
        Torn.error = kind()
        with pytest.raises(kind):
            model(*second)
        Torn.error = None
        assert adaptation.skipped == 0


def test_the_error_of_the_users_forward_is_the_users():
    """One that fails in the prediction too is raised from there, with nothing of the engine's around it."""
    model = Torn().eval()
    first, second = batches(2)
    with torch.no_grad(), abpem().attach(model) as adaptation:
        model(*first)
        Torn.error = LookupError("no such clip")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "is_grad_enabled", lambda: True)
            with pytest.raises(LookupError, match="no such clip") as caught:
                model(*second)
        Torn.error = None
        assert caught.value.__context__ is None
        assert adaptation.skipped == 0


# Outside the models and their closures, whose state is put back.
HELD: list[Any] = []
ALIVE: list[bool] = []
TRIED: list[Any] = []


def test_the_error_does_not_hold_the_failed_pass(monkeypatch):
    """While the prediction is made nothing of the failed pass is in memory."""
    HELD.clear()
    ALIVE.clear()

    class Watched(Toy):
        def forward(self, audio, video):
            tokens = torch.cat((self.audio(audio), self.video(video)), 1)
            if not torch.is_grad_enabled():
                ALIVE.extend(reference() is not None for reference in HELD)
            fused = self.fusion(tokens)
            if torch.is_grad_enabled() and torch.isnan(audio).any():
                HELD.append(weakref.ref(fused))
                raise torch.OutOfMemoryError("out of memory")
            return self.head(fused.mean(1))

    model, (first, second) = Watched().eval(), batches(2)
    second[0][0, 0, 0] = torch.nan
    with torch.no_grad(), abpem().attach(model):
        model(*first)
        model(*second)
    assert ALIVE == [False]


def test_batches_that_are_too_large_are_not_tried_again(caplog):
    TRIED.clear()

    class Tight(Toy):
        def forward(self, audio, video):
            if torch.is_grad_enabled():
                TRIED.append(len(audio))
                if len(audio) > 4:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(audio, video)

    stream = [batches(1, size, seed=i)[0] for i, size in enumerate((6, 4, 6, 8, 5, 3))]
    model, callback = Tight().eval(), abpem()
    with torch.no_grad(), callback.attach(model):
        for args in stream:
            model(*args)
    assert (callback.updates, callback.skipped_for) == (2, {"out of memory": 4})
    assert TRIED == [6, 4, 5, 3]
    assert caplog.text.count("could not be adapted") == 1
    assert "batches as large, 180 values" in caplog.text


def test_a_memory_that_is_too_large_holds_less(caplog):
    TRIED.clear()

    class Tight(Toy):
        def forward(self, audio, video):
            tokens = self.fusion(torch.cat((self.audio(audio), self.video(video)), 1))
            TRIED.append(len(tokens))
            if torch.is_grad_enabled() and len(tokens) > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.head(tokens.mean(1))

    model, callback = Tight().eval(), abpem(memory_batches=4)
    with torch.no_grad(), callback.attach(model):
        for args in batches(6):
            model(*args)
    assert TRIED[::2] == [4, 8, 12, 16, 8, 8]  # then half of the three in front of it
    assert (callback.updates, callback.skipped_for) == (5, {"out of memory": 1})
    assert "the loss sees 2 batches" in caplog.text


def test_a_run_without_any_step_says_so(caplog):
    class Tight(Toy):
        def forward(self, audio, video):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(audio, video)

    model, callback = Tight().eval(), abpem()
    with torch.no_grad(), callback.attach(model):
        plain = [model(*args) for args in batches(3)]
        assert not model.training
    assert "None of the 3 batches was adapted" in caplog.text
    assert "out of memory (3)" in caplog.text
    with torch.no_grad():
        assert all(torch.equal(a, model(*args)) for a, args in zip(plain, batches(3), strict=True))


def test_reasons_go_with_the_state():
    model, callback = make_toy(), abpem()
    first, second, third = batches(3)
    with torch.no_grad(), callback.attach(model):
        model(*first)
        model(second[0], second[1][:, 1:])
        model(third[0] * torch.nan, third[1])
    counts = {"does not fit": 1, "not finite": 1}
    assert callback.skipped_for == counts
    again = abpem()
    again.load_state_dict(callback.state_dict())
    model = make_toy()
    with torch.no_grad(), again.attach(model) as adaptation:
        model(second[0] * torch.nan, second[1])
        counts["not finite"] = 2
        assert (adaptation.updates, adaptation.skipped_for, adaptation.skipped) == (1, counts, 3)


def test_every_method_counts_by_reason():
    for callback in (Tent(), EATA(entropy_margin=1e-9)):
        model, (first, second) = make_toy(), batches(2)
        with torch.no_grad(), callback.attach(model):
            model(*first)
            model(second[0] * torch.nan, second[1])
        assert callback.skipped == sum(callback.skipped_for.values())
        assert callback.skipped_for.keys() <= {"not fit", "not finite"}


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_each_reason_is_said_once(caplog):
    skips = Skips()
    for reason in ("a", "b", "a"):
        skips.count(reason, f"said of {reason}")
    assert (skips.counts, skips.total) == ({"a": 2, "b": 1}, 3)
    assert [record.message for record in caplog.records] == ["said of a", "said of b"]


class Cameras(LightningModule):
    """Logs how sure it is; a batch may lack its video."""

    def __init__(self):
        super().__init__()
        self.net = Either().eval()

    def test_step(self, batch, batch_idx):
        audio, video = batch
        self.log("confidence", self.net(audio, video).softmax(-1).amax(-1).mean(), batch_size=len(audio))

    def predict_step(self, batch, batch_idx):
        return self.net(*batch)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_trainer_goes_on(stage, tmp_path):
    stream = [*batches(2), (batches(1)[0][0], None), *batches(1, seed=9)]
    callback = abpem(target="net")
    callback.settings.__dict__["patterns"] = ["net.fusion.*.attn"]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    getattr(trainer, stage)(Cameras(), listed(stream))
    assert (callback.updates, callback.skipped, callback.skipped_for) == (3, 1, {"does not fit": 1})
    assert callback.state_dict()["weights"]["skipped_for"] == {"does not fit": 1}
    assert callback.averages[0]["updated"] == 1
