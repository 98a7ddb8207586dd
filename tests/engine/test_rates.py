"""Several learning rates side by side: each is the run with that rate alone, and the choice is the one by hand."""

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.engine.rates import AGREEMENT, batch_sums, scores
from lightning_abpem.methods import EATA, MMTTA, READ, SAR, SuMi, Tent
from tests.engine.attached import fingerprint
from tests.ranks import in_two_processes
from tests.toy import MODALITIES, batches, loader, make_toy

RATES = (1e-3, 3e-2, 0.3)
METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES),
    "abpem, memory": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
    "abpem, two steps": partial(ABPEM, "fusion.*.attn", MODALITIES, steps=2),
    "abpem, anchor": partial(ABPEM, "fusion.*.attn", MODALITIES, anchor=0.1, clip_gradients=0.01, max_step=0.4),
    "abpem, reset": partial(ABPEM, "fusion.*.attn", MODALITIES, reset=6),
    "tent": Tent,
    "tent, before": partial(Tent, predicts="before"),
    "eata": partial(EATA, redundancy=1.0, entropy_margin=1.0, fisher_batches=batches(2, seed=7)),
    "sar": partial(SAR, entropy_margin=1.0),
    "sumi": partial(
        SuMi, {"audio": 0, "video": 1}, {"audio": "audio", "video": "video"}, fused_margin=1.0, unimodal_margin=0.0
    ),
    "mm-tta": partial(MMTTA, {"audio": 0, "video": 1}),
    "read": partial(READ, "fusion.*.attn"),
}


def run(made, stream, model=None):
    """Return the predictions, and the rate that made each; None without several."""
    model, rates, logits = make_toy() if model is None else model, [], []
    with torch.no_grad(), made.attach(model) as adaptation:
        for batch in stream:
            logits.append(model(*batch))
            rates.append(adaptation.record.get("learning_rate"))
    return logits, [None if rate is None else rate.item() for rate in rates]


@pytest.mark.parametrize("name", METHODS)
def test_each_prediction_is_that_of_the_run_with_its_rate_alone(name):
    """Bit for bit, whichever rate leads; and more than one does."""
    stream = batches(14, 6, seed=20)
    single = {rate: run(METHODS[name](learning_rate=rate), stream)[0] for rate in RATES}
    model = make_toy()
    before, source = fingerprint(model), copy.deepcopy(model.state_dict())
    together, leading = run(METHODS[name](learning_rate=RATES), stream, model)
    for i, (logits, rate) in enumerate(zip(together, leading, strict=True)):
        [own] = [own for own in RATES if own == pytest.approx(rate)]
        assert torch.equal(logits, single[own][i]), (i, rate)
    assert len(set(leading)) > 1
    assert fingerprint(model) == before
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


WAYS: dict[str, tuple[torch.dtype, Callable[[], Any], dict[str, Any]]] = {
    "bfloat16": (torch.bfloat16, torch.no_grad, {}),
    "inference mode": (torch.float32, torch.inference_mode, {}),
    "float16 autocast": (torch.float32, partial(torch.autocast, "cpu", torch.float16), {}),
    "momentum": (torch.float32, torch.no_grad, {"optimizer": partial(torch.optim.SGD, momentum=0.9)}),
    "no replay": (torch.float32, torch.no_grad, {"replay": False, "memory_batches": 2, "steps": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_so_it_is_in_any_precision_and_mode(way):
    """The weights at the end are those of the rate that led last."""
    dtype, around, options = WAYS[way]

    def found(rate):
        model, logits = make_toy().to(dtype), []
        with around(), ABPEM("fusion.*.attn", MODALITIES, learning_rate=rate, **options).attach(model) as adaptation:
            for batch in batches(10, 6):
                logits.append(model(*(x.to(dtype) for x in batch)))
                leading.append(adaptation.record.get("learning_rate"))
            return logits, [p.detach().clone() for p in adaptation.params.values()]

    leading: list[Any] = []
    single = {rate: found(rate) for rate in RATES}
    leading.clear()
    together, weights = found(RATES)
    rates = [min(RATES, key=lambda rate: abs(rate - own.item())) for own in leading]
    assert len(set(rates)) > 1
    for i, rate in enumerate(rates):
        assert torch.equal(together[i], single[rate][0][i])
    assert all(map(torch.equal, weights, single[rates[-1]][1]))


def naive_scores(logits, source):
    """By the words of docs/callback, in NumPy and float64: logits (K, N, C), source (N, C)."""

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def nats(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    p, q = softmax(logits), softmax(source)
    unit, together = math.log(p.shape[-1]), np.concatenate([q[None], p]).mean(0)
    source_entropy, source_spread = np.mean([nats(row) for row in q]), nats(q.mean(0))
    result = []
    for k, own in enumerate(p):
        entropy, spread = np.mean([nats(row) for row in own]), nats(own.mean(0))
        harm = (entropy - source_entropy - min(spread - source_spread, 0.1 * unit)) / unit
        agreement = np.mean([together[i, row.argmax()] for i, row in enumerate(own)])
        is_out = k > 0 and harm > 0.03
        result.append(-math.inf if is_out else (spread - entropy) / unit + AGREEMENT * agreement)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_scores_by_hand(seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.5, 1.0, 3.0, 6.0], dtype=torch.float64)[:, None, None]
    logits = scale * torch.randn(4, 9, 5, generator=generator, dtype=torch.float64)
    source = 2 * torch.randn(9, 5, generator=generator, dtype=torch.float64)
    wanted = naive_scores(logits.numpy(), source.numpy())
    assert scores(batch_sums(logits, source)).tolist() == pytest.approx(wanted, abs=1e-12)


def test_the_first_rate_leads_until_sixteen_samples_were_seen():
    _, leading = run(ABPEM("fusion.*.attn", MODALITIES, learning_rate=RATES), batches(10, 6))
    assert leading[:3] == pytest.approx([1e-3] * 3)  # 6 and 12 samples, which count for a little less


def test_a_rate_that_does_harm_does_not_lead():
    """A rate of 30 ruins the toy at once; the smallest goes on as if it were alone."""
    stream = batches(12, 6)
    together, leading = run(ABPEM("fusion.*.attn", MODALITIES, learning_rate=(1e-4, 1e-3, 30.0)), stream)
    assert max(leading) < 1
    assert all(logits.isfinite().all() for logits in together)


def test_a_rate_without_finite_predictions_is_out_and_the_others_are_compared():
    """With 1e37 scores overflow; the first two lead when they do without it."""
    made = partial(ABPEM, "fusion.*.attn", MODALITIES)
    stream = batches(12, 6)
    wanted = run(made(learning_rate=(1e-3, 0.3)), stream)
    broken = made(learning_rate=(1e-3, 0.3, 1e37))
    with torch.no_grad(), broken.attach(make_toy()) as adaptation:
        rates = adaptation._stepper._rates
        assert rates is not None
        model, found = adaptation.model, []
        for batch in stream:
            model(*batch)
            found.append(adaptation.record["learning_rate"].item())
        assert rates.sums is not None
        assert rates.sums.isfinite().all()
        broken.load_state_dict(adaptation.state_dict())
    assert set(found) == set(wanted[1])
    assert len(set(found)) == 2


def test_rates_in_any_order_are_the_same():
    stream = batches(8, 6)
    one, other = (run(ABPEM("fusion.*.attn", MODALITIES, learning_rate=own), stream) for own in (RATES, RATES[::-1]))
    assert one[1] == other[1]
    assert all(map(torch.equal, one[0], other[0]))


def test_auto_is_three_rates():
    stream = batches(6, 6)
    auto, three = (
        run(ABPEM("fusion.*.attn", MODALITIES, learning_rate=own), stream) for own in ("auto", [1e-4, 1e-3, 3e-3])
    )
    assert all(map(torch.equal, auto[0], three[0]))


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"learning_rate": "automatic"}, "'automatic'"),
        ({"learning_rate": [1e-3]}, "[0.001]"),
        ({"learning_rate": [1e-3, 1e-3]}, "[0.001, 0.001]"),
        ({"learning_rate": [1e-3, -1]}, "[0.001, -1]"),
        ({"learning_rate": [1e-3, "auto"]}, "[0.001, 'auto']"),
        ({"learning_rate": [[1e-3], [1e-2]]}, "[[0.001], [0.01]]"),
        ({"learning_rate": [10.0**-i for i in range(9)]}, "[1.0, 0.1"),
        ({"learning_rate": "auto", "steps": 0}, "steps=0"),
        ({"learning_rate": "auto", "reset": "batch"}, "reset='batch'"),
        ({"learning_rate": "auto", "guard": "rollback"}, "guard='rollback'"),
    ],
)
def test_refused(options, seen):
    with pytest.raises(ValueError, match="Expected") as error:
        ABPEM("fusion.*.attn", MODALITIES, **options)
    assert seen in str(error.value)


def test_a_reset_begins_anew_in_every_rate():
    stream = batches(9, 6)
    model = make_toy()
    with torch.no_grad(), ABPEM("fusion.*.attn", MODALITIES, learning_rate=RATES).attach(model) as adaptation:
        first = [model(*batch) for batch in stream]
        adaptation.reset()
        again = [model(*batch) for batch in stream]
    assert all(map(torch.equal, first, again))


def test_what_is_skipped_and_said_is_what_leads(caplog):
    """A rate that overflows is none of the user's business while another one predicts."""
    with caplog.at_level(logging.WARNING):
        made = ABPEM("fusion.*.attn", MODALITIES, learning_rate=(1e-3, 1e38), monitor="off", guard="off")
        run(made, batches(4, 4))
    assert made.skipped == 0
    assert made.updates == 4
    assert not caplog.records


def test_broken_samples_cost_themselves_in_every_rate():
    """A sample of NaN: predictions of the healthy ones are those without it."""
    whole = batches(8, 6)
    broken = [tuple(x.clone() for x in batch) for batch in whole]
    broken[4][0][2] = math.nan
    healthy = [0, 1, 3, 4, 5]
    less = [tuple(x[healthy] for x in batch) if i == 4 else batch for i, batch in enumerate(whole)]
    made = partial(ABPEM, "fusion.*.attn", MODALITIES, learning_rate=RATES)
    one, other = run(made(), broken), run(made(), less)
    assert one[1] == pytest.approx(other[1])
    for i, (x, y) in enumerate(zip(one[0], other[0], strict=True)):
        torch.testing.assert_close(x[healthy] if i == 4 else x, y, rtol=1e-4, atol=1e-5)


def test_a_trainer_logs_the_rate_that_leads():
    model, made = make_toy(), ABPEM("fusion.*.attn", MODALITIES, learning_rate=RATES, figures="all")
    trainer = Trainer(callbacks=[made], logger=False, enable_progress_bar=False, enable_model_summary=False)
    [result] = trainer.test(model, loader(10), verbose=False)
    assert any("learning_rate" in name for name in made.averages[0])
    assert min(RATES) <= made.averages[0]["learning_rate"].item() <= max(RATES)
    assert result


def interrupt(*_):
    raise KeyboardInterrupt


def test_interrupted_among_the_rates(monkeypatch):
    """The leading weights are in the model after an error in the pass of another, and the source's at the end."""
    model = make_toy()
    source = copy.deepcopy(model.state_dict())
    with torch.no_grad(), ABPEM("fusion.*.attn", MODALITIES, learning_rate=RATES, restore=True).attach(model) as own:
        stream = batches(5, 6)
        for batch in stream:
            model(*batch)
        before = [p.detach().clone() for p in own.params.values()]
        rates = own._stepper._rates
        assert rates is not None
        with monkeypatch.context() as patch:
            patch.setattr(rates.followers[0].weights, "step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(*stream[0])
        assert not any(map(torch.equal, before, own.params.values()))  # the leader's step was taken
        model(*stream[1])
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def edited(state, course, name, value):
    """Return a state with another value in a course that does not predict."""
    others = copy.deepcopy(state["rates"]["others"])
    others[course]["weights"][name] = value
    return {**state, "rates": {**state["rates"], "others": others}}


@pytest.mark.filterwarnings("ignore:The `with` block ended")
def test_a_state_of_other_rates_or_with_damage_changes_nothing():
    made = partial(ABPEM, "fusion.*.attn", MODALITIES)
    one, three = made(), made(learning_rate=RATES)
    for own in (one, three):
        run(own, batches(6, 6))
    state = three.state_dict()
    nan = {name: x.fill_(torch.nan) for name, x in copy.deepcopy(state["weights"]["params"]).items()}
    refused = [
        (one.state_dict(), "3 learning rates side by side, but got 1"),
        (edited(state, 1, "params", {}), "what adapts is not the same"),
        (edited(state, 0, "params", nan), "to be finite"),
        (edited(state, 0, "counts", [1, 2]), "Expected `rates` of a state"),
        ({**state, "rates": {**state["rates"], "leader": 3}}, "Expected `rates` of a state"),
        ({**state, "rates": {**state["rates"], "leader": True}}, "Expected `rates` of a state"),
        ({**state, "rates": {**state["rates"], "sums": torch.ones(2, 9)}}, "Expected `rates` of a state"),
    ]
    with torch.no_grad(), made(learning_rate=RATES).attach(make_toy()) as adaptation:
        before = adaptation.state_dict()
        for damaged, message in refused:
            with pytest.raises(ValueError, match=message):
                adaptation.load_state_dict(damaged)
            now = adaptation.state_dict()
            assert now["rates"]["leader"] == before["rates"]["leader"] == 0
            for own, other in zip([now, *now["rates"]["others"]], [before, *before["rates"]["others"]], strict=True):
                assert all(torch.equal(x, other["weights"]["params"][k]) for k, x in own["weights"]["params"].items())


def leading_rates(rank):
    torch.manual_seed(0)
    stream = batches(10, 6, seed=rank)
    return run(ABPEM("fusion.*.attn", MODALITIES, learning_rate=RATES), stream)[1]


def test_two_processes_choose_together():
    first, second = in_two_processes(leading_rates)
    assert first == second
    assert len(set(first)) > 1
