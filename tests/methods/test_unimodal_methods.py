"""SuMi and MM-TTA: their equations written out by hand, with unimodal passes through a fused head."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method, record_of
from lightning_abpem.methods import MMTTA, SuMi
from lightning_abpem.methods.mmtta import consistency, fuse_pseudo_labels
from lightning_abpem.methods.sumi import interquartile_share, mutual_information_sharing
from tests import reference
from tests.methods.test_methods import NORM_PARAMS, SGD, adapted, hide_classes, sharp_toy, stream

INPUTS = {"audio": 0, "video": 1}
ENCODERS = {"audio": "audio", "video": "video"}


def unimodal(model, args):
    audio, video = args
    return model(audio, torch.zeros_like(video)), model(torch.zeros_like(audio), video)


def norm_params(model):
    return {name: p for name, p in model.named_parameters() if name in NORM_PARAMS}


def descend(params, loss):
    with torch.no_grad():
        for p, gradient in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            p -= 0.05 * gradient


def kl(target, p):
    return sum(t * math.log(t / q) for t, q in zip(target, p, strict=True))


# --------------------------------------------------------------------------------------------------------------- SuMi


def test_the_interquartile_range_widens():
    features = torch.tensor([[0.0, 0.0], [1.0, 5.0], [2.0, 2.5], [4.0, 10.0]], dtype=torch.float64)
    # feature 1: least 0, largest 4, quartiles 1 and 3; feature 2: 0 and 10, quartiles 2.5 and 7.5
    assert interquartile_share(features, 0.0).tolist() == [0.0, 1.0, 1.0, 0.0]
    # half way the range is widened by 3/4 of its length: -0.5 to 4.5 and -1.25 to 11.25
    assert interquartile_share(features, 0.5).tolist() == [1.0, 1.0, 1.0, 1.0]
    # a fifth of the way by 0.3 of it: 0.4 to 3.6, 1 to 9
    assert interquartile_share(features, 0.2).tolist() == [0.0, 1.0, 1.0, 0.0]


def test_mutual_information_sharing():
    torch.manual_seed(0)
    fused, a, v = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    ours = mutual_information_sharing(fused, [a, v])
    for value, *rows in zip(ours, fused.tolist(), a.tolist(), v.tolist(), strict=True):
        p, p_a, p_v = map(reference.softmax, rows)
        expected = kl([(x + y) / 2 for x, y in zip(p, p_v, strict=True)], p_a)
        expected += kl([(x + y) / 2 for x, y in zip(p, p_a, strict=True)], p_v)
        assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("where", ["everywhere", "in one modality"])
def test_sharing_leaves_out_what_a_modality_cannot_predict(where):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, dtype=torch.float64)  # fused, audio, video
    logits[:, :2, 3] = -math.inf
    if where == "in one modality":
        logits[1, 2:, 0] = -math.inf

    def naive(logits):
        each = []
        for fused, a, v in zip(*logits.tolist(), strict=True):
            p, p_a, p_v = map(reference.softmax, (fused, a, v))
            for own, p_own, other in ((a, p_a, p_v), (v, p_v, p_a)):
                rows = [((x + y) / 2, q) for x, y, q, z in zip(p, other, p_own, own, strict=True) if z > -math.inf]
                each.append(sum(t * math.log(t / q) for t, q in rows))
        return [a + v for a, v in zip(each[::2], each[1::2], strict=True)]

    leaf = logits.clone().requires_grad_()
    ours = mutual_information_sharing(leaf[0], [leaf[1], leaf[2]])
    assert ours.tolist() == pytest.approx(naive(logits), abs=1e-12)
    [gradient] = torch.autograd.grad(ours.sum(), leaf)
    for place in [tuple(index) for index in logits.isfinite().nonzero().tolist()]:
        moved = torch.zeros_like(logits)
        moved[place] = 1e-5
        slope = (sum(naive(logits + moved)) - sum(naive(logits - moved))) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, abs=1e-8)
    assert gradient[logits == -math.inf].abs().sum() == 0


def test_sharing_is_the_plain_form_where_all_classes_are_possible():
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 5, 4)).requires_grad_()

    def plain(fused, unimodal):
        fused_p, total = fused.softmax(1), torch.zeros(5)
        for own, other in ((0, 1), (1, 0)):
            target = torch.stack([fused_p, unimodal[other].softmax(1)]).mean(0)
            total = total + (torch.xlogy(target, target) - target * unimodal[own].log_softmax(1)).sum(1)
        return total

    values = [form(logits[0], [logits[1], logits[2]]) for form in (mutual_information_sharing, plain)]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value.sum(), logits)[0] for value in values))


def sumi_by_hand(model, data, total, fused_margin, unimodal_margin, weight):
    """Sample by sample, with the paper's filters."""
    params, predictions, taken = norm_params(model), [], []
    for t, args in enumerate(data):
        logits, (a, v) = model(*args), unimodal(model, args)
        features = torch.cat([model.audio(args[0]).mean(1), model.video(args[1]).mean(1)], dim=1).tolist()
        kept = []
        for i, row in enumerate(features):
            inside = 0
            for j, value in enumerate(row):
                column = [other[j] for other in features]
                low, high = min(column), max(column)
                q1, q3 = low + (high - low) / 4, low + 3 * (high - low) / 4
                margin = 1.5 * (q3 - q1) * t / total
                inside += q1 - margin <= value <= q3 + margin
            smooth = inside >= len(row) * (0.6 + 0.4 * t / total)
            apart = (reference.entropies(a)[i] + reference.entropies(v)[i]) / 2
            if smooth and reference.entropies(logits)[i] <= fused_margin * math.log(5) and apart >= unimodal_margin:
                kept.append(i)
        taken.append(len(kept))
        if kept:
            p, p_a, p_v = (x[kept].softmax(1) for x in (logits, a, v))
            entropy = -(p * p.log()).sum(1)
            shared = ((p + p_v) / 2 * ((p + p_v) / 2 / p_a).log()).sum(1)
            shared = shared + ((p + p_a) / 2 * ((p + p_a) / 2 / p_v).log()).sum(1)
            each = entropy + (weight * shared if t < total / 2 else 0)
            coefficients = (fused_margin * math.log(5) - entropy.detach()).exp()
            q = p.sum(0).softmax(0)
            descend(params, (coefficients * each).mean() + (q * q.log()).sum())
        predictions.append(model(*args).detach())
    return torch.stack(predictions), taken


def test_sumi():
    options: dict[str, Any] = {"total_batches": 12, "fused_margin": 1.1, "unimodal_margin": 0.3, "sharing_weight": 2.0}
    data = stream(10, 16)
    expected, taken = sumi_by_hand(sharp_toy(), data, *(options.values()))
    ours, adaptation = adapted(SuMi(INPUTS, ENCODERS, optimizer=SGD, **options), sharp_toy(), data)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
    assert set(adaptation.params) == NORM_PARAMS
    assert max(taken) < 16  # the filters let some through, and not all, in both halves of the stream
    assert sum(taken[:6]) > 0
    assert sum(taken[6:]) > 0
    assert adaptation.updates == sum(count > 0 for count in taken)
    assert adaptation.skipped == taken.count(0)


def test_sumi_takes_no_step_without_samples():
    ours, adaptation = adapted(SuMi(INPUTS, ENCODERS, unimodal_margin=100.0, optimizer=SGD), sharp_toy(), stream(2))
    model = sharp_toy()
    torch.testing.assert_close(ours, torch.stack([model(*args) for args in stream(2)]), rtol=0, atol=0)
    assert (adaptation.updates, adaptation.skipped) == (0, 2)


def test_a_second_step_on_a_batch_is_not_a_second_batch():
    method = SuMi(INPUTS, ENCODERS, optimizer=SGD, steps=2)
    _, adaptation = adapted(method, sharp_toy(), stream(3))
    assert adaptation.state["batches"] == 3


def test_an_encoder_that_is_not_called():
    model = sharp_toy()
    model.spare = torch.nn.Linear(3, 3)
    with (
        pytest.raises(
            ValueError, match="Expected 'spare' of `encoders` to put out tokens .* the target does not call it"
        ),
        SuMi(INPUTS, {"audio": "audio", "video": "spare"}).attach(model.eval()),
    ):
        model(*stream(1)[0])


def test_a_reset_starts_the_smoothing_again():
    method = SuMi(INPUTS, ENCODERS, optimizer=SGD)
    with torch.no_grad(), method.attach(sharp_toy()) as adaptation:
        adaptation.model(*stream(1)[0])
        assert adaptation.state["batches"] == 1
        adaptation.reset()
        assert adaptation.state == {}


# -------------------------------------------------------------------------------------------------------------- MM-TTA


def test_consistency_is_the_inverse_of_the_symmetric_divergence():
    torch.manual_seed(0)
    slow, fast = torch.randn(2, 6, 4, dtype=torch.float64).softmax(-1)
    for value, p, q in zip(consistency(slow, fast), slow.tolist(), fast.tolist(), strict=True):
        assert value.item() == pytest.approx(1 / ((kl(p, q) + kl(q, p)) / 2 + 1e-6), rel=1e-9)
    assert consistency(slow, slow).tolist() == pytest.approx([1e6] * 6)


def test_pseudo_labels():
    sure_and_steady, wavering = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.0, 0.1, 0.9]])
    moved = torch.tensor([[0.0, 0.6, 0.4]])
    for selection in ("soft", "hard"):
        assert fuse_pseudo_labels([sure_and_steady, wavering], [sure_and_steady, moved], selection).item() == 0
        assert fuse_pseudo_labels([wavering, sure_and_steady], [moved, sure_and_steady], selection).item() == 0
    # two that waver alike: soft adds them up, hard takes the first
    a, b = torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[0.1, 0.45, 0.45]])
    assert fuse_pseudo_labels([a, b], [a, b], "soft").item() == 1
    assert fuse_pseudo_labels([a, b], [a, b], "hard").item() == 0


def test_a_pseudo_label_is_possible_for_the_fused_prediction():
    sure = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0]])
    possible = torch.tensor([[True, True, True], [False, True, True]])
    for selection in ("soft", "hard"):
        assert fuse_pseudo_labels([sure, sure], [sure, sure], selection, possible).tolist() == [0, 1]


@pytest.mark.parametrize("selection", ["soft", "hard"])
def test_mmtta(selection):
    model, predictions = sharp_toy(), []
    params = norm_params(model)
    slow = {name: p.detach().clone() for name, p in params.items()}
    for args in stream():
        logits = model(*args)
        predictions.append(logits.detach())
        slow = {name: 0.9 * slow[name] + 0.1 * p.detach() for name, p in params.items()}
        fast_p = [x.detach().softmax(1) for x in unimodal(model, args)]
        slow_model = sharp_toy()
        slow_model.load_state_dict({**model.state_dict(), **slow})
        slow_p = [x.detach().softmax(1) for x in unimodal(slow_model, args)]
        labels = []
        for i in range(len(logits)):
            weights = [1 / ((kl(s[i], f[i]) + kl(f[i], s[i])) / 2 + 1e-6) for s, f in zip(slow_p, fast_p, strict=True)]
            if selection == "hard":
                weights = [1.0, 0.0] if weights[0] >= weights[1] else [0.0, 1.0]
            mixed = sum(w * (s[i] + f[i]) / 2 for w, s, f in zip(weights, slow_p, fast_p, strict=True))
            labels.append(int(mixed.argmax()))
        picked = logits.log_softmax(1)[torch.arange(len(labels)), labels]
        descend(params, -picked.mean())
    method = MMTTA(INPUTS, selection=selection, momentum=0.9, optimizer=SGD)
    ours, adaptation = adapted(method, sharp_toy(), stream())
    torch.testing.assert_close(ours, torch.stack(predictions), rtol=0, atol=1e-10)
    assert adaptation.updates == 6


def test_the_slow_model_leaves_no_trace():
    model = sharp_toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    adapted(MMTTA(INPUTS), model, stream(3))
    assert reference.same_state(before, model.state_dict())
    assert storages == {name: p.data_ptr() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------- both, more


@pytest.mark.parametrize("make", [partial(SuMi, encoders=ENCODERS, fused_margin=1.1, unimodal_margin=0.3), MMTTA])
def test_impossible_classes_are_as_improbable_ones(make):
    runs = []
    for fill in (-math.inf, -1e4):
        ours, adaptation = adapted(make(inputs=INPUTS, optimizer=SGD), hide_classes(sharp_toy(), fill), stream())
        assert adaptation.updates > 0
        runs.append(ours[..., :3])
    torch.testing.assert_close(*runs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [partial(SuMi, encoders=ENCODERS), MMTTA])
def test_inputs_by_keyword(make):
    by_place, _ = adapted(make(inputs=INPUTS, optimizer=SGD), sharp_toy(), stream(3))
    named = make(inputs={"audio": "audio", "video": "video"}, optimizer=SGD)
    with torch.no_grad(), named.attach(model := sharp_toy()):
        by_name = torch.stack([model(audio=audio, video=video) for audio, video in stream(3)])
    torch.testing.assert_close(by_name, by_place, rtol=0, atol=0)


@pytest.mark.parametrize("make", [partial(SuMi, encoders=ENCODERS), MMTTA])
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"audio": 0}, "Expected `inputs` such as"),
        ({"audio": 0, "video": -1}, "at which position or under which keyword the target takes video, but got -1"),
        ({"audio": 0, "video": 1.5}, "takes video, but got 1.5"),
    ],
)
def test_bad_inputs(make, inputs, words):
    with pytest.raises(ValueError, match=words):
        make(inputs=inputs)


def test_inputs_that_the_target_does_not_take():
    with (
        pytest.raises(ValueError, match=r"called with 2 positions and the keywords \[\], but got \{'video': 5\}"),
        MMTTA({"audio": 0, "video": 5}).attach(model := sharp_toy()),
    ):
        model(*stream(1)[0])


def test_bad_options():
    with pytest.raises(ValueError, match=r"Expected `encoders` for \['audio', 'video'\].*got \['audio'\]"):
        SuMi(INPUTS, {"audio": "audio"})
    with pytest.raises(ValueError, match="Expected `total_batches` to be an integer >= 1, but got 0"):
        SuMi(INPUTS, ENCODERS, total_batches=0)
    with pytest.raises(ValueError, match="Expected `fused_margin` to be a finite number above 0"):
        SuMi(INPUTS, ENCODERS, fused_margin=0)
    with pytest.raises(ValueError, match='Expected `selection` to be one of "soft", "hard", but got \'both\''):
        MMTTA(INPUTS, selection="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected `momentum` to be in \[0, 1\), but got 1"):
        MMTTA(INPUTS, momentum=1)
    with (
        pytest.raises(ValueError, match="Expected 'head' of `encoders` to put out tokens"),
        SuMi(INPUTS, {"audio": "audio", "video": "head"}).attach(model := sharp_toy()),
    ):
        model(*stream(1)[0])
    with (
        pytest.raises(ValueError, match="Expected `watches` to name a module of Toy, but got 'ears'"),
        SuMi(INPUTS, {"audio": "ears", "video": "video"}).attach(model := sharp_toy()),
    ):
        model(*stream(1)[0])


def test_a_method_of_ones_own_sees_outputs_and_other_forwards():
    seen = []

    class Watching(Method):
        name = "Watching"
        watches = ("video",)

        def collect(self, model, fusion):
            return {"head.1.bias": model.head[1].bias}

        def gradients(self, step, rerun):
            seen.append((step, rerun(lambda args, kwargs: ([args[0], args[1] * 2], kwargs))))
            loss = step.logits.square().mean()
            return step.gradients(loss), record_of(loss, step.logits)

    model, args = sharp_toy(), stream(1)[0]
    expected = model(args[0], 2 * args[1]), model.video(args[1])
    with TestTimeAdaptation(Watching()).attach(model):
        model(*args)
    (step, other) = seen[0]
    torch.testing.assert_close(other.logits, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(step.outputs["video"], expected[1], rtol=0, atol=0)
