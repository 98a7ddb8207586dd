"""The token memory: first in first out, its own copy, clear about tokens that do not fit."""

import pytest
import torch
from torch import nn

from lightning_abpem.memory import TokenMemory


def run_memory(memory, block, x):
    with memory.extend():
        return block(x)


def test_memory_is_first_in_first_out():
    block = nn.Identity()
    memory = TokenMemory(block, "block", 3)
    a, b, c, d = (torch.full((size, 2, 1), float(size)) for size in (1, 2, 3, 4))
    for x, expected in ((a, [a]), (b, [a, b]), (c, [a, b, c]), (d, [b, c, d])):
        assert torch.equal(run_memory(memory, block, x), torch.cat(expected))
        assert memory.verify(torch.zeros(sum(len(e) for e in expected), 2)) == sum(len(e) for e in expected[:-1])
        memory.push()
    assert not block._forward_pre_hooks
    memory.clear()
    assert torch.equal(run_memory(memory, block, a), a)


def test_memory_keeps_its_own_copy():
    block = nn.Identity()
    memory = TokenMemory(block, "block", 2)
    x = torch.ones(1, 2, 1)
    run_memory(memory, block, x)
    memory.push()
    x.zero_()
    assert torch.equal(run_memory(memory, block, x), torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]]))


def test_memory_of_another_length():
    block = nn.Identity()
    memory = TokenMemory(block, "fusion.0", 2)
    run_memory(memory, block, torch.ones(1, 2, 1))
    memory.push()
    with pytest.raises(ValueError, match=r"'fusion.0' with the same number of tokens.*\[\(2, 1\)\].*\(3, 1\)"):
        run_memory(memory, block, torch.ones(1, 3, 1))
    assert not block._forward_pre_hooks
