"""The guard: what it calls harm, by hand, and what it does about it, on models that are driven into it."""

import copy
import logging
import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_abpem import ABPEM
from lightning_abpem.engine.guard import CREDIT, LIMIT, Guard, harm
from lightning_abpem.engine.watch import Means
from lightning_abpem.engine.weights import AdaptedWeights
from lightning_abpem.methods import Tent
from tests.ranks import in_two_processes
from tests.toy import MODALITIES, batches, loader, make_toy

FAST: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=3.0)}
"""With these Tent and ABPEM ruin the toy within some batches."""


def means(entropy, source_entropy, share, source_share):
    values = [torch.tensor(x, dtype=torch.float64) for x in (entropy, source_entropy, share, source_share, 100.0)]
    return Means(*values)


def nats(p):
    return -sum(x * math.log(x) for x in p if x)


EVEN, UNEVEN, ONE = [0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ((0.5, EVEN), (0.5, EVEN)),
        ((0.9, EVEN), (0.5, EVEN)),
        ((0.9, EVEN), (0.5, UNEVEN)),
        ((0.5, UNEVEN), (0.5, EVEN)),
        ((0.5, EVEN), (0.5, ONE)),
    ],
)
def test_harm_by_hand(own, source):
    evener = min(nats(own[1]) - nats(source[1]), CREDIT * math.log(4))
    wanted = (own[0] - source[0] - evener) / math.log(4)
    assert harm(means(own[0], source[0], own[1], source[1])).item() == pytest.approx(wanted, abs=1e-12)


def test_what_is_harm_and_what_is_none():
    is_harm = {
        "the same": (0.5, 0.5, EVEN, EVEN),
        "surer": (0.1, 0.5, EVEN, EVEN),
        "surer and evener": (0.1, 0.5, EVEN, UNEVEN),
        "a little less sure, for it is evener": (0.6, 0.5, EVEN, UNEVEN),
        "less sure": (0.6, 0.5, EVEN, EVEN),
        "much less sure, though evener": (0.9, 0.3, EVEN, ONE),
        "collapsed, and as sure": (0.5, 0.5, UNEVEN, EVEN),
    }
    told = [name for name, own in is_harm.items() if harm(means(*own)) > LIMIT]
    assert told == ["less sure", "much less sure, though evener", "collapsed, and as sure"]


def adapt(make, data, **options):
    """Logits, weights after each batch, the adaptation's events and rates, of a toy that is ruined."""
    model, logits, weights = sure_toy(), [], []
    callback = make(**(FAST | options))
    with torch.no_grad(), callback.attach(model) as adaptation:
        for batch in data:
            logits.append(model(*batch))
            weights.append([p.detach().clone() for p in adaptation.params.values()])
        rate = adaptation._stepper.weights._optimizer.param_groups[0]["lr"]
    return logits, weights, callback.events, rate


def sure_toy():
    """A toy whose predictions tell its samples apart, as those of a trained model do."""
    model = make_toy()
    with torch.no_grad():
        model.head[1].weight.mul_(40)
    return model


MAKES = {
    "tent": Tent,
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES),
    "abpem with a memory": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_reset_brings_the_source_back(make):
    data = batches(40, 8)
    logits, _, events, _ = adapt(make, data, monitor="source", guard="reset")
    ruined, _, none, _ = adapt(make, data, guard="off")
    assert events
    assert not none
    first = events[0].batch  # judged after this many batches, and taken back at the next one
    assert same(logits[:first], ruined[:first])
    assert not torch.equal(logits[first], ruined[first])
    if make is Tent:  # ABPEM's balance and memory go on: they are of the stream, not of the weights
        again, _, _, _ = adapt(make, data[first:])  # from the source, with a fresh optimizer
        assert torch.equal(logits[first], again[0])


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_freeze_takes_no_more_steps(make):
    data, source = batches(40, 8), sure_toy()
    with torch.no_grad():
        plain = [source(*batch) for batch in data]
    logits, weights, events, _ = adapt(make, data, monitor="source", guard="freeze")
    (event,) = events
    assert (event.action, event.update) == ("freeze", event.batch)
    assert same(logits[event.batch :], plain[event.batch :])
    assert not same(logits[: event.batch], plain[: event.batch])
    assert all(same(own, weights[-1]) for own in weights[event.batch :])


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_warning_changes_nothing(make, caplog):
    data = batches(40, 8)
    with caplog.at_level(logging.WARNING):
        warned, _, events, _ = adapt(make, data, monitor="source", guard="warn")
    plain, _, _, _ = adapt(make, data, guard="off")
    assert same(warned, plain)
    assert 1 <= len(events) <= 5
    assert caplog.text.count("Adapting does harm") == len(events)
    assert "nats" in events[0].cause


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_rollback_goes_on_with_earlier_weights_and_smaller_steps(make):
    data = batches(40, 8)
    logits, _, events, rate = adapt(make, data, monitor="source", guard="rollback")
    ruined, _, _, _ = adapt(make, data)
    assert events
    assert rate == pytest.approx(3.0 * 0.3 ** len(events))
    assert all(event.action == "rollback" for event in events)
    if make is not Tent:  # which collapses into one class for good
        return
    with torch.no_grad():
        plain = torch.cat([sure_toy()(*batch) for batch in data]).argmax(1)
    agree, agree_ruined = ((torch.cat(x).argmax(1) == plain).double().mean() for x in (logits, ruined))
    assert agree > agree_ruined + 0.1


def test_the_weights_that_come_back_are_copies_of_good_ones():
    """The oldest of three copies, each taken every eighth batch that was good; the source's where there is none."""
    p = torch.nn.Parameter(torch.zeros(2))
    weights, guard = AdaptedWeights({"p": p}, partial(torch.optim.SGD, lr=1.0)), Guard("rollback")
    good, bad = means(0.5, 0.5, EVEN, EVEN), means(0.9, 0.5, EVEN, EVEN)
    history = []
    for _ in range(40):
        weights.step([-torch.ones(2)], torch.zeros(()))
        weights.settle()
        history.append(p.detach().clone())
        guard.judge(good)
        assert guard.act(weights) is None
    guard.judge(bad)
    event = guard.act(weights)
    assert event is not None
    assert event.batch == 41
    assert torch.equal(p, history[40 - 2 * 8 - 1])
    weights.step([-torch.ones(2)], torch.zeros(()))
    weights.settle()
    torch.testing.assert_close(p.detach(), history[23] + 0.3)
    guard.judge(bad)
    guard.act(weights)
    assert torch.equal(p, torch.zeros(2))
    guard.judge(bad)  # the source itself cannot be taken back
    assert guard.act(weights) is None
    weights.reset()
    weights.step([-torch.ones(2)], torch.zeros(()))
    assert torch.equal(p, torch.ones(2))


@pytest.mark.parametrize("broken", [0, 2])
def test_a_broken_batch_does_not_blind_the_guard(broken):
    """Its step is not taken, its predictions do not count, and the state can be saved and loaded with it."""
    data = batches(40, 8)
    audio, video = (torch.full_like(x, torch.nan) for x in data[broken])
    data[broken] = (audio, video)
    _, _, events, _ = adapt(Tent, data, monitor="source", guard="reset")
    assert events
    callback = Tent(**FAST, monitor="source", guard="reset")
    with torch.no_grad(), callback.attach(model := sure_toy()) as adaptation:
        for batch in data[: broken + 1]:
            model(*batch)
        adaptation.load_state_dict(adaptation.state_dict())


def test_few_samples_say_nothing():
    logits, _, events, _ = adapt(Tent, batches(7, 2), monitor="source", guard="reset")
    assert len(logits) == 7
    assert not events


@pytest.mark.parametrize("guard", ["rollback", "reset", "freeze", "warn"])
@pytest.mark.parametrize("cut", [3, 9, 20])
def test_a_stream_that_is_cut_goes_on_to_the_last_bit(guard, cut):
    data, options = batches(30, 8), {"monitor": "source", "guard": guard}
    whole, _, events, _ = adapt(Tent, data, **options)
    first, second = Tent(**FAST, **options), Tent(**FAST, **options)
    logits = []
    with torch.no_grad(), first.attach(model := sure_toy()) as adaptation:
        logits += [model(*batch) for batch in data[:cut]]
        state = adaptation.state_dict()
    second.load_state_dict(state)
    with torch.no_grad(), second.attach(model := sure_toy()):
        logits += [model(*batch) for batch in data[cut:]]
    assert same(logits, whole)
    assert second.events == events


def test_a_reset_of_the_stream_thaws():
    model = sure_toy()
    with torch.no_grad(), Tent(**FAST, monitor="source", guard="freeze").attach(model) as adaptation:
        data = batches(40, 8)
        for batch in data:
            model(*batch)
        assert adaptation.events
        updates = adaptation.updates
        adaptation.reset()
        model(*data[0])
        assert adaptation.updates == updates + 1


def test_in_a_trainer_the_events_are_there_after_the_run():
    callback, model = Tent(**FAST, monitor="source", guard="reset"), sure_toy()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(model, loader(40, 8), verbose=False)
    assert callback.events
    assert callback.events == adapt(Tent, batches(40, 8), monitor="source", guard="reset")[2]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert "flip_rate" in callback.averages[0]


def in_one_of_two(rank, guard):
    model = sure_toy().double()
    data = [tuple(x.double()[rank::2] for x in batch) for batch in batches(20, 8)]
    callback = Tent(**FAST, monitor="source", guard=guard)
    with torch.no_grad(), callback.attach(model) as adaptation:
        for batch in data:
            model(*batch)
        adaptation.drain(is_last=True)
        weights = [p.detach().clone() for p in adaptation.params.values()]
    return callback.events, weights


def test_two_processes_decide_together():
    (events, weights), (others, own) = in_two_processes(in_one_of_two, "rollback")
    model = sure_toy().double()
    data = [tuple(x.double() for x in batch) for batch in batches(20, 8)]
    callback = Tent(**FAST, monitor="source", guard="rollback")
    with torch.no_grad(), callback.attach(model) as adaptation:
        for batch in data:
            model(*batch)
        alone = [p.detach().clone() for p in adaptation.params.values()]
    assert events == others == callback.events
    assert events
    for a, b, c in zip(weights, own, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_harm_is_warned_of_by_default(make, caplog):
    with caplog.at_level(logging.WARNING):
        _, _, events, _ = adapt(make, batches(80, 8))
    assert [event.action for event in events] == caplog.text.count("Adapting does harm") * ["warn"] != []
