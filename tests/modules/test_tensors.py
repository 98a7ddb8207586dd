"""What is told of a tensor's bits."""

import pytest
import torch
from torch.profiler import profile

from lightning_abpem.modules.tensors import bit_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.complex64]


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (4,), (5, 7), (8, 16)])
def test_every_bit_counts(dtype, shape):
    """Each value of a tensor, whole, transposed or a part of another one; its least bit and its sign."""
    whole = (100 * torch.randn(2, *shape)).to(dtype)
    for x in (whole, whole.mT if whole.dim() > 1 else whole, whole[1:], whole[..., 1:]):
        raw, before = x.view(INTEGERS[x.element_size()]), bit_sum(x)
        for place in range(x.numel()):
            index = torch.unravel_index(torch.tensor(place), x.shape)
            for bit in (1, torch.iinfo(raw.dtype).min):
                raw[index] ^= bit
                assert not torch.equal(bit_sum(x), before)
                raw[index] ^= bit
        assert torch.equal(bit_sum(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_not_copied(dtype):
    x = torch.nn.Parameter(torch.ones(2048, 2048, dtype=dtype))
    with profile(profile_memory=True) as profiler:
        bit_sum(x)
    assert max(event.self_cpu_memory_usage for event in profiler.events()) < x.nbytes / 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_places_count(dtype):
    x = torch.arange(300 * 300).remainder(251).view(300, 300).to(dtype)
    sums = {bit_sum(y).item() for y in (x, x.roll(1, 0), x.roll(1, 1), x.flip(0), x.mT.contiguous())}
    assert len(sums) == 5
