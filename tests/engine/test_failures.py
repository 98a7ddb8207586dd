"""With on_error="raise", what fails in the user's code raises, no step is half made, and the next batch goes on."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_abpem.engine.adaptation import Adaptation
from tests.engine.interrupts import Stateful, abpem, left_behind, marks
from tests.toy import Toy, batches, loader, make_toy

SGD = partial(torch.optim.SGD, lr=0.1)
WAYS = [{}, {"memory_batches": 2}, {"replay": False}, {"predicts": "before"}]


def qkv(model):
    return [p.detach().clone() for p in model.fusion[0].attn.qkv.parameters()]


def without_the_second(options):
    """The predictions for the first and the third batch, where the second never came."""
    model = Stateful().eval()
    with torch.no_grad(), abpem(optimizer=SGD, **options).attach(model):
        return [model(*args) for i, args in enumerate(batches(3)) if i != 1]


def run(callback, model, fail, taken=False):
    """Three batches, of which the second fails; `fail(True)` makes it so. The step of it is `taken`, or is not."""
    outputs, before = [], marks(model)
    with torch.no_grad(), callback.attach(model) as adaptation:
        for i, args in enumerate(batches(3)):
            if i != 1:
                outputs.append(model(*args))
                continue
            weights = qkv(model)
            fail(True)
            with pytest.raises(RuntimeError, match="lost"):
                model(*args)
            fail(False)
            if not taken:
                assert all(map(torch.equal, qkv(model), weights))
            assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in Stateful().parameters()]
            assert adaptation.updates == 1 + taken
        assert adaptation.updates == 2 + taken
    assert not left_behind(model, before)
    return adaptation, outputs


class Loses(torch.optim.SGD):
    """Raises with a part of a step made."""

    fails = False

    def step(self, closure=None):
        if Loses.fails:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(100.0)
            raise RuntimeError("the device is lost")
        return super().step(closure)


@pytest.mark.parametrize("options", WAYS)
def test_an_optimizer_that_raises(options):
    model = Stateful().eval()

    def fail(fails):
        Loses.fails = fails

    callback = abpem(optimizer=partial(Loses, lr=0.1), on_error="raise", **options)
    adaptation, outputs = run(callback, model, fail)
    assert adaptation.skipped == 0
    assert all(map(torch.equal, outputs, without_the_second(options)))


FAILS_AT = 0  # calls from now; outside the models, whose state is put back


class Fragile(Stateful):
    """Its forward fails at a call that is yet to come, with its state moved."""

    def forward(self, audio, video):
        global FAILS_AT
        output = super().forward(audio, video)
        if FAILS_AT:
            FAILS_AT -= 1
            if not FAILS_AT:
                raise RuntimeError("the file is lost")
        return output


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("at", ["the adapting pass", "the prediction"])
def test_a_forward_that_raises(options, at):
    model = Fragile().eval()
    in_pass = at == "the adapting pass"

    def fail(fails):
        global FAILS_AT
        FAILS_AT = (1 if in_pass else 2) if fails else 0

    taken = not in_pass and options.get("predicts") != "before"
    adaptation, outputs = run(abpem(optimizer=SGD, on_error="raise", **options), model, fail, taken)
    assert adaptation.skipped == 0
    # The call is made all the same, so the state has moved, as it would have without the engine.
    assert model.calls == int(model.total) == len(model.history) == int(model.kept["video"][0]) == 3
    if not taken:
        assert all(map(torch.equal, outputs, without_the_second(options)))


@pytest.mark.parametrize("options", WAYS)
def test_a_loss_that_raises(options, monkeypatch):
    model, callback = Stateful().eval(), abpem(optimizer=SGD, on_error="raise", **options)
    kind = type(callback.settings.method)
    loss = kind.loss
    fails: list[bool] = []

    def lost(self, step):
        if fails:
            raise RuntimeError("the loss is lost")
        return loss(self, step)

    monkeypatch.setattr(kind, "loss", lost)
    adaptation, outputs = run(callback, model, lambda now: fails.append(True) if now else fails.clear())
    assert adaptation.skipped == 0
    assert all(map(torch.equal, outputs, without_the_second(options)))


@pytest.mark.parametrize("options", WAYS)
def test_an_observer_that_raises_loses_no_step(options):
    def stream(on_step):
        model = Stateful().eval()
        before, outputs = marks(model), []
        settings = abpem(optimizer=SGD, **options).settings
        with torch.no_grad(), Adaptation(model, settings, on_step) as adaptation:
            for i, args in enumerate(batches(3)):
                try:
                    outputs.append(model(*args))
                except RuntimeError:
                    assert i == 1
            assert adaptation.updates == 3
        assert not left_behind(model, before)
        return outputs

    seen = []

    def observe(record, samples):
        seen.append(samples)
        if len(seen) == 2:
            raise RuntimeError("the observer is lost")

    whole = stream(None)
    first, last = stream(observe)
    assert torch.equal(first, whole[0])
    assert torch.equal(last, whole[2])
    assert len(seen) == 3


class Broken(Logger):
    name, version = "broken", 0

    def log_metrics(self, metrics, step=None):
        raise RuntimeError("the disk is lost")

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_a_logger_that_raises_leaves_nothing_behind(tmp_path):
    model = make_toy()
    before = {key: value for key, value in marks(model).items() if not key.startswith("attribute ")}
    trainer = Trainer(
        accelerator="cpu",
        logger=Broken(),
        log_every_n_steps=1,
        callbacks=[abpem()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(RuntimeError, match="the disk is lost"):
        trainer.test(model, loader())
    after = marks(model)
    assert {key: after[key] for key in before} == before


class Collects(Broken):
    """A logger that works, and keeps what it gets."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


class Stops(Toy):
    """Its fourth step fails after the prediction."""

    def test_step(self, batch, batch_idx):
        self(*batch[:2])
        if batch_idx == 3:
            raise LookupError("the user's own error")


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("kind", [Toy, Stops])
@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_logger_that_raises_loses_no_results(kind, stage, every, tmp_path, caplog):
    """Counts, averages and state are those of the steps that were taken; the first error is the one that is raised."""
    if stage == "predict" and kind is Stops:
        pytest.skip("it fails in test")

    def run(every, *loggers):
        model, callback = kind().eval(), abpem()
        model.load_state_dict(make_toy().state_dict())
        trainer = Trainer(
            accelerator="cpu",
            logger=[*loggers],
            log_every_n_steps=every,
            callbacks=[callback],
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            getattr(trainer, stage)(model, loader(6))
        except Exception as error:
            return callback, error
        return callback, None

    good = Collects()
    whole, own_error = run(1, good)
    assert (own_error is None) is (kind is Toy)
    works = Collects()
    callback, error = run(every, Broken(), works)
    is_late = every > 4
    if is_late and kind is Stops:
        assert isinstance(error, LookupError)
        assert "Another exception came up" in caplog.text
    else:
        assert isinstance(error, RuntimeError)
        assert str(error) == "the disk is lost"
    steps = {1: 1, 3: 3, 50: 6 if kind is Toy else 4}[every]
    assert callback.updates == steps
    assert callback.state_dict()["weights"]["counts"] == [steps, steps]
    losses = [metrics[f"abpem/{stage}/loss_step"] for _, metrics in good.rows if f"abpem/{stage}/loss_step" in metrics]
    mean = sum(losses[:steps]) / steps
    torch.testing.assert_close(callback.averages[0]["loss"].item(), mean, rtol=1e-5, atol=1e-6)
    if kind is Stops:
        assert whole.averages[0]["loss"].item() == pytest.approx(sum(losses[:4]) / 4)
    name = f"abpem/{stage}/loss_step"  # the mean over the steps since the last row
    assert [metrics[name] for _, metrics in works.rows if name in metrics] == [pytest.approx(mean, rel=1e-5, abs=1e-6)]


class Logs(Toy):
    """Logs in its own forward, as some do."""

    def forward(self, audio, video):
        logits = super().forward(audio, video)
        self.log("largest", logits.detach().max(), batch_size=len(audio), reduce_fx="sum")
        self.log_dict({"rows": float(len(audio))}, batch_size=len(audio), reduce_fx="sum")
        return logits


@pytest.mark.parametrize("memory_batches", [1, 2])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_a_forward_logs_is_logged_once_for_a_batch(memory_batches, steps, tmp_path):
    model = Logs().eval()
    model.load_state_dict(make_toy().state_dict())
    trainer = Trainer(
        accelerator="cpu",
        logger=Collects(),
        callbacks=[abpem(memory_batches=memory_batches, steps=steps)],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (results,) = trainer.test(model, loader(3), verbose=False)
    assert results["rows"] == 12
    assert results["largest"] == pytest.approx(sum(float(x.max()) for x in model.seen), rel=1e-5)
    assert "log" not in vars(model)
