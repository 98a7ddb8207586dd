"""Forwards put together at random leave no trace either.

30 of them, the same every time, and 300; `make fuzz-forwards` tries 5,000 of them, others every time.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zoo.composed import ARGUMENTS, BATCHES, EDITS, KINDS, LEAVES, MODULES, Part, compose, without_behind
from tests.zoo.harness import check_same, fingerprint, make_callback, run
from tests.zoo.twin import twin

FEW, CASES = 30, int(os.environ.get("FUZZ_FORWARDS", "300"))

some_batches = st.frozensets(st.integers(0, BATCHES - 1))
parts = st.builds(
    Part,
    place=st.sampled_from(ARGUMENTS + MODULES),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=3).map(tuple),
    leaf=st.sampled_from(sorted(LEAVES)),
    edit=st.sampled_from(EDITS),
    batches=some_batches,
    is_late=st.booleans(),
    is_buffer=st.booleans(),
)


forwards = given(
    parts=st.lists(parts, min_size=1, max_size=4),
    draws=st.sampled_from([frozenset(), frozenset(), frozenset(), frozenset({0, 2}), frozenset({1})]),
    is_recursive=st.sampled_from([False, False, False, True]),
    replay=st.booleans(),
    memory=st.sampled_from([1, 1, 3]),
)
options = settings(
    derandomize=CASES <= 300,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [FEW, pytest.param(CASES, marks=pytest.mark.slow)])
def test_forwards_made_at_random(count):
    settings(options, max_examples=count)(forwards(check))()


def check(parts, draws, is_recursive, replay, memory):
    entry = compose(without_behind(parts) if memory > 1 else parts, draws, is_recursive and memory == 1)
    plain = run(entry, "attach")
    check_same(run(entry, "attach", make_callback(entry, steps=0, replay=replay, memory_batches=memory)), plain)
    got = run(entry, "attach", make_callback(entry, replay=replay, memory_batches=memory))
    check_same(got, twin(entry, memory), entry.tolerance)
    assert got.updates == BATCHES
    assert fingerprint(got.model) == fingerprint(plain.model)
