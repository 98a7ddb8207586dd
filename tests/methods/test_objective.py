"""The loss against the naive twin, and its bad inputs."""

import numpy as np
import pytest
import torch

from lightning_abpem.attention.calls import FusedCall
from lightning_abpem.attention.fusion import JointFusion
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.functional import classes_kept
from lightning_abpem.methods.objective import Objective
from tests import reference

SPANS = {"audio": slice(0, 6), "video": slice(6, 10), "text": slice(10, 15)}


def compare(calls, spans):
    return JointFusion([], [("a", None)]).compare(calls, {name: Tokens(span) for name, span in spans.items()})


def layers(count, spans=SPANS):
    torch.manual_seed(0)
    pairs = [torch.randn(2, 4, 15, 12, dtype=torch.float64) for _ in range(count)]
    calls = [FusedCall("a", q, k, 0.5 / 3) for q, k in pairs]
    scores = [reference.mean_scores(call.q, call.k, 3, 0.5) for call in calls]
    return compare(calls, spans), scores


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"attention_weight": 5.0}, {"balance_weight": 0.0}, {"balance": "read"}, {"entropy_weight": 0.0}]
)
@pytest.mark.parametrize("names", [("audio", "video"), ("audio", "video", "text")])
def test_loss_and_record(count, options, names):
    spans = {name: SPANS[name] for name in names}
    statistics, scores = layers(count, spans)
    logits = torch.randn(4, 7, dtype=torch.float64)
    options = {"balance": "marginal", "attention_weight": 1.0} | options
    confidence, bootstrapping, record = Objective(k=3, **options)(logits, statistics)
    loss = confidence + options["attention_weight"] * bootstrapping
    assert loss.item() == pytest.approx(reference.loss(logits, scores, spans, 3, **options), abs=1e-12)
    pairs = [f"{m}_to_{n}" for m in names for n in names if m != n]
    figures = [f"{figure}/{pair}" for figure in ("attention_gap", "divergence") for pair in pairs]
    assert set(record) == {"principal_entropy", "entropy", "balance", *figures}
    for pair in reference.gaps(scores[0], spans):
        for figure, twin in (("attention_gap", reference.gaps), ("divergence", reference.divergences)):
            expected = sum(twin(score, spans)[pair] for score in scores) / count
            assert record[f"{figure}/{pair[0]}_to_{pair[1]}"].item() == pytest.approx(expected, abs=1e-12)
    assert record["entropy"].item() == pytest.approx(sum(reference.entropies(logits)) / 4, abs=1e-12)


@pytest.mark.parametrize(("classes", "kept"), [(2, 2), (3, 2), (5, 2), (10, 3), (50, 7), (309, 18), (1000, 32)])
def test_k_follows_the_number_of_classes(classes, kept):
    assert classes_kept("auto", classes) == kept


def test_self_blocks_are_constants():
    """The gradient is that of the cross blocks alone: moving a self block's statistics has no gradient."""
    q, k = torch.randn(2, 2, 10, 12, dtype=torch.float64).requires_grad_().unbind()
    spans = {name: SPANS[name] for name in ("audio", "video")}
    compared = compare([FusedCall("a", q, k, 0.1)], spans)
    for [(cross, target)] in compared.values():
        assert cross.mean.requires_grad
        assert not target.mean.requires_grad
        assert not target.std.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` to be an integer .* got 0"),
        ({"k": 2.5}, "`k` to be an integer .* got 2.5"),
        ({"k": True}, "`k` to be an integer"),
        ({"k": 1, "attention_weight": -1.0}, "`attention_weight` .* got -1.0"),
        ({"k": 1, "balance_weight": -0.5}, "`balance_weight` .* got -0.5"),
        ({"k": 1, "balance_weight": float("nan")}, "`balance_weight` .* got nan"),
        ({"k": 1, "attention_weight": None}, "`attention_weight` .* got None"),
        ({"k": 1, "entropy_weight": -1.0}, "`entropy_weight` .* got -1.0"),
        (
            {"k": 1, "entropy_weight": 0.0, "balance_weight": 0.0, "attention_weight": 0.0},
            "a part of the loss to have a weight",
        ),
        ({"entropy_weight": 0.0, "balance_weight": 0.0}, 'a number for `attention_weight`: "auto" is relative'),
        ({"k": "all"}, "`k` to be an integer .* got 'all'"),
        ({"attention_weight": "some"}, "`attention_weight` .* got 'some'"),
        ({"k": 1, "balance": "none"}, "`balance` to be one of .* got 'none'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_k_above_the_number_of_classes():
    with pytest.raises(ValueError, match="got 8 and logits of 7 classes"):
        Objective(k=8, balance="marginal")(torch.randn(4, 7), layers(1)[0])


def test_k_may_be_any_integer_type():
    assert Objective(k=np.int64(2)).k == 2  # type: ignore[arg-type]
