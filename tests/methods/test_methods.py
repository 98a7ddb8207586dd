"""The methods ABPEM is compared with: each against its equations written out by hand, and all on the same engine."""

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.engine.method import Method, record_of
from lightning_abpem.functional import confidence_loss
from lightning_abpem.methods import EATA, MMTTA, READ, SAR, Source, Tent
from lightning_abpem.methods.norms import batch_statistics, norm_params
from lightning_abpem.methods.read import ReliableFusion
from lightning_abpem.methods.sar import SharpnessAwareEntropy
from tests import reference
from tests.golden_runs import Golden
from tests.toy import CLASSES, MODALITIES, PAPER, WIDTH, batches, loader, make_toy

SGD = partial(torch.optim.SGD, lr=0.05)
NORMS = {"audio.norm", "video.norm", "fusion.0.norm", "head.0"}
NORM_PARAMS = {f"{name}.{kind}" for name in NORMS for kind in ("weight", "bias")}
METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "source": Source,
    "tent": Tent,
    "eata": partial(EATA, redundancy=1.0, entropy_margin=1.0),
    "sar": partial(SAR, entropy_margin=1.0),
    "read": partial(READ, "fusion.*.attn"),
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES),
    "abpem-published": partial(ABPEM, "fusion.*.attn", MODALITIES, **PAPER),
    "mmtta": partial(MMTTA, {"audio": 0, "video": 1}),
}


def sharp_toy():
    """In float64, with predictions of all degrees of confidence."""
    model: Any = make_toy().double()
    torch.manual_seed(3)
    nn.init.normal_(model.head[1].weight, std=1.5)
    return model


def hide_classes(model, fill=-math.inf):
    """Let the last two classes be impossible, as where the answers to choose from are fewer than the head's."""

    def fill_in(module, args, output):
        return output.index_fill(1, torch.tensor([3, 4]), fill)

    model.head.register_forward_hook(fill_in)
    return model


def stream(count=6, size=8):
    return [(audio.double(), video.double()) for audio, video in batches(count, size)]


def entropies(logits):
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)


def adapted(method, model, data):
    with torch.no_grad(), method.attach(model) as adaptation:
        return torch.stack([model(*args) for args in data]), adaptation


def by_hand(model, data, gradients):
    """Predictions before each step of plain SGD on the normalisation layers; `gradients` may say None."""
    params = {name: p for name, p in model.named_parameters() if name in NORM_PARAMS}
    predictions = []
    for args in data:
        predictions.append(model(*args).detach())
        found = gradients(model, args, params)
        if found is not None:
            with torch.no_grad():
                for p, gradient in zip(params.values(), found, strict=True):
                    p -= 0.05 * gradient
    return torch.stack(predictions)


# --------------------------------------------------------------------------------------------------------------- READ


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_read_golden(dtype, bound):
    golden = Golden("read", dtype)
    model: Any = golden.model()
    config = golden.config
    method = READ("blocks_u.*.attn", optimizer=partial(torch.optim.Adam, lr=config["lr"]), restore=False)
    with torch.no_grad(), method.attach(model) as adaptation:
        for step in range(len(golden)):
            inputs, _ = golden[step]
            after = model(inputs) if not isinstance(inputs, tuple) else model(*inputs)
            torch.testing.assert_close(after.double(), golden.expected(f"after_{step}"), rtol=0, atol=bound)
            confidence, balance = golden.record["losses"][step]
            assert adaptation.record["confidence_loss"].item() == pytest.approx(confidence, abs=bound)
            assert adaptation.record["balance"].item() == pytest.approx(balance, abs=bound)
    for kind in ("weight", "bias"):
        ours = getattr(model.blocks_u[0].attn.qkv, kind).detach().double()
        expected = golden.expected(f"fusion_qkv_{kind}")
        if kind == "bias" and dtype == torch.float32:  # no softmax sees k's, so Adam scales up the gradient's rounding
            ours, expected = (torch.cat([x[:24], x[48:]]) for x in (ours, expected))
        torch.testing.assert_close(ours, expected, rtol=0, atol=bound)


def test_confidence_loss():
    logits = torch.randn(20, 7, dtype=torch.float64) * 3
    for ours, row in zip(confidence_loss(logits), logits.tolist(), strict=True):
        p = max(reference.softmax(row))
        assert ours.item() == pytest.approx(p * (1 - math.log(p) + math.log(math.exp(-1))), abs=1e-12)


# --------------------------------------------------------------------------------------------------------------- Tent


def test_tent_is_gradient_descent_on_the_entropy():
    def gradients(model, args, params):
        return torch.autograd.grad(entropies(model(*args)).mean(), list(params.values()))

    expected = by_hand(sharp_toy(), stream(), gradients)
    ours, adaptation = adapted(Tent(optimizer=SGD), sharp_toy(), stream())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert set(adaptation.params) == NORM_PARAMS
    assert adaptation.updates == 6


def test_predictions_after_the_update_are_those_before_the_next_one():
    data = [args for args in stream(3) for _ in range(2)]  # every batch twice
    before, _ = adapted(Tent(optimizer=SGD), sharp_toy(), data)
    after, _ = adapted(Tent(optimizer=SGD, predicts="after"), sharp_toy(), data)
    torch.testing.assert_close(after[0], before[1], rtol=0, atol=1e-12)
    assert not torch.equal(after[0], before[0])


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        norm: Any = nn.BatchNorm1d(WIDTH)
        self.layers = nn.Sequential(nn.Linear(3, WIDTH), norm, nn.Tanh(), nn.Linear(WIDTH, CLASSES))
        norm.running_mean.fill_(3.0)
        norm.running_var.fill_(0.2)

    def forward(self, x):
        return self.layers(x)


def test_batch_normalisation_uses_the_batch():
    torch.manual_seed(0)
    model = BatchNormed().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(6, 3)
    hidden = model.layers[0](x)
    normed = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    expected = model.layers[3](normed.tanh())
    with torch.no_grad(), Tent(optimizer=SGD).attach(model) as adaptation:
        torch.testing.assert_close(model(x), expected)
    assert set(adaptation.params) == {"layers.1.weight", "layers.1.bias"}
    assert reference.same_state(before, model.state_dict())
    with pytest.raises(RuntimeError), batch_statistics(model):
        raise RuntimeError
    assert reference.same_state(before, model.state_dict())


class NormAct(nn.BatchNorm1d):
    """Does more than to normalise, as timm's does."""

    def forward(self, x):
        return super().forward(x).relu()


class NormWithWords(nn.BatchNorm1d):
    """Gets keywords that are named like parameters of what stands in for its forward."""

    def forward(self, x, *, module, forward):
        return super().forward(x) * module + forward


def test_batch_statistics_leave_every_keyword_to_the_layer():
    norm, x = NormWithWords(3).eval(), torch.randn(6, 3)
    with torch.no_grad(), batch_statistics(norm):
        own = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        assert torch.equal(norm(x, module=2.0, forward=1.0), own * 2.0 + 1.0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, NormAct])
@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_are_there_while_batches_have_their_own(kind, compiled):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, WIDTH), kind(WIDTH), nn.Linear(WIDTH, CLASSES)).eval()
    x = torch.randn(6, 3)
    source = {name: value.clone() for name, value in model.state_dict().items()}
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        plain = run(x)
        hidden = nn.functional.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, training=True)
        with batch_statistics(model):
            assert torch.equal(run(x), model[2](hidden.relu() if kind is NormAct else hidden))
            assert reference.same_state(model.state_dict(), source)
        assert torch.equal(run(x), plain)
        with Tent(optimizer=SGD).attach(model):
            model(x)
            state = model.state_dict()
            assert state.keys() == source.keys()
            assert not torch.equal(state["1.weight"], source["1.weight"])
            assert torch.equal(state["1.running_mean"], source["1.running_mean"])
    assert reference.same_state(model.state_dict(), source)


def test_norm_params():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    model = nn.ModuleDict({"a": RMSNorm(), "b": nn.GroupNorm(1, 3), "c": nn.Linear(3, 3), "d": nn.InstanceNorm1d(3)})
    assert list(norm_params(model)) == ["a.weight", "b.weight", "b.bias"]
    assert list(norm_params(model, exclude=["b"])) == ["a.weight"]
    shared = nn.ModuleDict({"a": nn.LayerNorm((2, 6)), "b": nn.LayerNorm((2, 6))})
    shared["b"].weight = shared["a"].weight
    assert list(norm_params(shared)) == ["a.weight", "a.bias", "b.bias"]

    assert list(norm_params(nn.Sequential(NormAct(3)))) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="normalisation layers with weights .* found none outside a, b"):
        norm_params(model, exclude=["a", "b"])
    with pytest.raises(ValueError, match="in Linear, but found none"), Tent().attach(nn.Linear(3, 3).eval()):
        pass


# --------------------------------------------------------------------------------------------------------------- EATA


@pytest.mark.parametrize("fisher", [False, True])
def test_eata_written_out(fisher):
    options: dict[str, Any] = {"entropy_margin": 0.6, "redundancy": 0.7, "fisher_weight": 5.0}
    fishing = stream(2, 5) if fisher else []
    margin, mean = 0.6 * math.log(CLASSES), None
    kept_counts: list[int] = []
    importance: dict[str, Tensor] = {}
    start: dict[str, Tensor] = {}

    def gradients(model, args, params):
        nonlocal mean
        if not start:
            start.update({name: p.detach().clone() for name, p in params.items()})
            for batch in fishing:
                logits = model(*batch)
                loss = -logits.log_softmax(1)[torch.arange(5), logits.argmax(1)].mean()
                for name, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
                    importance[name] = importance.get(name, 0) + g**2 / len(fishing)
        logits = model(*args)
        p, total, kept = logits.softmax(1), 0.0, []
        for i, e in enumerate(entropies(logits)):
            cosine = 0.0 if mean is None else (p[i] @ mean) / (p[i].norm() * mean.norm())
            if e < margin and abs(cosine) < 0.7:
                kept.append(i)
                total = total + math.exp(margin - e.item()) * e
        kept_counts.append(len(kept))
        if not kept:
            return None
        new = p[kept].mean(0).detach()
        mean = new if mean is None else 0.9 * mean + 0.1 * new
        loss = total / len(kept)
        for name, value in importance.items():
            loss = loss + 5.0 * (value * (params[name] - start[name]) ** 2).sum()
        return torch.autograd.grad(loss, list(params.values()))

    expected = by_hand(sharp_toy(), stream(8), gradients)
    ours, adaptation = adapted(EATA(optimizer=SGD, fisher_batches=fishing, **options), sharp_toy(), stream(8))
    assert 0 < sum(kept_counts) < 64
    assert adaptation.updates == sum(count > 0 for count in kept_counts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert adaptation.skipped == kept_counts.count(0)
    assert adaptation.record["kept"].item() == pytest.approx(kept_counts[-1] / 8)


# ---------------------------------------------------------------------------------------------------------------- SAR


def test_sar_written_out():
    margin = 0.7 * math.log(CLASSES)
    averages: list[float] = []
    kept_counts: list[tuple[int, int]] = []

    def gradients(model, args, params):
        values = list(params.values())
        first = entropies(model(*args))
        reliable = first < margin
        found = torch.autograd.grad(first[reliable].mean(), values)
        norm = math.sqrt(sum(float((g**2).sum()) for g in found))
        start = [p.detach().clone() for p in values]
        with torch.no_grad():
            for p, g in zip(values, found, strict=True):
                p += 0.3 * g / norm
        second = entropies(model(*args))
        kept = reliable & (second < margin)
        kept_counts.append((int(reliable.sum()), int(kept.sum())))
        loss = second[kept].mean()
        averages.append(loss.item() if not averages else 0.9 * averages[-1] + 0.1 * loss.item())
        found = torch.autograd.grad(loss, values)
        with torch.no_grad():
            for p, value in zip(values, start, strict=True):
                p.copy_(value)
        return found

    expected = by_hand(sharp_toy(), stream(), gradients)
    sar = SAR(optimizer=SGD, entropy_margin=0.7, radius=0.3, reset_entropy=0.0)
    ours, adaptation = adapted(sar, sharp_toy(), stream())
    assert all(0 < kept <= reliable for reliable, kept in kept_counts)
    assert any(kept < reliable < 8 for reliable, kept in kept_counts), kept_counts
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert adaptation.state["entropy"] == pytest.approx(averages[-1], abs=1e-10)
    assert adaptation.record["kept"].item() == pytest.approx(kept_counts[-1][1] / 8)


def test_sar_counts_a_step_that_nothing_is_left_of_at_the_worst_weights(monkeypatch):
    forwards = iter(range(100))

    def unsure_second(self, entropies, step):  # is asked for the loss, for the gradients, and at the worst weights
        return entropies < (0.0 if next(forwards) % 3 == 2 else 9.0)

    monkeypatch.setattr(SharpnessAwareEntropy, "_is_reliable", unsure_second)
    _, adaptation = adapted(SAR(optimizer=SGD), sharp_toy(), stream(2))
    assert (adaptation.updates, adaptation.skipped) == (0, 2)
    assert adaptation.record["kept"] == adaptation.record["updated"] == 0


def test_sar_returns_to_the_source_when_it_collapses():
    model = sharp_toy()
    source = torch.stack([model(*args) for args in stream()])
    sar = SAR(optimizer=SGD, entropy_margin=1.0, reset_entropy=10.0)
    ours, adaptation = adapted(sar, model, stream())
    assert adaptation.updates == 6
    torch.testing.assert_close(ours, source, rtol=0, atol=0)
    after, _ = adapted(SAR(optimizer=SGD, entropy_margin=1.0, reset_entropy=10.0, predicts="after"), model, stream())
    assert not any(torch.equal(a, b) for a, b in zip(after, source, strict=True))  # it comes before the next batch


def test_sar_leaves_the_weights_where_they_were_if_the_second_forward_fails():
    model = sharp_toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(module, args, output):  # a count would be put back after the first forward
        if not torch.equal(module[0].weight, before["head.0.weight"]):
            raise RuntimeError("in the second forward")

    handle = model.head.register_forward_hook(fail)
    sar = SAR(optimizer=SGD, entropy_margin=1.0, restore=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="in the second forward"), sar.attach(model):
        model(*stream(1)[0])
    handle.remove()
    assert reference.same_state(before, model.state_dict())


def test_layers_left_out():
    _, adaptation = adapted(SAR(optimizer=SGD, exclude=["head", "fusion"]), sharp_toy(), stream(1))
    assert set(adaptation.params) == {f"{m}.norm.{kind}" for m in ("audio", "video") for kind in ("weight", "bias")}


# --------------------------------------------------------------------------------------------- all on the same engine


def test_the_source_stays_as_it_is():
    model = make_toy()
    expected = torch.stack([model(*args) for args in batches()])
    ours, adaptation = adapted(Source(), model, batches())
    assert torch.equal(ours, expected)
    assert adaptation.updates == adaptation.skipped == 0
    assert adaptation.record["entropy"].item() == pytest.approx(sum(reference.entropies(expected[-1])) / 4, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("inference_mode", [True, False])
def test_in_a_trainer(name, inference_mode, tmp_path):
    model = make_toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        callbacks=[method := METHODS[name](optimizer=SGD, figures="all")],
        logger=logger,
        log_every_n_steps=1,
        inference_mode=inference_mode,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    [results] = trainer.test(model, loader(), verbose=False)
    prefix = method.settings.method.name.lower() + "/test"
    assert {f"{prefix}/loss", f"{prefix}/entropy", f"{prefix}/updated"} <= set(results)
    assert method.updates == (0 if name == "source" else len(loader()))
    assert reference.same_state(before, model.state_dict())
    assert f"{prefix}/entropy_step" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    plain, alone = torch.stack(model.seen), make_toy()
    ours, _ = adapted(METHODS[name](optimizer=SGD), alone, [args[:2] for args in loader()])
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-6)


class Sometimes(Method):
    """Records a figure in the second and the third step alone."""

    name = "Sometimes"

    def collect(self, model, fusion):
        return {"head.1.bias": model.head[1].bias}

    def loss(self, step):
        count = step.state["count"] = step.state.get("count", 0) + 1
        more = {"count": torch.tensor(float(count))} if count in (2, 3) else {}
        return step.logits.square().mean(), record_of(step.logits.square().mean(), step.logits, **more)


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_a_figure_that_not_every_step_has(log_every_n_steps, tmp_path):
    """As SuMi's `sharing`, which a batch of which no sample is kept does not have."""
    silent: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    logger, method = CSVLogger(tmp_path), TestTimeAdaptation(Sometimes(), figures="all")
    trainer = Trainer(
        callbacks=[method], logger=logger, log_every_n_steps=log_every_n_steps, accelerator="cpu", **silent
    )
    [results] = trainer.test(make_toy(), loader(), verbose=False)
    assert method.updates >= 4
    assert results["sometimes/test/count"] == 2.5
    steps = [row for row in csv_rows(tmp_path) if row.get("sometimes/test/entropy_step")]
    logged = [row.get("sometimes/test/count_step") for row in steps]
    assert logged == (["", "2.0", "3.0", *[""] * (method.updates - 3)] if log_every_n_steps == 1 else ["2.5"])


def csv_rows(folder):
    with open(folder / "lightning_logs/version_0/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", METHODS)
def test_replay_and_a_bad_batch_and_a_crash(name):
    predictions = []
    for replay in (True, False):
        model = make_toy()
        data = batches()
        data[1] = (torch.full_like(data[1][0], float("nan")), data[1][1])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.inference_mode(), METHODS[name](optimizer=SGD, replay=replay).attach(model) as adaptation:
            predictions.append(torch.stack([model(*args) for args in data]))
        assert adaptation.updates == (0 if name == "source" else 3)
        assert reference.same_state(before, model.state_dict())
        with pytest.raises(RuntimeError), METHODS[name](optimizer=SGD).attach(model):
            model(*data[0])
            model(data[0][0], torch.zeros(1))
        assert reference.same_state(before, model.state_dict())
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("make", [EATA, SAR])
def test_steps_without_a_fit_sample_are_counted_and_said_once(make, caplog):
    method = make(optimizer=SGD, entropy_margin=1e-6)
    with torch.no_grad(), method.attach(model := sharp_toy()) as adaptation:
        for args in stream(3):
            model(*args)
            assert adaptation.record["kept"] == adaptation.record["updated"] == 0
        model(*(x * float("nan") for x in args))
    assert (method.updates, method.skipped) == (0, 4)
    assert caplog.text.count("No sample of the batch is fit for a step") == 1
    assert caplog.text.count("step is not finite") == 1  # which NaN is, though no sample of NaN is fit


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_an_update_or_is_skipped(name, caplog):
    data = batches()
    data[1], data[2] = ((args[0] * float("nan"), args[1]) for args in data[1:3])
    _, adaptation = adapted(METHODS[name](optimizer=SGD), make_toy(), data)
    assert (adaptation.updates, adaptation.skipped) == ((0, 0) if name == "source" else (2, 2))
    assert caplog.text.count("not finite") == (name != "source")
    _, adaptation = adapted(METHODS[name](optimizer=SGD, steps=0), make_toy(), data)
    assert (adaptation.updates, adaptation.skipped) == (0, 0)


@pytest.mark.parametrize("name", METHODS)
def test_impossible_classes_are_as_improbable_ones(name):
    """A logit of -inf is a probability of 0, as that of -10,000 is: the same steps, the same predictions."""
    runs = []
    for fill in (-math.inf, -1e4):
        ours, adaptation = adapted(METHODS[name](optimizer=SGD), hide_classes(sharp_toy(), fill), stream())
        assert (adaptation.updates, adaptation.skipped) == (0 if name == "source" else 6, 0)
        assert all(value.isfinite() for value in adaptation.record.values())
        runs.append(ours)
    assert runs[0][..., 3:].isneginf().all()
    torch.testing.assert_close(runs[0][..., :3], runs[1][..., :3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("balance", ["marginal", "stream", "read"])
def test_impossible_classes_that_differ_from_sample_to_sample(balance):
    """And fewer possible classes than k, with a memory."""
    runs = []
    for fill in (-math.inf, -1e4):
        model = sharp_toy()
        model.head.register_forward_hook(lambda _, args, y, fill=fill: y.masked_fill(y < y.mean(1, keepdim=True), fill))
        method = ABPEM("fusion.*.attn", MODALITIES, k=4, balance=balance, memory_batches=3, optimizer=SGD)
        ours, adaptation = adapted(method, model, stream())
        assert (adaptation.updates, adaptation.skipped) == (6, 0)
        runs.append(ours.softmax(-1))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match='`predicts` to be one of "after", "before", but got \'never\''):
        Tent(predicts="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='`steps` to be 1 with predicts="before", but got 2'):
        Tent(steps=2)
    with pytest.raises(ValueError, match='`memory_batches` to be 1 with predicts="before", but got 3'):
        METHODS["abpem"](memory_batches=3, predicts="before")
    with pytest.raises(ValueError, match="`memory_batches` to be 1: READ has no memory"):
        TestTimeAdaptation(ReliableFusion(), "fusion.*.attn", memory_batches=2)
    with pytest.raises(ValueError, match="`fusion` to name the attention that READ adapts, but got None"):
        adapted(TestTimeAdaptation(ReliableFusion()), make_toy(), [])
    for make, message in (
        (partial(EATA, entropy_margin=-1), "`entropy_margin` to be a finite number above 0, but got -1"),
        (partial(EATA, redundancy=-3), "`redundancy` .* got -3"),
        (partial(EATA, fisher_weight=float("nan")), "`fisher_weight` .* got nan"),
        (partial(SAR, radius=-1), "`radius` .* got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match=r"`exclude` to name modules of Toy, but got \['no.such'\]"):
        adapted(SAR(exclude="no.such"), make_toy(), [])
    assert Tent(steps=2, predicts="after").settings.steps == 2


def test_two_methods_on_one_model():
    model = make_toy()
    with torch.no_grad(), Tent().attach(model):
        model(*batches(1)[0])
        with pytest.raises(ValueError, match="of this Toy are being adapted already"):
            adapted(READ("fusion.*.attn"), model, [])


@pytest.mark.parametrize("name", ["tent", "eata", "sar"])
def test_a_step_whose_prediction_fails_is_not_taken(name):
    """Nor is anything remembered of it, however the prediction was broken off."""
    for error in (RuntimeError, KeyboardInterrupt):
        model, data = make_toy(), batches()
        calls: list[bool] = []

        def fail(module, args, output, calls=calls, error=error):
            calls.append(torch.is_grad_enabled())
            if not calls[-1]:
                raise error

        with torch.no_grad(), METHODS[name](optimizer=SGD).attach(model) as adaptation:
            model(*data[0])
            weights = [p.detach().clone() for p in adaptation.params.values()]
            state = dict(adaptation.state)
            handle = model.head.register_forward_hook(fail)
            with pytest.raises(error):
                model(*data[1])
            handle.remove()
            assert all(map(torch.equal, weights, adaptation.params.values()))
            assert adaptation.state == state
            model(data[2][0][:0], data[2][1][:0])  # an empty batch takes no step, nor an old one
            assert all(map(torch.equal, weights, adaptation.params.values()))
            assert adaptation.updates == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sar_in_half_precision(dtype):
    model = make_toy().to(dtype)
    data = [(audio.to(dtype), video.to(dtype)) for audio, video in batches()]
    _, adaptation = adapted(SAR(optimizer=SGD, entropy_margin=1.1, reset_entropy=0.0), model, data)
    assert adaptation.updates == len(data)
    assert 0 < adaptation.state["entropy"] < 2


def test_a_broken_fisher_batch_is_named():
    broken = [(torch.full_like(audio, float("nan")), video) for audio, video in batches(1)]
    for _ in range(2):
        with pytest.raises(ValueError, match="`fisher_batches` to give finite gradients"):
            adapted(EATA(fisher_batches=broken), make_toy(), batches(1))


def test_the_golden_config_is_read():
    assert json.loads(str(Golden("read").record["config"]))["method"].lower() == "read"
