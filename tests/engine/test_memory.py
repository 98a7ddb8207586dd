"""The token memory: first in first out, its own copy, clear about tokens that do not fit."""

import copy
import sys

import pytest
import torch
from torch import nn

from lightning_abpem.engine.memory import TokenMemory
from lightning_abpem.modules.patches import Changes
from tests.engine.attached import abpem, predictions
from tests.toy import Toy, batches, make_toy


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
    stored: list[torch.Tensor] = []
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


class Counterfactual(Toy):
    """Asks what silence would give, ahead of the prediction."""

    def forward(self, audio, video):
        return super().forward(audio, video) - super().forward(torch.zeros_like(audio), video).softmax(-1)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Counterfactual()

    def forward(self, audio, video):
        return self.inner(audio, video)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_block_that_is_called_twice_is_refused_in_the_first_batch(steps):
    model, refusal = Counterfactual().eval(), r"'fusion\.0' to be called once .* called again.*memory_at"
    callback = abpem(steps=steps, memory_batches=2)
    with torch.no_grad(), callback.attach(model), pytest.raises(ValueError, match=refusal):
        model(*batches(1)[0])


def test_a_module_around_all_calls_of_the_block_can_be_remembered():
    """As the message says."""
    model = Whole().eval()
    changed = {"fusion": "inner.fusion.*.attn", "memory_at": "inner", "attention_weight": 0.0}
    assert len(predictions(model, batches(3), memory_batches=2, **changed)) == 3


class Lengths(nn.Module):
    """A block that sums the first tokens of each sample, by lengths in a list or a tensor."""

    def forward(self, x, lengths):
        kept = torch.arange(x.shape[1]) < torch.as_tensor(lengths)[:, None]
        return x * kept[..., None] if len(kept) == len(x) else x * kept[:1, :, None]


def test_batches_with_other_arguments_are_left_out(caplog):
    """For an argument that is no tensor has no rows that could be remembered."""
    run, ones = Remembering(Lengths(), "block", 4), torch.ones(1, 3, 1)
    for lengths, samples in (([2], 1), ([3], 1), ([2], 2), ([3], 2), ([2], 2)):
        output = run(ones, lengths)
        assert output.shape[0] == samples
        assert (output.sum(1) == lengths[0]).all()
    assert "give lengths as a tensor" in caplog.text
    run = Remembering(Lengths(), "block", 4)
    for lengths, sums in (([2], [2]), ([3], [2, 3]), ([1], [2, 3, 1])):
        assert run(ones, torch.tensor(lengths)).sum(1).flatten().tolist() == sums


class Object:
    """An argument that no state can hold."""


def test_arguments_of_stored_batches_are_in_the_state():
    class Block(nn.Module):
        def forward(self, x, *others):
            return x

    def block(_):
        return 0

    run, kept, x = Remembering(Block(), "block", 3), Object(), torch.ones(1, 2, 1)
    assert run(x, 3, kept, block, None).shape[0] == 1
    assert run(x, 3, kept, block, None).shape[0] == 2
    assert run(x, 3, Object(), block, None).shape[0] == 1  # another object may say anything
    state = run.memory.state_dict()
    assert [batch["others"] for batch in state] == [[[3], [], [], [None]]] * 2
    later = Remembering(Block(), "block", 3)
    later.memory.load_state_dict(state)
    assert later(x, 3, Object(), len, None).shape[0] == 3  # whose are those of the other process?
    assert later(x, 4, kept, block, None).shape[0] == 1


class Embedded(nn.Module):
    """A block that adds what it gets besides the tokens."""

    def forward(self, x, *added):
        return x + sum(added)


def test_parameters_have_no_rows_of_samples():
    run = Remembering(Embedded(), "block", 3)
    position, table = nn.Parameter(torch.arange(2.0).view(2, 1)), nn.Parameter(torch.ones(5, 1))
    latents = nn.Parameter(torch.full((1, 2, 1), 3.0))
    x, stored = torch.ones(2, 2, 1), []  # as many samples as tokens
    for _ in range(3):
        output = run(x, position, table[:2], latents.expand(2, -1, -1))
        stored.append(x + position + 4)
        assert torch.equal(output, torch.cat(stored))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no notes")
def test_a_note_names_the_arguments_that_got_rows():
    run = Remembering(Embedded(), "block", 3)
    x, bias = torch.ones(2, 2, 1), torch.ones(2, 1)
    run(x, bias)
    with pytest.raises(RuntimeError) as error:
        run(x, bias)
    run.memory.add_note(error.value)
    [note] = error.value.__notes__
    assert "in its arguments of shape (2, 2, 1), (2, 1): each of them is taken to have a row" in note


def test_copies_of_the_block_in_a_pass_have_a_forward_of_their_own():
    block = nn.Linear(1, 1)
    memory = TokenMemory(block, "block", 2)
    with Changes() as changes:
        memory.attach(changes, {})
        own = copy.deepcopy(block)
        assert not {"forward", "__getstate__"} & own.__dict__.keys()
    assert not {"forward", "__getstate__"} & block.__dict__.keys()


def test_the_caller_may_edit_the_logits_that_it_gets():
    seen = []
    for step in (lambda logits: logits / 1.5, lambda logits: logits.div_(1.5)):
        with torch.no_grad(), abpem(memory_batches=4).attach(model := make_toy()):
            seen.append(torch.stack([step(model(*batch)) for batch in batches(6)]))
    assert torch.equal(*seen)
