"""Products of parameters: a few combinations have every value, the others are slow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def covering(*columns: Sequence[Any]) -> list[Any]:
    """Return all combinations as parameters; fast are as many as the longest column has, which have every value.

    Columns of the same length are not in step: two of two values each meet in all four ways among four rows.
    """
    rows = range(max(map(len, columns)))
    fast = {tuple((i + k * (i // len(own))) % len(own) for k, own in enumerate(columns)) for i in rows}
    found = []
    for at in product(*(range(len(own)) for own in columns)):
        values = [own[i] for own, i in zip(columns, at, strict=True)]
        found.append(pytest.param(*values, marks=() if at in fast else pytest.mark.slow))
    return found
