"""A run's own corners: runs inside runs, loggers that fail, names, and an end that is interrupted."""

import contextlib
import functools
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_abpem.engine.adaptation import Adaptation
from lightning_abpem.methods import Tent
from tests.engine.attached import abpem, fingerprint, predictions
from tests.reference import same_state
from tests.toy import Toy, batches, listed, loader, make_toy
from tests.trainer.test_callback import trainer

# ---------------------------------------------------------------------------------------------------- runs inside runs


class Nesting(Toy):
    """Its third test step calls `inner`, and notes what comes of it."""

    def __init__(self, inner, catches=True):
        super().__init__()
        self.inner, self.catches, self.error = inner, catches, None

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        if batch_idx == 2:
            with contextlib.suppress(MisconfigurationException) if self.catches else contextlib.nullcontext():
                self.inner(self)


def nesting(inner, catches=True):
    torch.manual_seed(0)
    return Nesting(inner, catches).eval()


def attach(callback):
    with callback.attach(make_toy()):
        pass


INNER = {
    "predict": lambda callback: trainer(callback).predict(make_toy(), loader(2)),
    "test": lambda callback: trainer(callback).test(make_toy(), loader(2), verbose=False),
    "validate": lambda callback: trainer(callback).validate(make_toy(), loader(2), verbose=False),
    "fit": lambda callback: trainer(callback, max_epochs=1).fit(make_toy(), loader(2)),
    "attach": attach,
}


@pytest.mark.parametrize("kind", INNER)
def test_a_run_inside_a_run_with_the_same_callback_is_refused(kind):
    """The outer one goes on if the error is caught, and else ends by it."""
    callback = abpem()
    model = nesting(lambda model: INNER[kind](callback))
    trainer(callback).test(model, loader(5), verbose=False)
    expected = predictions(make_toy(), batches(5))
    assert all(torch.equal(a, b) for a, b in zip(model.seen, expected, strict=True))
    assert callback.updates == 5
    assert same_state(dict(model.named_parameters()), dict(make_toy().named_parameters()))

    model = nesting(lambda model: INNER[kind](callback), catches=False)
    with pytest.raises(MisconfigurationException, match="adapts in `trainer.test` already"):
        trainer(callback).test(model, loader(5), verbose=False)
    assert same_state(dict(model.named_parameters()), dict(make_toy().named_parameters()))
    assert callback.updates == 3
    trainer(callback).test(make_toy(), loader(), verbose=False)
    assert callback.updates == 4


@pytest.mark.parametrize("catches", [True, False])
def test_a_run_of_the_same_trainer_inside_a_run(catches):
    """Lightning does not support this: the outer run ends, with everything put back."""
    callback = abpem()
    model = nesting(lambda model: model.trainer.predict(make_toy(), loader(2)), catches)
    runner = trainer(callback)
    with pytest.raises(Exception, match=None if catches else "already"):
        runner.test(model, loader(5), verbose=False)
    assert same_state(dict(model.named_parameters()), dict(make_toy().named_parameters()))
    assert fingerprint(model)["hooks"] == fingerprint(make_toy())["hooks"]
    trainer(callback).test(make_toy(), loader(), verbose=False)
    assert callback.updates == 4


def test_a_run_inside_an_attach_is_refused():
    callback = abpem()
    model = make_toy()
    with callback.attach(model), torch.no_grad():
        model(*batches(1)[0])
        with pytest.raises(MisconfigurationException, match="adapts in an `attach` already"):
            trainer(callback).test(make_toy(), loader(), verbose=False)
        model(*batches(1)[0])
        assert callback.updates == 2
    trainer(callback).test(make_toy(), loader(), verbose=False)


def test_a_run_inside_a_run_with_a_callback_of_its_own():
    other, callback, inner = abpem(), abpem(), []
    model = nesting(lambda model: inner.extend(trainer(other).predict(make_toy(), loader(2))))
    trainer(callback).test(model, loader(5), verbose=False)
    expected = predictions(make_toy(), batches(5))
    assert all(torch.equal(a, b) for a, b in zip(model.seen, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inner, predictions(make_toy(), batches(2)), strict=True))
    assert (callback.updates, other.updates) == (5, 2)


def test_a_callback_that_comes_in_the_middle_of_a_run_is_refused():
    class Bring(Callback):
        def on_test_batch_end(self, trainer, *args):
            trainer.callbacks.append(abpem())

    with pytest.raises(MisconfigurationException, match="its `setup` was not called"):
        trainer(Bring()).test(make_toy(), loader(), verbose=False)


# --------------------------------------------------------------------------------------------------- names and results


class Rows(DummyLogger):
    """Keeps what it gets."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(dict(metrics))


def names_of(stage, loaders):
    logger = Rows()
    runner = trainer(abpem(stages=("test", "predict", "validate")), logger=logger, log_every_n_steps=1)
    getattr(runner, stage)(make_toy(), loaders)
    names = {name for row in logger.rows for name in row} - {"epoch"}
    return {name for name in names if not name.startswith("hits")}


@pytest.mark.parametrize("count", [1, 2])
def test_stages_and_dataloaders_share_no_series(count):
    loaders = [loader(2, seed=i) for i in range(count)]
    names = {stage: names_of(stage, loaders) for stage in ("test", "validate", "predict")}
    for stage, own in names.items():
        assert all(name.startswith(f"abpem/{stage}/") for name in own)
        suffixes = [f"/dataloader_idx_{i}" for i in range(count)] if count > 1 else [""]
        for suffix in suffixes:
            assert {f"abpem/{stage}/entropy{suffix}", f"abpem/{stage}/entropy_step{suffix}"} <= own
    assert {name.replace("predict", "test") for name in names["predict"]} == names["test"]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "sequential"])
def test_combined_dataloaders_are_named_as_lightning_names_them(mode):
    class Pairs(Toy):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            own = batch["audio"] if mode != "sequential" else batch
            logits = self(*own[:2])
            self.log("largest", logits.max(), batch_size=len(logits))

    loaders = CombinedLoader({"audio": loader(3, seed=1), "video": loader(2, seed=2)}, mode)
    torch.manual_seed(0)
    callback = abpem(figures="all")
    results = trainer(callback).test(Pairs(), loaders, verbose=False)
    assert len(results) == len(callback.averages) == (2 if mode == "sequential" else 1)
    for index, result in enumerate(results):
        suffixes = {name.partition("largest")[2] for name in result if name.startswith("largest")}
        assert suffixes == {f"/dataloader_idx_{index}" if mode == "sequential" else ""}
        (suffix,) = suffixes
        own = {name for name in result if name.startswith("abpem/")}
        assert own == {f"abpem/test/{name}{suffix}" for name in callback.averages[index]}


def test_the_printed_table_has_a_column_for_each_dataloader(capsys):
    results = trainer(abpem()).test(make_toy(), [loader(2, seed=1), loader(2, seed=2)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "abpem/test/entropy" in line)
    values = [result[f"abpem/test/entropy/dataloader_idx_{i}"] for i, result in enumerate(results)]
    assert values[0] != values[1]
    assert [float(word) for word in line.replace("│", " ").split()[1:]] == pytest.approx(values)


class Reports(Toy):
    """Gives its `log` to an encoder, which counts its calls with it."""

    def __init__(self):
        super().__init__()
        audio: Any = self.audio
        audio.report, report_all = self.log, self.log_dict
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "reduce_fx": "sum"}

        def hook(module, args, output):
            module.report("calls", 1.0, **options)
            report_all({"samples": float(len(output))}, **options)

        self.audio.register_forward_hook(hook)


OPTIONS: dict[str, Any] = {"on_step": False, "on_epoch": True, "reduce_fx": "sum", "batch_size": 1}


def by_partial(own):
    return functools.partial(own.log, **OPTIONS)


def by_function(own):
    return lambda name, value: own.log(name, value, **OPTIONS)


def by_tuple(own):
    return (own,)


def counts(module: Any, args: Any, output: Any) -> None:
    own: Any = module.reports[0] if isinstance(module.reports, tuple) else module.reports
    own = own() if isinstance(own, weakref.ref) else own
    if isinstance(own, Toy):
        own.log("calls", 1.0, **OPTIONS)
    else:
        own("calls", 1.0)


class Parent(Toy):
    """Has its model in a part, which is the target, and logs for its parent."""

    def __init__(self, how):
        super().__init__()
        self.model = Toy()
        self.model.head.__dict__["reports"] = how(self)
        self.model.head.register_forward_hook(counts)

    def forward(self, audio, video):
        return self.model(audio, video)


@pytest.mark.parametrize("options", [{"steps": 0}, {"memory_batches": 3, "replay": False}])
@pytest.mark.parametrize("how", [by_partial, by_function, by_tuple, weakref.ref])
def test_a_part_that_logs_for_its_parent_logs_once_for_each_batch(how, options):
    options = {"fusion": "model.fusion.*.attn", "target": "model", **options}
    [plain] = trainer().test(Parent(how).eval(), loader(5), verbose=False)
    [results] = trainer(abpem(**options)).test(Parent(how).eval(), loader(5), verbose=False)
    assert results["calls"] == plain["calls"] == 5


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2}, {"replay": False}])
def test_a_log_that_somebody_keeps_logs_once_for_each_batch(options):
    [plain] = trainer().test(Reports().eval(), loader(5), verbose=False)
    [results] = trainer(abpem(**options)).test(Reports().eval(), loader(5), verbose=False)
    assert {name: results[name] for name in plain if name in ("calls", "samples")} == {
        name: plain[name] for name in ("calls", "samples")
    }
    assert plain["calls"] == 5


class Keeps(Toy):
    """Has a `log` of its own, which keeps what it gets and gives it back; the forward goes on with both."""

    def __init__(self):
        super().__init__()
        self.logged: dict[str, Any] = {}

    def log(self, name: Any, value: Any, **options: Any) -> Any:
        self.logged[name] = value
        super().log(name, value, **options)
        return value

    def forward(self, audio, video):
        x = self.fusion(torch.cat((self.audio(audio), self.video(video)), dim=1)).mean(1)
        x = x / self.log("level", x.abs().mean(), **OPTIONS)
        self.log_dict({"rows": float(len(audio))}, **OPTIONS)
        return self.head(x * self.logged["rows"])


class KeepsAll(Keeps):
    def log_dict(self, values: Any, **options: Any) -> None:
        self.logged.update(values)
        super().log_dict(values, **options)


class Computes(Toy):
    """The same forward, which asks nothing of what is logged."""

    def forward(self, audio, video):
        x = self.fusion(torch.cat((self.audio(audio), self.video(video)), dim=1)).mean(1)
        return self.head(x / x.abs().mean() * len(audio))


@pytest.mark.parametrize("kind", [Keeps, KeepsAll])
@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 2}, {"memory_batches": 3, "replay": False}])
def test_a_log_of_ones_own_runs_and_logs_once_for_each_batch(kind, options):
    before, seen = (LightningModule.log, LightningModule.log_dict), []
    [plain] = trainer().test(kind().eval(), loader(5), verbose=False)
    for own in (kind, Computes):
        torch.manual_seed(0)
        model: Any = own().eval()
        [results] = trainer(abpem(**options), enable_progress_bar=True).test(model, loader(5), verbose=False)
        seen.append(torch.cat(model.seen))
        if own is kind:
            assert results["rows"] == plain["rows"] == 20
            assert results["level"] > 0
            assert set(model.logged) == {"level", "rows", "hits"}
            assert not {"log", "log_dict"} & vars(model).keys()
        assert "abpem/test/entropy" in results
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-6)
    assert (LightningModule.log, LightningModule.log_dict) == before


class Gate(nn.Module):
    """No LightningModule, but it has figures under the name of Lightning's method."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def log_dict(self):
        return {"level": 1.5}

    def forward(self, x):
        return self.encoder(x) * self.log_dict()["level"]


def test_a_log_dict_that_is_not_lightnings_runs():
    model: Any = make_toy()
    model.audio = Gate(model.audio).eval()
    with torch.no_grad():
        plain = [model(*batch) for batch in batches()]
    assert torch.equal(torch.cat(plain), torch.cat(predictions(model, batches(), steps=0)))


# -------------------------------------------------------------------------------------------------- loggers that fail


class Full(DummyLogger):
    def log_metrics(self, *args, **kwargs):
        raise OSError("no space left on device")


class FailsLate(Toy):
    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        if batch_idx == 3:
            raise ValueError("the step's own error")


@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize(("kind", "stage"), [(Toy, "test"), (Toy, "predict"), (FailsLate, "test")])
def test_a_logger_that_fails_loses_no_weights_and_no_results(kind, stage, every, tmp_path, caplog):
    torch.manual_seed(0)
    model, callback = kind(), abpem()
    runner = trainer(callback, logger=Full(), log_every_n_steps=every)
    late = kind is FailsLate and every == 50  # the logger fails only after the step
    with pytest.raises(ValueError if late else OSError, match="own error" if late else "no space left"):
        getattr(runner, stage)(model, loader(6))
    assert ("Another exception came up while ValueError" in caplog.text) == late
    assert callback.updates == {1: 1, 3: 3, 50: 4 if kind is FailsLate else 6}[every]
    assert same_state(dict(model.named_parameters()), dict(make_toy().named_parameters()))
    assert fingerprint(model)["hooks"] == fingerprint(make_toy())["hooks"]
    assert callback.save(tmp_path / "state.pt").exists()
    assert getattr(runner, f"{stage}_loop").inference_mode is True
    assert runner.state.stage is None


# ------------------------------------------------------------------------------------------ an end that is interrupted


@pytest.mark.parametrize("fails", ["state_dict", "close"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_that_fails_is_made_up_for(monkeypatch, fails, error):
    """An error in one place does not stop the rest, and an end that was interrupted is made once more."""
    original, calls = getattr(Adaptation, fails), []

    def failing(adaptation, *args):
        calls.append(fails)
        if len(calls) == 1 and error is KeyboardInterrupt:
            raise error("while it closes")
        result = original(adaptation, *args)
        if len(calls) == 1:
            raise error("while it closes")
        return result

    monkeypatch.setattr(Adaptation, fails, failing)
    model, callback = make_toy(), abpem()
    runner = trainer(callback)
    with pytest.raises((SystemExit, RuntimeError)):
        runner.test(model, loader(), verbose=False)
    assert runner.test_loop.inference_mode is True
    assert callback.updates == 4
    assert same_state(dict(model.named_parameters()), dict(make_toy().named_parameters()))
    assert fingerprint(model)["hooks"] == fingerprint(make_toy())["hooks"]
    runner.test(make_toy(), loader(), verbose=False)
    assert callback.updates == 4


# ------------------------------------------------------------------------------------------------------- two callbacks


def test_two_callbacks_for_two_stages():
    first, second = abpem(stages=("test",)), Tent(stages=("predict",))
    runner = trainer(first, second)
    runner.test(make_toy(), loader(), verbose=False)
    runner.predict(make_toy(), loader(3))
    assert (first.updates, second.updates) == (4, 3)


def test_two_callbacks_for_one_stage_are_refused():
    model = make_toy()
    for pair in ((abpem(), Tent()), (Tent(), abpem(stages=("test", "validate")))):
        with pytest.raises(MisconfigurationException, match="one callback that adapts in `trainer.test`, but .* 2"):
            trainer(*pair).test(model, listed(batches(2)), verbose=False)
    assert fingerprint(model)["hooks"] == fingerprint(make_toy())["hooks"]
