"""Generators that draw are put back, and known to have drawn."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_abpem.modules.randomness import RandomState

DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "random": random.random,
    "uniform": np.random.rand,
    "normal": np.random.randn,
    "integers": lambda: np.random.randint(1 << 30),
    "another seed": lambda: np.random.seed(np.random.randint(1 << 30)) or np.random.rand(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("is_ahead", [False, True], ids=["", "a normal number kept"])
def test_a_generator_is_put_back(draw, is_ahead):
    """NumPy draws normal numbers in pairs, and keeps the second one outside the generator's own memory."""
    np.random.seed(3)
    if is_ahead:
        np.random.randn()
    state, drawn = RandomState(nn.Linear(1, 1)), []
    assert not state.restore()
    for _ in range(3):
        drawn.append(draw())
        assert state.restore()
        assert not state.restore()
    assert drawn[0] == drawn[1] == drawn[2]
    draw()
    later = RandomState(nn.Linear(1, 1))
    assert not later.restore()
    assert state.restore()
    assert draw() == drawn[0]


def test_a_normal_number_that_is_kept_is_state():
    np.random.seed(3)
    np.random.randn()
    state = RandomState(nn.Linear(1, 1))
    kept = np.random.randn()  # it moves nothing in the generator's memory
    assert state.restore()
    assert np.random.randn() == kept


def test_other_generators_of_numpy():
    own: Any = np.random
    before = own.get_bit_generator()
    own.set_bit_generator(np.random.PCG64(1))
    try:
        state = RandomState(nn.Linear(1, 1))
        drawn = np.random.rand()
        assert state.restore()
        assert np.random.rand() == drawn
    finally:
        own.set_bit_generator(before)
