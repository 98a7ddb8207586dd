"""A course in a limited number of points keeps the means of all steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_abpem.engine.points import Points

STEPS = st.lists(st.tuples(st.floats(-9, 9) | st.just(math.nan), st.integers(1, 9), st.integers(0, 4)), max_size=70)


@given(steps=STEPS, most=st.integers(1, 8))
def test_means_and_classes_of_all_steps_are_kept(steps, most):
    points = Points(most)
    for i, (value, samples, predicted) in enumerate(steps):
        points.add({"x": value} | ({"late": 1.0} if i > 2 else {}), samples, [predicted] * samples)
    course, classes = points.columns(), points.classes(most=4, kept=2)
    assert len(course["first"]) <= most
    assert sum(course["samples"]) == sum(samples for _, samples, _ in steps)
    assert course["first"] == list(range(0, len(steps), course["every"]))
    for first, mean in zip(course["first"], course["figures"].get("x", []), strict=True):
        own = [(v, n) for v, n, _ in steps[first : first + course["every"]] if math.isfinite(v)]
        expected = sum(v * n for v, n in own) / sum(n for _, n in own) if own else None
        assert mean == (None if expected is None else pytest.approx(expected))
    assert len(classes["first"]) <= 4
    assert len(classes["counts"]) == len(classes["names"]) + 1 <= 3
    assert sum(map(sum, classes["counts"])) == sum(samples for _, samples, _ in steps)
    assert classes["used"] == len({predicted for _, _, predicted in steps})
    assert set(course["figures"].get("late", [])) <= {1.0, None}


def test_the_most_frequent_classes_have_a_row():
    points = Points(8)
    points.add({}, 7, [5, 5, 5, 2, 2, 2, 9])
    points.add({}, 2, [9, 1])
    assert points.classes(most=8, kept=2) == {
        "first": [0, 1],
        "names": [2, 5],
        "counts": [[3, 0], [3, 0], [1, 2]],
        "used": 4,
    }
