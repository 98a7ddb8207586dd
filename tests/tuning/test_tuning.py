"""`tune`: figures against a loop written by hand, the model untouched, streams that enter in several ways."""

import copy
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.methods import EATA, Tent
from lightning_abpem.tuning import RATES, Candidate, Tuning
from lightning_abpem.tuning.result import choose, expression
from tests.toy import CLASSES, batches, loader, make_toy

LABELLED = [(*batch, torch.arange(4) % CLASSES) for batch in batches(6)]
FUSION = "fusion.*.attn"


def call(model, batch):
    return model(*batch[:2])


class Data(LightningDataModule):
    """In another order every time, unless the random numbers are the same."""

    def test_dataloader(self):
        return DataLoader(loader().dataset, batch_size=4, shuffle=True)

    predict_dataloader = test_dataloader


class Net(nn.Module):
    """Arguments by name, with dropout."""

    def __init__(self):
        super().__init__()
        self.toy, self.drop = make_toy(), nn.Dropout(0.5)

    def forward(self, audio, video):
        return self.drop(self.toy(audio, video))


def by_hand(rate):
    """Figures of a candidate, in float64, from its predictions alone."""
    model = make_toy()
    with torch.no_grad():
        if rate is None:
            logits = torch.cat([call(model, batch) for batch in LABELLED]).double()
        else:
            with ABPEM(FUSION, learning_rate=rate).attach(model):
                logits = torch.cat([call(model, batch) for batch in LABELLED]).double()
    p = logits.softmax(-1)
    mean = p.mean(0)
    own, marginal = -(p * p.log()).sum(-1).mean().item(), -(mean * mean.log()).sum().item()
    hits = (logits.argmax(-1) == torch.cat([batch[2] for batch in LABELLED])).double().mean().item()
    return own, marginal, hits


@pytest.mark.parametrize("forward", [None, call])
def test_figures_are_those_of_a_loop_by_hand(forward):
    """By the LightningModule's own step, and by a call."""
    found = ABPEM(FUSION).tune(make_toy(), LABELLED, rates=(1e-3, 0.1), forward=forward, labels=lambda batch: batch[2])
    assert [row.learning_rate for row in found.rows] == [None, 1e-3, 0.1]
    assert (found.batches, [row.updates for row in found.rows]) == (6, [0, 6, 6])
    source = by_hand(None)
    for row in found.rows:
        entropy, marginal, hits = by_hand(row.learning_rate)
        unit = math.log(CLASSES)
        harm = (entropy - source[0] - min(marginal - source[1], 0.1 * unit)) / unit
        assert row.entropy == pytest.approx(entropy, abs=1e-6)
        assert row.information == pytest.approx(marginal - entropy, abs=1e-6)
        assert row.harm == pytest.approx(harm, abs=1e-6)
        assert row.accuracy == pytest.approx(hits)
        assert row.samples == 24
        if forward is None:
            assert row.logged == {"hits": pytest.approx(hits)}  # without the callback's own


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [m.training for m in model.modules()]


def numpy_state():
    state: Any = np.random.get_state()
    return state[1].tolist()


@pytest.mark.parametrize("data", [LABELLED, Data()], ids=["batches", "data module"])
def test_the_model_and_the_random_numbers_stay_as_they_are(data):
    model, abpem = make_toy().train(), ABPEM(FUSION)
    (weights, modes), seen = everything(model), list(model.seen)
    states = torch.get_rng_state(), random.getstate(), numpy_state()
    kept = copy.deepcopy(LABELLED)
    abpem.tune(model, data, rates=(0.1,))
    after, modes_after = everything(model)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert (modes_after, model.seen) == (modes, seen)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy_state()) == states[1:]
    assert all(torch.equal(x, y) for a, b in zip(kept, LABELLED, strict=True) for x, y in zip(a, b, strict=True))
    assert (abpem.updates, abpem.averages, abpem.state_dict()) == (0, {}, {})


def test_each_candidate_begins_at_the_source_and_meets_the_same_stream():
    """Two alike have the same row, also where the data module shuffles."""
    for stage in ("test", "predict"):
        found = ABPEM(FUSION).tune(make_toy(), Data(), rates=(0.1, 0.1), batches=3, stage=stage)
        assert found.rows[1] == found.rows[2]
        assert found.rows[1].samples == 12
        assert found.rows[1] != replace(found.rows[0], learning_rate=0.1)


def test_a_forward_that_edits_its_inputs_edits_no_others():
    def edit(model, batch):
        batch[0].mul_(2)
        return call(model, batch)

    rows = ABPEM(FUSION).tune(make_toy(), LABELLED, rates=(0.1, 0.1), forward=edit).rows
    assert rows[1] == rows[2]


def test_a_module_that_is_called_by_name():
    stream = ({"audio": audio, "video": video} for audio, video in batches(3))
    model = Net().train()
    found = ABPEM(f"toy.{FUSION}").tune(model, stream, rates=(1e-3,), batches=2)
    assert (found.rows[1].samples, found.rows[1].error) == (8, None)
    assert model.training


class Fragile(nn.Module):
    """The toy, which fails in some way once its weights are far from where they began."""

    def __init__(self, fail):
        super().__init__()
        self.toy, self.fail = make_toy(), fail

    def forward(self, audio, video):
        is_far = self.toy.fusion[0].attn.qkv.weight.abs().max() > 10
        return self.fail(self.toy(audio, video)) if is_far else self.toy(audio, video)


def overflow(logits):
    raise RuntimeError("an overflow\nin the kernel")


def test_what_stops_one_candidate_is_its_row():
    abpem = ABPEM(f"toy.{FUSION}")
    found = abpem.tune(Fragile(overflow), batches(3), rates=(1e-3, 1e3))
    assert found.rows[1].error is None
    assert found.rows[2].error == "RuntimeError: an overflow\nin the kernel"
    assert "RuntimeError: an overflow" in str(found)
    assert found.best is not found.rows[2]
    with pytest.raises(ValueError, match="No candidate could adapt: RuntimeError: an overflow"):
        abpem.tune(Fragile(overflow), batches(3), rates=(1e3,))


def test_predictions_that_are_not_finite():
    found = ABPEM(f"toy.{FUSION}").tune(Fragile(lambda logits: logits * float("nan")), batches(3), rates=(1e-3, 1e3))
    assert [row.error for row in found.rows] == [None, None, "Its predictions are not finite."]


def rows(*figures):
    """The source and candidates from (rate, information, harm)."""
    return [Candidate(rate, information=information, harm=harm) for rate, information, harm in figures]


def test_the_rule():
    """Most information without harm; the least rate of those that have as much."""
    margin = 0.03 * math.log(10)
    found = rows((None, 1.0, 0.0), (1e-3, 1.5, 0.0), (1e-2, 1.5 + margin - 1e-6, 0.0), (1e-1, 2.0, 0.031))
    assert choose(found, 10).learning_rate == 1e-3
    found[2] = replace(found[2], information=1.5 + margin + 1e-6)
    assert choose(found, 10).learning_rate == 1e-2
    found[2] = replace(found[2], error="no")
    assert choose(found, 10).learning_rate == 1e-3
    assert choose(rows((None, 1.0, 0.0), (1e-3, 1.0 + margin / 2, -0.1)), 10).learning_rate is None
    assert choose(rows((None, 1.0, 0.0), (1e-3, math.nan, math.nan)), 10).learning_rate is None
    tied = [*rows((None, 0.0, 0.0)), *(Candidate(0.1, a, information=1 + a, harm=0.0) for a in (0.0, 0.01))]
    assert choose(tied, 10).anchor == 0.01


def test_the_line_runs():
    given: dict[str, Any] = {"modalities": {"audio": 6, "video": 4}, "memory_batches": 2, "target": None}
    abpem = ABPEM([FUSION], **given)
    line = abpem.line(learning_rate=0.1, anchor=0.01)
    again = eval(line, {"ABPEM": ABPEM})
    assert again.settings == replace(abpem.settings, learning_rate=0.1, anchor=0.01)
    assert copy.copy(abpem).line() == abpem.line()
    published = ABPEM.published(FUSION, {"audio": 6, "video": 4}, "kinetics50-audio")
    assert eval(published.line(), {"ABPEM": ABPEM}).settings == published.settings
    assert EATA(learning_rate=1e-3).line(learning_rate=1.0) == "EATA(learning_rate=1.0)"


def test_what_has_no_form_in_python_is_an_ellipsis():
    assert expression("A", ["x", len], {"k": (1, 2.5), "m": {"a": (1, 3)}, "f": print}) == (
        "A('x', ..., k=(1, 2.5), m={'a': (1, 3)}, f=...)"
    )


def test_all_of_it_in_words():
    model = make_toy()
    with torch.no_grad():
        model.head[1].weight.mul_(6)
    found = ABPEM(FUSION).tune(model, LABELLED, rates=(0.001, 0.03), anchors=(0.0, 0.5))
    assert isinstance(found, Tuning)
    assert [row.name for row in found.rows] == ["source", "0.001", "0.03", "0.001, anchor 0.5", "0.03, anchor 0.5"]
    shown = str(found)
    assert "First 6 batches, 24 samples" in shown
    for row in found.rows:
        assert row.name in shown
    assert "best" in shown
    assert found.line is None or found.line in shown
    assert shown == repr(found)


class Certain(nn.Module):
    """Tent's: a norm whose weight decides how sure a prediction is, of one class for all at first."""

    def __init__(self, bias):
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(4), torch.tensor(bias)

    def forward(self, x):
        return self.norm(x) + self.bias


def test_the_notes():
    stream = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = Tent().tune(Certain([0.0, 0.0, 0.0, 0.0]), stream, rates=(1e-3, 0.1))
    assert found.best.learning_rate == 0.1
    assert found.line == "Tent(learning_rate=0.1)"
    assert found.notes == ["It is the largest of `rates`: larger ones may do better."]
    few = Tent().tune(Certain([9.0, 0.0, 0.0, 0.0]), stream, rates=(1e-9, 1e-8))
    assert few.line is None
    assert "leave the model as it is" in few.notes[0]
    assert "of 4 classes evenly" in few.notes[1]


class NoCopy(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "Expected `batches` to be an integer >= 1, but got 0"),
        ({"rates": ()}, "Expected `rates` and `anchors` to hold numbers"),
        ({"rates": (-1,)}, "Expected `learning_rate` to be .* but got -1"),
        ({"anchors": (2,)}, "anchor"),
        ({"data": []}, "Expected `data` to have a batch"),
        ({"data": 3}, "Expected `data` to be an iterable of batches, but got a int"),
        ({"data": [loader()]}, "Expected `data` to be one loader"),
        ({"data": Data(), "forward": call}, "but got a LightningDataModule"),
        ({"labels": lambda batch: batch[2][:1]}, r"a class for each of 4 samples, \(4,\), but got \(1,\)"),
        ({"model": NoCopy(3, 3)}, "Expected a model that can be copied"),
        ({"abpem": ABPEM(FUSION, steps=0)}, "Expected `steps` >= 1"),
        ({"abpem": ABPEM("nothing")}, "No candidate could adapt: Expected `fusion` to match"),
        ({"abpem": ABPEM(FUSION, target="head.0")}, "No candidate could adapt|Expected logits"),
    ],
)
def test_bad_arguments(arguments, message):
    options = {"abpem": ABPEM(FUSION), "model": make_toy(), "data": LABELLED, "rates": (1e-3,)} | arguments
    abpem: TestTimeAdaptation = options.pop("abpem")
    with pytest.raises(ValueError, match=message):
        abpem.tune(**options)


def test_the_default_rates():
    assert RATES == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
