"""The callback through a real Trainer: the authors' numbers, results, loggers, lifecycle, misuse."""

import csv
import logging
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_abpem.methods import Tent
from lightning_abpem.trainer.strategies import check_strategy
from tests.covering import covering
from tests.engine.attached import abpem, fingerprint, predictions
from tests.golden_runs import BOUNDS, RUNS, Golden
from tests.reference import same_state
from tests.toy import Toy, batches, listed, loader, make_toy

PAIRS = ("audio_to_video", "video_to_audio")


def trainer(*callbacks, **options):
    silent = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **(silent | options))


class Keep(pl.Callback):
    """Keeps the adapted weights as they are after the last batch."""

    def __init__(self):
        self.weights = {}

    def on_test_batch_end(self, trainer, pl_module, *_):
        self.weights = {name: p.clone() for name, p in pl_module.named_parameters()}

    on_predict_batch_end = on_test_batch_end


# ------------------------------------------------------------------------------------------------ the authors' numbers


@pytest.mark.parametrize(("name", "dtype", "stage"), covering(RUNS, list(BOUNDS), ["test", "predict"]))
def test_golden(name, dtype, stage):
    golden, keep, adapting, after, bound = Golden(name, dtype), Keep(), [], [], BOUNDS[dtype]
    model = golden.model()
    model.register_forward_hook(lambda module, args, output: after.append(output.clone()))

    def logits(output):
        if output.grad_fn is not None:  # the adapting pass, not the prediction
            adapting.append(output.detach())
        return output

    runner = trainer(golden.abpem(logits=logits), keep)
    if stage == "test":
        runner.test(model, golden.loader(labels=True), verbose=False)
    else:
        returned = runner.predict(model, golden.loader(labels=False))
        assert all(torch.equal(a, b) for a, b in zip(returned, after, strict=True))

    def check(ours, expected):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=bound)

    assert len(after) == len(adapting) == len(golden)
    for step in range(len(golden)):
        check(adapting[step], golden.expected(f"before_{step}"))
        check(after[step], golden.expected(f"after_{step}"))
    check(keep.weights["blocks_u.0.attn.qkv.weight"], golden.expected("fusion_qkv_weight"))
    check(keep.weights["blocks_u.0.attn.qkv.bias"], golden.expected("fusion_qkv_bias"))
    assert same_state(model.state_dict(), golden.model().state_dict())


# --------------------------------------------------------------------------------------------------- what a run gives


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("memory_batches", [1, 3])
def test_the_step_sees_adapted_logits(inference_mode, memory_batches):
    expected = predictions(make_toy(), batches(), memory_batches=memory_batches)
    model = make_toy()
    callback = abpem(memory_batches=memory_batches)
    runner = trainer(callback, inference_mode=inference_mode)
    runner.test(model, loader(), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(model.seen, expected, strict=True))
    predicted = runner.predict(make_toy(), loader())
    assert all(torch.equal(a, b) for a, b in zip(predicted, expected, strict=True))
    assert callback.updates == 4


@pytest.mark.filterwarnings("ignore:.*are waited for")
@pytest.mark.parametrize("skipped", [{0, 1}, {2}])
def test_steps_that_skip_their_batch_are_waited_for(skipped):
    class Skips(Toy):
        def test_step(self, batch, batch_idx):
            if batch_idx not in skipped:
                self(*batch[:2])

    torch.manual_seed(0)
    callback = abpem()
    trainer(callback).test(Skips(), loader(), verbose=False)
    assert callback.updates == 4 - len(skipped)


@pytest.mark.parametrize("hook", ["on_test_start", "on_test_model_eval", "on_test_batch_start"])
def test_dropout_may_be_left_on_in_a_trainers_run(hook):
    """For MC dropout: Lightning has put the model into eval mode, and the user has a reason."""
    model = make_toy()
    model.head.insert(0, nn.Dropout(0.5))
    setattr(model, hook, lambda *args, **kwargs: model.eval() and model.head[0].train())
    callback = abpem(on_error="raise")
    trainer(callback).test(model, loader(3), verbose=False)
    assert callback.updates == 3


def test_the_result_dict_has_the_averages():
    model = make_toy()
    with torch.no_grad(), abpem().attach(model) as adaptation:
        records = []
        for args in batches():
            model(*args)
            records.append(dict(adaptation.record))
    result = trainer(abpem(figures="all")).test(make_toy(), loader(), verbose=False)[0]
    pairs = [f"{figure}/{pair}" for figure in ("attention_gap", "divergence") for pair in PAIRS]
    names = ["loss", "principal_entropy", "entropy", "balance", *pairs, "updated"]
    assert set(result) == {"hits", "abpem/test/attention_gap", *(f"abpem/test/{name}" for name in names)}
    for name in names:
        assert result[f"abpem/test/{name}"] == pytest.approx(sum(r[name].item() for r in records) / 4, rel=1e-5)


def test_averages_are_weighted_by_samples_and_leave_out_what_is_not_finite():
    sizes = (4, 2, 3)
    stream = [(*batches(1, size, seed=size)[0], torch.zeros(size)) for size in sizes]
    stream[1] = (stream[1][0] * float("nan"), *stream[1][1:])
    callback = abpem(figures="all")
    result = trainer(callback).test(make_toy(), listed(stream), verbose=False)[0]
    assert (callback.updates, callback.skipped) == (2, 1)
    assert result["abpem/test/updated"] == pytest.approx(7 / 9)
    model = make_toy()
    with torch.no_grad(), abpem().attach(model) as adaptation:
        losses = [(model(*args[:2]) is None or adaptation.record["loss"].item()) for args in (stream[0], stream[2])]
    assert result["abpem/test/loss"] == pytest.approx((4 * losses[0] + 3 * losses[1]) / 7, rel=1e-5)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_each_step_reaches_the_loggers(stage, tmp_path):
    logger = CSVLogger(tmp_path)
    callback = abpem()
    runner = trainer(callback, logger=logger, log_every_n_steps=1)
    getattr(runner, stage)(make_toy(), loader(5))
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row[f"abpem/{stage}/loss_step"]]
    assert [int(row["step"]) for row in steps] == [0, 1, 2, 3, 4]
    assert len({row[f"abpem/{stage}/loss_step"] for row in steps}) == 5
    average = sum(float(row[f"abpem/{stage}/loss_step"]) for row in steps) / 5
    assert average == pytest.approx(callback.averages[0]["loss"].item(), rel=1e-4)
    (epoch,) = (row for row in rows if row[f"abpem/{stage}/loss"])
    assert float(epoch[f"abpem/{stage}/loss"]) == pytest.approx(average, rel=1e-4)


def test_it_says_what_adapts_once(caplog):
    with caplog.at_level(logging.INFO):
        trainer(abpem()).test(make_toy(), loader(), verbose=False)
    assert caplog.text.count("ABPEM adapts 468 values in 2 tensors") == 1
    assert "fusion.0.attn.qkv.weight and 1 more" in caplog.text


def test_several_dataloaders():
    callback = abpem(reset="dataloader", figures="all")
    loaders = [loader(2, seed=1), loader(3, seed=2)]
    results = trainer(callback).test(make_toy(), loaders, verbose=False)
    alone = [trainer(abpem(figures="all")).test(make_toy(), one, verbose=False)[0] for one in loaders]
    for index, expected in enumerate(alone):
        assert results[index][f"hits/dataloader_idx_{index}"] == expected["hits"]
        own = {name.removesuffix(f"/dataloader_idx_{index}"): value for name, value in results[index].items()}
        assert own == pytest.approx(expected, rel=1e-6)
        assert {f"abpem/test/{name}" for name in callback.averages[index]} == set(expected) - {"hits"}
    assert callback.updates == 5
    model = make_toy()
    trainer(abpem()).test(model, loaders, verbose=False)
    whole = predictions(make_toy(), batches(2, seed=1) + batches(3, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(model.seen, whole, strict=True))


def test_validation_adapts_only_when_asked():
    plain = make_toy()
    trainer().validate(plain, loader(), verbose=False)
    quiet, asked = make_toy(), make_toy()
    trainer(abpem()).validate(quiet, loader(), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(quiet.seen, plain.seen, strict=True))
    result = trainer(abpem(stages=("validate",))).validate(asked, loader(), verbose=False)[0]
    expected = predictions(make_toy(), batches())
    assert all(torch.equal(a, b) for a, b in zip(asked.seen, expected, strict=True))
    assert result["abpem/validate/updated"] == 1


def test_fit_is_never_touched():
    """Training with validation inside, and the sanity check, is bit-equal with and without the callback."""
    states = []
    for callbacks in ([], [abpem(stages=("test", "predict", "validate"))]):
        model = make_toy()
        trainer(*callbacks, max_epochs=2).fit(model, loader(), loader(seed=3))
        states.append((model.state_dict(), model.seen))
    assert same_state(states[0][0], states[1][0])
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))


# ----------------------------------------------------------------------------------------------------------- lifecycle


class Fail(pl.Callback):
    def __init__(self, hook, error):
        def fail(*args, **kwargs):
            raise error

        setattr(self, hook, fail)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "hook", ["on_test_start", "on_test_batch_end", "on_test_epoch_end", "on_test_end", "teardown", None]
)
def test_everything_is_put_back(hook, error):
    model = make_toy()
    model.video.train()
    model.head[1].weight.requires_grad_(False)
    model.fusion[0].attn.qkv.bias.grad = torch.ones(36)
    before, state = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    callback = abpem(memory_batches=2)
    runner = trainer(callback, *([Fail(hook, error)] if hook else []))
    try:
        runner.test(model, loader(), verbose=False)
        assert hook is None
    except (ValueError, SystemExit):
        assert hook is not None
    after = fingerprint(model)
    # Trainer.test zeroes .grad and leaves training flags after a crash as they are; the module keeps its trainer.
    for changed_by_lightning in ("grad", "attributes", *([] if hook in (None, "teardown") else ["training"])):
        before.pop(changed_by_lightning), after.pop(changed_by_lightning)
    assert after == before
    assert same_state(state, model.state_dict())
    assert runner.test_loop.inference_mode is True


def test_an_error_in_the_users_step():
    model = make_toy()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = fingerprint(model)
    wrong = listed([(torch.ones(2, 6, 3), torch.ones(2, 4, 3), torch.zeros(2)), (torch.ones(1), torch.ones(1), 0)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer(abpem()).test(model, wrong, verbose=False)
    assert same_state(state, model.state_dict())
    assert fingerprint(model)["hooks"] == before["hooks"]
    assert fingerprint(model)["training"] == before["training"]


def test_one_callback_runs_again_and_again():
    callback, model = abpem(), make_toy()
    runner = trainer(callback)
    first = runner.test(model, loader(), verbose=False)
    second = runner.test(model, loader(), verbose=False)
    runner.predict(model, loader())
    assert first == second
    assert callback.updates == 4


def test_a_run_after_one_in_inference_mode_without_adaptation():
    model = make_toy()
    trainer().test(model, loader(), verbose=False)
    trainer(abpem()).test(model, loader(), verbose=False)
    expected = predictions(make_toy(), batches())
    assert all(torch.equal(a, b) for a, b in zip(model.seen[4:], expected, strict=True))


class Swap(pl.Callback):
    """Weights of its own for the run, as a weight average's."""

    def __init__(self, model, start, end):
        self.own = {name: 0.9 * p.detach() for name, p in model.named_parameters()}
        setattr(self, start, self.swap)
        setattr(self, end, self.swap)

    def swap(self, trainer, pl_module):
        for name, p in pl_module.named_parameters():
            self.own[name], p.data = p.data, self.own[name]


@pytest.mark.parametrize(
    ("start", "end"), [("on_test_start", "on_test_end"), ("on_test_epoch_start", "on_test_epoch_end")]
)
def test_weights_that_are_swapped_in_for_the_run_come_out_as_they_were(start, end):
    model = make_toy()
    swap, callback = Swap(model, start, end), abpem(optimizer=partial(torch.optim.Adam, lr=1e-2))
    before = {name: value.clone() for name, value in swap.own.items()}
    trainer(swap, callback).test(model, loader(), verbose=False)
    assert callback.updates > 0
    assert same_state(swap.own, before)
    assert same_state(dict(model.named_parameters()), dict(make_toy().named_parameters()))


def test_counts_and_states_are_those_of_what_is_under_way(tmp_path):
    """A run, then an `attach`: neither speaks for the other."""
    callback, model = abpem(), make_toy()
    trainer(callback).test(model, loader(), verbose=False)
    of_run = callback.updates
    assert of_run > 2
    model.eval()
    with torch.no_grad(), callback.attach(model) as adaptation:
        for _ in range(2):
            model(*batches(1)[0])
        assert callback.updates == adaptation.updates == 2
        callback.save(tmp_path / "state.pt")
        assert callback.averages == {}
    assert callback.updates == 2
    other = abpem()
    other.load(tmp_path / "state.pt")
    with other.attach(model) as adaptation, torch.no_grad():
        assert adaptation.updates == 2
        model(*batches(1)[0])


def test_adapted_weights_can_be_kept():
    model, keep = make_toy(), Keep()
    trainer(abpem(restore=False), keep).test(model, loader(), verbose=False)
    assert same_state(keep.weights, dict(model.named_parameters()))
    assert not same_state(keep.weights, dict(make_toy().named_parameters()))


@pytest.mark.parametrize("options", [{}, {"limit_test_batches": 0}])
def test_an_empty_stream(options):
    model = make_toy()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model)
    empty = listed([], batch_size=1)
    callback = abpem()
    trainer(callback, **options).test(model, empty if not options else loader(), verbose=False)
    assert callback.updates == 0
    assert same_state(state, model.state_dict())
    assert fingerprint(model)["hooks"] == before["hooks"]


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"fast_dev_run": True}, 1),
        ({"limit_test_batches": 0.5}, 2),
        ({"barebones": True}, 4),
        ({"overfit_batches": 1}, 4),
    ],
)
def test_trainer_options(options, updates):
    callback = abpem()
    quiet: dict[str, Any] = {} if "barebones" in options else {"logger": False}
    runner = Trainer(accelerator="cpu", callbacks=[callback], **quiet, **options)
    runner.test(make_toy(), loader(), verbose=False)
    assert callback.updates == updates


def test_weights_come_from_the_checkpoint(tmp_path):
    model = make_toy()
    with torch.no_grad():
        model.head[1].bias.add_(1)
    path = tmp_path / "model.ckpt"
    runner = trainer()
    runner.strategy.connect(model)
    runner.save_checkpoint(path)
    fresh = make_toy()
    trainer(abpem()).test(fresh, loader(), ckpt_path=path, verbose=False)
    expected = predictions(model, batches())
    assert all(torch.equal(a, b) for a, b in zip(fresh.seen, expected, strict=True))


def half(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


PRECISIONS = {  # how far logits may be from those in float64, and the cosine of the way that the weights have gone
    "32": ({"precision": "32-true"}, 1e-5, 0.999999),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 2e-2, 0.999),
    "16-mixed": ({"plugins": half(1024.0)}, 3e-3, 0.9999),
    "bf16-true": ({"precision": "bf16-true"}, 2e-2, 0.99),
    "16-true": ({"precision": "16-true"}, 3e-3, 0.999),
}


def adapt_with(**options):
    callback, model, keep = abpem(memory_batches=2, optimizer=partial(torch.optim.Adam, lr=1e-3)), make_toy(), Keep()
    trainer(callback, keep, **options).test(model, loader(12), verbose=False)
    name = "fusion.0.attn.qkv.weight"
    return model.seen, (keep.weights[name].double() - make_toy().get_parameter(name)).flatten(), callback


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision(name):
    options, bound, cosine = PRECISIONS[name]
    expected, way, _ = adapt_with(precision="64-true")
    logits, own_way, callback = adapt_with(**options)
    assert (callback.updates, callback.skipped) == (12, 0)
    assert max((a.double() - b).abs().max() for a, b in zip(logits, expected, strict=True)) < bound
    assert F.cosine_similarity(own_way, way, dim=0) > cosine
    assert own_way.norm().item() == pytest.approx(way.norm().item(), rel=0.05)


def test_overflow_in_float16():
    """At Lightning's own scale the first step overflows: it is skipped, the scale halved, and the plugin's stays."""
    plugin = half(2.0**16)
    _, _, callback = adapt_with(plugins=plugin)
    assert (callback.updates, callback.skipped) == (11, 1)
    assert plugin.scaler.get_scale() == 2.0**16


# -------------------------------------------------------------------------------------------------------------- misuse


class Outer(Toy):
    """Its steps call a submodule, not the module itself."""

    def __init__(self):
        super().__init__()
        self.model = make_toy()

    def test_step(self, batch, batch_idx):
        self.model(*batch[:2])


@pytest.mark.filterwarnings("ignore:.*are waited for")
def test_the_target_is_never_called():
    model = Outer()
    before = fingerprint(model)
    with pytest.raises(
        MisconfigurationException, match="test steps ended without calling the LightningModule.*`target`"
    ):
        trainer(abpem(fusion="model.fusion.*.attn")).test(model, loader(), verbose=False)
    assert fingerprint(model)["hooks"] == before["hooks"]
    callback = abpem(fusion="model.fusion.*.attn", target="model")
    trainer(callback).test(model, loader(), verbose=False)
    assert callback.updates == 4


def test_given_twice():
    callback = abpem()
    with pytest.raises(MisconfigurationException, match="adapts in `trainer.test`, but the Trainer has 2"):
        trainer(callback, Tent()).test(make_toy(), loader(), verbose=False)
    for pair in ((callback, callback), (abpem(), abpem())):  # which Lightning finds first: their states have one name
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `ABPEM`"):
            trainer(*pair)


def test_the_other_lightning():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    runner = pytorch_lightning.Trainer(accelerator="cpu", callbacks=[abpem()], logger=False, enable_progress_bar=False)
    with pytest.raises(
        MisconfigurationException, match="`lightning.pytorch`, but got a Trainer from `pytorch_lightning"
    ):
        runner.test(Other(), loader(), verbose=False)


def test_a_strategy_that_cannot_work_is_refused():
    with pytest.raises(MisconfigurationException, match="FSDPStrategy packs all parameters"):
        check_strategy(FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="not been made for object"):
        check_strategy(object())
    check_strategy(trainer(abpem(), devices=2, strategy="ddp_spawn").strategy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "nothing.here"}, "matches none"),
        ({"fusion": "head"}, "to be an attention module"),
        ({"k": 99}, "got 99 and logits of 5 classes"),
        ({"modalities": {"audio": 5, "video": 4}}, "but got 9 .* and 10 tokens"),
    ],
)
def test_what_does_not_fit_the_model(changes, message):
    model = make_toy()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model)
    runner = trainer(abpem(**changes))
    with pytest.raises(ValueError, match=message):
        runner.test(model, loader(), verbose=False)
    after = fingerprint(model)
    assert all(after[key] == before[key] for key in ("requires_grad", "training", "hooks", "parameters"))
    assert same_state(state, model.state_dict())
    assert runner.test_loop.inference_mode is True


def test_a_model_that_trains_with_dropout_is_put_in_eval_by_the_trainer():
    model = make_toy()
    model.head.insert(0, nn.Dropout(0.5))
    model.train()
    callback = abpem()
    trainer(callback).test(model, loader(), verbose=False)
    assert callback.updates == 4
    assert model.training


def test_a_callback_can_be_pickled():
    import pickle

    copy = pickle.loads(pickle.dumps(abpem(optimizer=partial(torch.optim.SGD, lr=0.1))))
    trainer(copy).test(make_toy(), loader(), verbose=False)
    assert copy.updates == 4


# --------------------------------------------------------------------------------------- what a review brought to light


def test_weights_that_the_module_loads_at_the_start_return():
    other = make_toy()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)

    class Loading(Toy):
        def on_test_start(self):
            self.load_state_dict(other.state_dict())

    model = Loading().eval()
    trainer(abpem()).test(model, loader(), verbose=False)
    assert same_state(model.state_dict(), other.state_dict())
    expected = predictions(other, batches())
    assert all(torch.equal(a, b) for a, b in zip(model.seen, expected, strict=True))


def test_counts_are_there_at_the_end_and_gone_after_an_empty_run():
    class Look(pl.Callback):
        def on_test_end(self, trainer, pl_module):
            self.updates = callback.updates

    callback, look = abpem(), Look()
    runner = trainer(callback, look)
    runner.test(make_toy(), loader(), verbose=False)
    assert look.updates == 4
    assert callback.averages
    runner.test(make_toy(), listed([], batch_size=1), verbose=False)
    assert callback.updates == callback.skipped == 0
    assert callback.averages == {}


def test_steps_in_the_loggers_go_on_over_runs(tmp_path):
    logger = CSVLogger(tmp_path)
    runner = trainer(abpem(), logger=logger, log_every_n_steps=1)
    for _ in range(2):
        runner.predict(make_toy(), loader(3))
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["abpem/predict/loss_step"]]
    assert steps == list(range(6))


def test_names_do_not_depend_on_the_data():
    results = trainer(abpem()).test(make_toy(), [loader(2), listed([], batch_size=1)], verbose=False)
    assert "abpem/test/entropy/dataloader_idx_0" in results[0]


def test_a_step_may_skip_a_batch():
    class Skipping(Toy):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx != 2:
                super().test_step(batch, batch_idx)

    callback = abpem()
    trainer(callback).test(Skipping().eval(), loader(), verbose=False)
    assert callback.updates == 3


def test_another_callback_that_fails_while_failing():
    class FailTwice(pl.Callback):
        def on_test_batch_end(self, *args):
            raise ValueError("first")

        def on_exception(self, *args):
            raise RuntimeError("second")

    model, before = make_toy(), make_toy().state_dict()
    mine, others = FailTwice(), abpem()
    runner = trainer(mine, others)
    with pytest.raises(RuntimeError, match="second"):
        runner.test(model, loader(), verbose=False)
    assert same_state(model.state_dict(), before)
    assert fingerprint(model)["hooks"] == fingerprint(make_toy())["hooks"]
    assert runner.test_loop.inference_mode is True
    assert [c for c in runner.callbacks if c in (mine, others)] == [mine, others]


def test_no_step_logs_when_the_trainer_wants_none(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(abpem(), logger=logger, log_every_n_steps=0).predict(make_toy(), loader(3))
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert "abpem/predict/loss_step" not in row
    assert float(row["abpem/predict/updated"]) == 1
