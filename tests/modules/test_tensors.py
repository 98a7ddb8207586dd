"""Comparisons of tensors by their bits."""

import pytest
import torch
from torch.profiler import profile

from lightning_abpem.modules.tensors import SavedTensor, bit_sum, same_bits

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


EDITS = {
    "frees its storage": lambda x: x.untyped_storage().resize_(0),
    "makes it longer": lambda x: x.resize_(64).fill_(7),
    "conjugates it by .data": lambda x: setattr(x, "data", x.conj()),
    "edits before it": lambda x: x.as_strided((2,), (1,), 0).fill_(7),
    "edits what it is a view of": lambda x: (x if x._base is None else x._base).mul_(2),
    "turns the sign of zero": lambda x: x.copy_(x.conj().resolve_conj()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64, torch.complex32])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_all_bits_are_put_back(edit, dtype):
    """Those of a tensor and of one that is a part of a larger one, with what lies around it."""
    whole = torch.full((8,), complex(-1, 0), dtype=dtype)
    for x in (whole.clone(), whole[2:]):
        storage, before = x.untyped_storage(), x.untyped_storage().tolist()
        saved = SavedTensor(x, 0)
        edit(x)
        assert saved.restore(str)
        assert (x.untyped_storage().tolist(), x.untyped_storage().data_ptr()) == (before, storage.data_ptr())
        assert not x.is_conj()
        assert not saved.restore(str)


def test_signs_of_zero_and_nans_are_bits():
    for dtype in (torch.complex128, torch.float32):
        nan, zero = torch.tensor([torch.nan], dtype=dtype), torch.zeros(1, dtype=dtype)
        assert same_bits(nan, nan.clone())
        assert not same_bits(zero, -zero)
    x = torch.tensor([1 - 2j])
    assert same_bits(x.conj(), torch.tensor([1 + 2j]))
    assert same_bits(x.conj().imag, torch.tensor([2.0]))


def test_a_small_part_of_a_large_tensor_is_saved_alone():
    part = torch.zeros(10**6)[:3]
    with profile(profile_memory=True) as profiler:
        saved = SavedTensor(part, 0)
    assert max(event.self_cpu_memory_usage for event in profiler.events()) < 1000
    part.fill_(1)
    assert saved.restore(str)
    assert not part.any()
