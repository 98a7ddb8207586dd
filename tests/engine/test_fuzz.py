"""Runs made at random end in finite adapted predictions, in a counted skip or in an error that names what it saw.

None leaves anything behind. 50 of them, the same every time, and 500; `make fuzz` tries 10,000 others.
"""

import logging
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lightning_abpem.engine.weights import AdaptedWeights
from tests.engine.fuzzed import ATTENTIONS, METHODS, Case, sgd, try_case

FEW, CASES = 50, int(os.environ.get("FUZZ", "500"))
FOUND: Counter[str] = Counter()


def mostly(usual, *rare):
    """One of the usual values four times out of five."""
    return st.integers(0, 4).flatmap(lambda i: st.sampled_from(rare) if i == 4 and rare else st.sampled_from(usual))


OPTIONS = {
    "steps": mostly([1], 0, 2, 3, -1, True),
    "optimizer": mostly(
        [sgd(1e-3), sgd(0.1)], sgd(1.0), torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, None
    ),
    "reset": mostly(["never"], "batch", 1, 2, 0, "dataloader", "always", "5 samples", "0 samples"),
    "replay": st.booleans(),
    "on_error": mostly(["predict"], "raise", "ignore"),
    "predicts": mostly([None], "after", "before", "now"),
    "learning_rate": mostly([None, 1e-3, "auto", (1e-3, 3e-2)], 1e-12, 0, "fast", torch.nan, [1.0]),
    "clip_gradients": mostly([None, 1.0], 1e-9, 0.0, -1.0),
    "anchor": mostly([0.0], 0.5, 1.0, -0.1),
    "max_step": mostly([None], 1e-6, 0.02, 0, torch.inf),
    "max_drift": mostly([None], 1e-6, 0.1, 0, torch.inf),
    "monitor": mostly(["off"], "source", 1, 2, 0, "all"),
    "guard": mostly(["off"], "rollback", "reset", "freeze", "warn", "stop"),
    "target": mostly([None], "", "fusion", "nothing"),
    "projections": mostly([None], "qkv", "nothing", [], 3),
    "logits": mostly([None], lambda output: output, lambda output: None, lambda output: torch.zeros(2, 3, 4)),
}
OF_ABPEM = {
    "k": mostly(["auto", 1, 2], 0, -1, 3, 6, 7, 2.0, None),
    "attention_weight": mostly(["auto", 1.0, 0.0], 5.0, 100.0, -1.0, torch.nan, None),
    "balance": mostly(["stream", "marginal"], "read", "none"),
    "balance_weight": mostly([1.0], 0.0, -1.0),
    "entropy_weight": mostly([1.0], 0.0, torch.inf),
    "memory_batches": mostly([1], 2, 3, 0, 1.5),
    "memory_at": mostly([None], "fusion", "fusion.0", "head", "nothing"),
}
MODALITIES = mostly(
    [None, None, None, "auto"],
    {"audio": (0, 1), "video": (1, 2)},
    {"audio": (0, 2), "video": (2, 3)},
    {"audio": (0, 2), "video": (1, 3)},
    {"audio": (0, 2), "video": (2, 99)},
    {"audio": (2, 2), "video": (3, 4)},
    {"audio": 3, "video": (3, 4)},
    {"audio": 3, "video": 4},
    {"audio": 0, "video": 4},
    {"audio": 4},
    {},
    {"audio": lambda a, v: torch.zeros(len(a), a.shape[1] + v.shape[1], dtype=torch.bool), "video": (0, 1)},
    {
        "audio": lambda a, v: torch.arange(a.shape[1] + v.shape[1]).lt(a.shape[1]).expand(len(a), -1),
        "video": lambda a, v: torch.arange(a.shape[1] + v.shape[1]).ge(a.shape[1]).expand(len(a), -1),
    },
    {"audio": lambda a, v: None, "video": lambda a, v: None},
    ["audio", "video"],
    "some",
)
FUSION = mostly(
    [None],
    "fusion.0.attn",
    "fusion",
    "**.attn",
    "nothing.*",
    [],
    "head",
    "",
    {("audio", "video"): "fusion.0.attn"},
    {"self": "fusion.*.attn", "cross": "fusion.*.attn"},
)


@st.composite
def cases(draw):
    method = draw(mostly(["ABPEM"], *METHODS))
    count = draw(st.integers(1, 4))
    tokens = draw(st.tuples(st.integers(1, 7), st.integers(1, 5)))
    varies = draw(mostly([False], True))
    known = OPTIONS | (OF_ABPEM if method == "ABPEM" else {})
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=6, unique=True))
    dtype = draw(mostly([torch.float32, torch.float64], torch.bfloat16, torch.float16))
    mixed = ["bfloat16", "float16"] if dtype == torch.float32 else []
    return Case(
        method=method,
        attention=draw(mostly([*ATTENTIONS, "separate"])),
        depth=draw(st.integers(1, 2)),
        classes=draw(mostly([2, 5], 1, 3, 40)),
        output=draw(mostly(["logits"], "dict", "tuple", "softmax", "hidden class", "tokens")),
        dtype=dtype,
        tokens=[draw(st.tuples(st.integers(1, 7), st.integers(1, 5))) if varies else tokens for _ in range(count)],
        sizes=draw(st.lists(mostly([2, 4], 0, 1, 7), min_size=count, max_size=count)),
        content=draw(
            st.lists(mostly(["normal"], "zeros", "alike", "huge", "nan", "inf"), min_size=count, max_size=count)
        ),
        around=draw(st.sampled_from(["no_grad", "inference_mode", "grad", *mixed])),
        modalities=draw(MODALITIES),
        fusion=draw(FUSION),
        options={name: draw(known[name]) for name in names},
        frozen=draw(st.sampled_from([0, 0, 2, 3])),
    )


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    FOUND.clear()
    yield
    logging.disable(logging.NOTSET)


PROFILE = settings(
    derandomize=CASES <= 500,
    deadline=None,
    database=None,
    report_multiple_bugs=CASES > 500,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [FEW, pytest.param(CASES, marks=pytest.mark.slow)])
def test_runs_made_at_random(count):
    settings(PROFILE, max_examples=count)(given(case=cases())(_count))()
    adapted, errors = FOUND["adapted"], sum(FOUND.values()) - sum(FOUND[x] for x in ("adapted", "skipped", "observed"))
    print(FOUND["adapted"], FOUND["skipped"], FOUND["observed"], errors)  # noqa: T201
    assert adapted > count // 10  # or else nothing is tested but errors
    assert errors > count // 10


def _count(case):
    result = try_case(case)
    FOUND[result] += 1
    event(result[:100])


USUAL = Case("ABPEM", "fused", 1, 5, "logits", torch.float32, [(6, 4)] * 2, [3, 2], ["normal"] * 2, "no_grad")


def test_what_a_run_comes_to():
    assert try_case(USUAL) == "adapted"
    assert try_case(replace(USUAL, options={"steps": 0})) == "observed"
    assert try_case(replace(USUAL, content=["nan"] * 2)) == "adapted"  # of each batch one sample is broken
    assert try_case(replace(USUAL, content=["nan"] * 2, sizes=[1, 1])) == "skipped"
    assert try_case(replace(USUAL, options={"k": 6})).startswith("Expected `k` to be an integer in")


def broken_restore(monkeypatch):
    monkeypatch.setattr(AdaptedWeights, "restore", lambda self: None)


def unclear_error(monkeypatch):
    monkeypatch.setattr(AdaptedWeights, "step", lambda *args: int("x"))


def unclear_skip(monkeypatch):
    """Skip the second batch: it is predicted, and counted by the error's class."""
    steps = iter([AdaptedWeights.step, lambda *args: torch.zeros(2) @ torch.zeros(3)])
    monkeypatch.setattr(AdaptedWeights, "step", lambda *args: next(steps)(*args))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_restore, "the model is not as it was"),
        (unclear_error, "invalid literal"),
        (unclear_skip, "RuntimeError"),
    ],
)
def test_what_is_broken_is_found(monkeypatch, spoil, message):
    spoil(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        try_case(replace(USUAL, options={"on_error": "predict" if spoil is unclear_skip else "raise"}))
