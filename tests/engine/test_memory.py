"""The token memory: first in first out, its own copy, clear about tokens that do not fit."""

import pytest
import torch
from torch import nn

from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.modules.patches import Changes


class Remembering:
    """A memory at a block, and the passes over it."""

    def __init__(self, block, name, batches):
        self.block, self.memory = block, TokenMemory(block, name, batches)

    def __call__(self, *args, **kwargs):
        """A pass, after which the batch is stored."""
        with Changes() as changes:
            self.memory.attach(changes, {})
            output = self.block(*args, **kwargs)
        self.memory.push()
        return output


def test_memory_is_first_in_first_out():
    run = Remembering(nn.Identity(), "block", 3)
    a, b, c, d = (torch.full((size, 2, 1), float(size)) for size in (1, 2, 3, 4))
    for x, expected in ((a, [a]), (b, [a, b]), (c, [a, b, c]), (d, [b, c, d])):
        assert torch.equal(run(x), torch.cat(expected))
        assert run.memory.verify(torch.zeros(sum(len(e) for e in expected), 2)) == sum(len(e) for e in expected[:-1])
    assert "forward" not in run.block.__dict__
    run.memory.clear()
    assert torch.equal(run(a), a)


def test_memory_keeps_its_own_copy():
    run = Remembering(nn.Identity(), "block", 2)
    x = torch.ones(1, 2, 1)
    run(x)
    x.zero_()
    assert torch.equal(run(x), torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]]))


def test_batches_of_another_length_are_left_out(caplog):
    run = Remembering(nn.Identity(), "fusion.0", 4)
    lengths, expected = (2, 3, 2, 3, 3), (1, 1, 2, 2, 3)
    for length, samples in zip(lengths, expected, strict=True):
        assert run(torch.ones(1, length, 1)).shape == (samples, length, 1)
        assert run.memory.verify(torch.zeros(samples, 2)) == run.memory.samples == samples - 1
        run.memory.expect(torch.zeros(1, 2))
    assert caplog.text.count("Stored batches entered 'fusion.0' with other numbers of tokens") == 1


class OptionalMask(nn.Module):
    """As in Hugging Face transformers: no mask where nothing in the batch is padded."""

    def forward(self, x, mask=None):
        return x if mask is None else x * mask[..., None]


def test_batches_without_a_mask_are_left_out(caplog):
    run = Remembering(OptionalMask(), "block", 4)
    mask = torch.tensor([[1.0, 0.0]])
    for given, samples in ((mask, 1), (None, 1), (mask, 2), (None, 2), (None, 3)):
        output = run(torch.ones(1, 2, 1), mask=given)
        assert output.shape[0] == samples
        assert (output[:, 1] == (given is None)).all()
    assert caplog.text.count("a mask where this one has none") == 1


class Positioned(nn.Module):
    """A block with a second argument that has no batch."""

    def forward(self, x, positions, mask=None):
        return x + positions


def test_arguments_without_a_batch_are_left_alone():
    run = Remembering(Positioned(), "block", 3)
    positions = torch.arange(2.0).view(1, 2, 1)
    stored = []
    for size in (4, 1, 4, 1, 1, 2):
        x = torch.full((size, 2, 1), float(size))
        assert torch.equal(run(x, positions), torch.cat([*stored[-2:], x]) + positions)
        stored.append(x)


def test_masks_are_remembered_with_their_tokens():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return x * mask[..., None]

    run = Remembering(Masked(), "block", 2)
    for value, expected in ((1.0, [1.0, 1.0]), (2.0, [1.0, 1.0, 2.0, 2.0])):
        output = run(torch.ones(2, 3, 1), mask=torch.full((2, 3), value))
        assert output[:, 0, 0].tolist() == expected


def test_a_block_without_tokens():
    run = Remembering(nn.Identity(), "fusion.0", 2)
    with pytest.raises(ValueError, match="'fusion.0' to be called with tokens"):
        run(torch.tensor(1.0))
