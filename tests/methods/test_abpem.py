"""ABPEM's label-free parts: the balance over the stream, the bootstrapping's weight, k, and the published recipes."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from lightning_abpem import ABPEM
from lightning_abpem.functional import marginal_balance, stream_balance
from lightning_abpem.methods.abpem import RECIPES
from lightning_abpem.methods.objective import Objective
from lightning_abpem.methods.stream import extend_stream, shuffledness
from tests import reference
from tests.toy import CLASSES, MODALITIES, PAPER, EagerSplitAttention, TorchAttention, batches, make_toy

SGD = partial(torch.optim.SGD, lr=0.05)


def abpem(**options):
    return ABPEM("fusion.*.attn", MODALITIES, **({"optimizer": SGD} | options))


def double_stream(count=4, size=4):
    return [(audio.double(), video.double()) for audio, video in batches(count, size)]


# ------------------------------------------------------------------------------------------------- the stream's balance


def test_stream_balance_by_hand():
    torch.manual_seed(0)
    logits, counts = torch.randn(6, 4, dtype=torch.float64), torch.tensor([3.0, 0.0, 12.0, 1.0], dtype=torch.float64)
    rows = [reference.softmax(row) for row in logits.tolist()]
    mean = [sum(column) / 6 for column in zip(*rows, strict=True)]
    stream = [(2 + count) / (8 + 16) for count in counts.tolist()]
    expected = -sum(p * math.log(m) for p, m in zip(mean, stream, strict=True))
    assert stream_balance(logits, counts, prior=2.0).item() == pytest.approx(expected, abs=1e-12)


def test_a_stream_of_one_batch_without_prior_is_the_papers_balance():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    counts = logits.softmax(1).sum(0)
    ours, paper = stream_balance(logits, counts, prior=0.0), marginal_balance(logits)
    torch.testing.assert_close(ours, paper)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, paper)]
    torch.testing.assert_close(*gradients)


def test_a_batch_of_one_class_is_pushed_the_less_the_evener_the_stream():
    logits = torch.zeros(8, 5, dtype=torch.float64)
    logits[:, 2] = 3.0
    logits.requires_grad_()

    def push(counts):
        return torch.autograd.grad(stream_balance(logits, counts), logits)[0][:, 2].abs().sum()

    even = torch.full((5,), 100.0, dtype=torch.float64)
    lopsided = torch.tensor([10.0, 10, 460, 10, 10], dtype=torch.float64)
    first = torch.tensor([0.0, 0, 8, 0, 0], dtype=torch.float64)
    assert push(even) < 1e-12
    assert push(even) < push(first) < push(lopsided)
    alone = torch.autograd.grad(marginal_balance(logits), logits)[0][:, 2].abs().sum()
    assert push(first) < alone


@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_every_sample_counts_once(memory, steps):
    """Neither the memory's samples nor a second step on a batch are counted again."""
    model, seen = make_toy().double(), []
    with torch.no_grad(), abpem(memory_batches=memory, steps=steps).attach(model) as adaptation:
        for args in double_stream():
            frozen = make_toy().double()
            frozen.load_state_dict(model.state_dict())
            seen.append(frozen(*args).softmax(1).sum(0))
            model(*args)
    stream = adaptation.state["stream"]
    torch.testing.assert_close(stream.counts, torch.stack(seen).sum(0))
    assert stream.samples == 16
    assert stream.counts.sum().item() == pytest.approx(16)


def naive_shuffledness(rows):
    """From all pairs, one by one."""
    n = len(rows)

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    consecutive = [dot(rows[i], rows[i + 1]) for i in range(n - 1)]
    any_two = [dot(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j]
    a = sum(consecutive) / len(consecutive) if consecutive else 0.0
    b = sum(any_two) / len(any_two) if any_two else 0.0
    return min((1 + n * b) / (1 + n * a), 1.0) ** 2


@pytest.mark.parametrize("sizes", [[1], [9], [4, 1, 4], [1, 1, 1], [2, 7]])
def test_shuffledness_by_hand(sizes):
    torch.manual_seed(0)
    logits = 3 * torch.randn(sum(sizes), 4, dtype=torch.float64)
    stream = None
    for part in logits.split(sizes):
        stream = extend_stream(stream, part)
    assert stream is not None
    expected = naive_shuffledness([reference.softmax(row) for row in logits.tolist()])
    assert shuffledness(stream).item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(stream.last, logits.softmax(1)[-1])


def test_clumps_are_told_from_a_shuffled_stream_and_from_a_collapse():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(40)
    shuffled = labels[torch.randperm(200, generator=generator)]
    collapsed = torch.where(torch.rand(200, generator=generator) < 0.8, 1, 3)

    def of(classes):
        return shuffledness(extend_stream(None, 6 * torch.nn.functional.one_hot(classes, 5).double())).item()

    assert of(labels) < 0.1
    assert of(shuffled) > 0.6
    assert of(collapsed) > 0.8


def test_the_balance_is_the_papers_as_far_as_the_stream_looks_shuffled():
    torch.manual_seed(0)
    logits = torch.randn(8, 5, dtype=torch.float64)
    stream = extend_stream(extend_stream(None, torch.randn(20, 5, dtype=torch.float64)), logits)
    objective = Objective(attention_weight=0.0)
    share = shuffledness(stream) * 7 / 8
    expected = share * marginal_balance(logits) + (1 - share) * stream_balance(logits, stream.counts)
    torch.testing.assert_close(objective._balance(logits, stream, shuffledness(stream)), expected)
    alone = extend_stream(None, logits[:1])
    torch.testing.assert_close(
        objective._balance(logits[:1], alone, shuffledness(alone)), stream_balance(logits[:1], alone.counts)
    )


def test_a_reset_forgets_the_stream_and_a_bad_batch_does_not_enter_it():
    with torch.no_grad(), abpem().attach(make_toy()) as adaptation:
        first, second = batches(2)
        adaptation.model(*first)
        stream = adaptation.state["stream"]
        adaptation.model(second[0] * float("nan"), second[1])
        assert adaptation.state["stream"] is stream
        assert adaptation.skipped == 1
        adaptation.reset()
        assert adaptation.state == {}


def test_a_single_sample_is_no_cause_for_a_warning(caplog):
    with torch.no_grad(), abpem().attach(model := make_toy()):
        model(*batches(1, size=1)[0])
    assert "A batch of one sample" not in caplog.text


# ------------------------------------------------------------------------------------------ the weight of bootstrapping


@pytest.mark.parametrize("attention", [None, EagerSplitAttention, TorchAttention])
def test_the_automatic_weight(attention):
    """The parts' gradients one by one, from steps that are taken for each part alone."""

    def moved(**weights):
        torch.manual_seed(0)
        model = make_toy(attention and attention()).double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        options = {"balance": "marginal", "restore": False, "optimizer": partial(torch.optim.SGD, lr=1.0)}
        with torch.no_grad(), abpem(**(options | weights)).attach(model) as adaptation:
            model(*double_stream(1)[0])
        names = adaptation.params
        return {name: before[name] - p.detach() for name, p in model.named_parameters() if name in names}, adaptation

    others, _ = moved(attention_weight=0.0)
    pull, _ = moved(attention_weight=1.0, entropy_weight=0.0, balance_weight=0.0)
    both, adaptation = moved()
    reached = {name: others[name][pull[name] != 0] for name in pull}
    length = torch.cat(list(reached.values())).norm()
    weight = 0.3 * length / torch.cat([x.flatten() for x in pull.values()]).norm()
    assert adaptation.record["attention_weight"].item() == pytest.approx(weight.item(), rel=1e-9)
    for name in both:
        torch.testing.assert_close(both[name], others[name] + weight * pull[name])
    values = adaptation.record
    divergence = sum(value for name, value in values.items() if name.startswith("divergence/"))
    loss = values["principal_entropy"] - values["balance"] + weight * divergence
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-9)


def test_silent_sensors_give_the_bootstrapping_no_weight():
    """No sample has a spread of scores, so there is nothing to pull towards."""
    audio, video = batches(1)[0]
    with torch.no_grad(), abpem().attach(model := make_toy()) as adaptation:
        assert model(torch.ones_like(audio), torch.zeros_like(video)).isfinite().all()
    assert adaptation.record["attention_weight"] == 0
    assert adaptation.updates == 1


def test_observing_reports_the_other_parts_loss():
    with torch.no_grad(), abpem(steps=0).attach(model := make_toy()) as adaptation:
        model(*batches(1)[0])
    record = adaptation.record
    assert record["loss"].item() == pytest.approx((record["principal_entropy"] - record["balance"]).item())
    assert "attention_weight" not in record


# -------------------------------------------------------------------------------------------------- k and the recipes


def test_k_is_the_square_root_of_the_classes():
    with torch.no_grad(), abpem(steps=0).attach(model := make_toy()) as adaptation:
        logits = model(*batches(1)[0])
    expected = sum(reference.principal_entropies(logits, 2)) / 4
    assert logits.shape[1] == CLASSES == 5
    assert adaptation.record["principal_entropy"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("kinetics50-audio", (7, 5.0, 4)),
        ("kinetics50-video", (8, 1.0, 4)),
        ("vggsound-audio", (30, 1.0, 2)),
        ("vggsound-video", (28, 1.0, 4)),
    ],
)
def test_published_recipes(recipe, expected):
    settings = ABPEM.published("a", {"x": 2, "y": 3}, recipe, steps=2).settings
    method: Any = settings.method
    objective = method.objective
    assert (objective.k, objective.attention_weight, settings.memory_batches) == expected
    assert (objective.balance, objective.balance_weight, objective.entropy_weight) == ("marginal", 1.0, 1.0)
    assert settings.steps == 2
    assert set(RECIPES) >= {recipe}


def test_a_recipes_memory_holds_as_many_samples_at_any_batch_size():
    def batches_of(size):
        return ABPEM.published("a", "auto", "vggsound-video", batch_size=size).settings.memory_batches

    assert [batches_of(size) for size in (1, 16, 64, 128, 500)] == [128, 8, 2, 1, 1]


def test_unknown_recipes():
    with pytest.raises(ValueError, match="Expected `recipe` to be one of kinetics50-audio, .* but got 'kinetics50'"):
        ABPEM.published("a", "auto", "kinetics50")


@pytest.mark.parametrize(("rate", "is_bounded"), [(1e-4, False), (1e-2, True), (1.0, True)])
def test_guarded_bounds_steps_and_drift_at_any_rate(rate, is_bounded):
    callback = ABPEM.guarded("fusion.*.attn", {"audio": 6, "video": 4}, k=2, learning_rate=rate)
    model = make_toy()
    with torch.no_grad(), callback.attach(model) as adaptation:
        source = torch.cat([p.flatten() for p in adaptation.params.values()])
        before, steps, drifts = source, [], []
        for batch in batches(20):
            model(*batch)
            now = torch.cat([p.flatten() for p in adaptation.params.values()])
            steps.append(((now - before).norm() / source.norm()).item())
            drifts.append(((now - source).norm() / source.norm()).item())
            before = now
    assert max(drifts) <= 0.15 * (1 + 1e-5)
    assert (max(steps) > 0.009) is is_bounded
    assert max(steps) <= 0.01 * (1 + 1e-5) + 0.01 * 0.15  # and what the anchor pulls
    assert adaptation.record["drift"] > 0  # every batch is compared


def test_guarded_takes_other_options():
    settings = ABPEM.guarded("a", guard="warn", max_drift=None, steps=2).settings
    assert (settings.guard, settings.max_drift, settings.steps) == ("warn", None, 2)
    assert (settings.max_step, settings.anchor, settings.monitor, settings.learning_rate) == (
        0.01,
        0.01,
        "source",
        3e-3,
    )
    with pytest.raises(TypeError, match="guards"):
        ABPEM.guarded("a", guards="warn")


def test_published_is_the_paper_and_the_defaults_are_not():
    paper = {"attention_weight": 1.0, "balance": "marginal", "k": 2}
    assert paper == PAPER
    data = batches(4)

    def run(**options):
        with torch.no_grad(), abpem(**options).attach(model := make_toy()):
            return torch.stack([model(*args) for args in data])

    assert not torch.equal(run(), run(**PAPER))
