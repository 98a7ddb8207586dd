"""Finding modules by pattern, and changing a model for a while."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem.modules.inference import without_inference_tensors
from lightning_abpem.modules.names import find_modules
from lightning_abpem.modules.patches import Changes, check_shapes
from lightning_abpem.modules.tensors import normal_tensor
from tests.reference import same_state
from tests.toy import TorchAttention, make_toy


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("fusion.0.attn", ["fusion.0.attn"]),
        ("fusion.*.attn", ["fusion.0.attn", "fusion.1.attn"]),
        ("**.attn", ["fusion.0.attn", "fusion.1.attn"]),
        ("fus*.?.attn", ["fusion.0.attn", "fusion.1.attn"]),
        (["fusion.1.attn", "fusion.0.attn"], ["fusion.0.attn", "fusion.1.attn"]),
    ],
)
def test_patterns(pattern, names):
    assert list(find_modules(make_toy(depth=2), pattern)) == names


def test_a_star_is_one_part_of_a_name():
    with pytest.raises(ValueError, match=r"'\*.attn' matches none of its \d+ modules. Names like it: fusion.0.attn"):
        find_modules(make_toy(), "*.attn")


def test_every_pattern_must_match():
    with pytest.raises(ValueError, match="'blocks_u.attn'"):
        find_modules(make_toy(), ["fusion.0.attn", "blocks_u.attn"])
    with pytest.raises(ValueError, match="at least one name pattern"):
        find_modules(make_toy(), [])


def test_changes_are_undone_in_reverse_order_whatever_fails():
    class Owner:
        value = "class"

    owner, order = Owner(), []
    changes = Changes()
    changes.note(lambda: order.append("first"))
    changes.set(owner, "value", "one")
    changes.set(owner, "value", "two")
    changes.note(lambda: [][1])
    interrupts = iter([KeyboardInterrupt()])

    def interrupted():
        for interrupt in interrupts:
            raise interrupt
        order.append("interrupted")

    changes.note(interrupted)
    with pytest.raises(KeyboardInterrupt):  # ahead of the error
        changes.close()
    assert order == ["interrupted", "first"]
    assert owner.value == "class"
    assert not owner.__dict__
    changes.close()


def test_inference_tensors_are_replaced_for_a_while():
    model = nn.BatchNorm1d(3)
    with torch.inference_mode():
        model.running_mean = torch.ones(3)
        model.cached = torch.arange(3)
    before = {"mean": model.running_mean, "cached": model.cached}
    with Changes() as changes:
        without_inference_tensors(changes, model)
        assert not model.running_mean.is_inference()
        assert not model.cached.is_inference()
        assert same_state({"mean": model.running_mean, "cached": model.cached}, before)
    assert model.running_mean is before["mean"]
    assert model.cached is before["cached"]


def test_inference_tensors_in_lists_and_dicts_are_replaced_for_a_while():
    model: Any = nn.Module()
    with torch.inference_mode():
        model.cache, model.maps = {7: torch.ones(3)}, ["a", torch.zeros(2)]
    before = model.cache[7], model.maps[1]
    with Changes() as changes:
        without_inference_tensors(changes, model)
        assert not model.cache[7].is_inference()
        assert not model.maps[1].is_inference()
        model.maps.pop()
        model.maps.append("newer")
    assert model.cache[7] is before[0]
    assert model.maps == ["a", "newer"]


def test_normal_tensor():
    with torch.inference_mode():
        x = torch.ones(2)
    assert not normal_tensor(x).is_inference()
    y = torch.ones(2, requires_grad=True)
    assert not normal_tensor(y).requires_grad
    z = torch.ones(2)
    assert normal_tensor(z) is z
    assert normal_tensor("text") == "text"


def test_patterns_match_at_the_top_and_under_any_name():
    model = make_toy()
    model.alias = model.fusion[0].attn
    model.attn = TorchAttention()
    assert list(find_modules(model, "**.attn")) == ["fusion.0.attn", "attn"]
    assert list(find_modules(model, "alias")) == ["alias"]
    assert list(find_modules(model, "fusion.**")) == [n for n, _ in model.named_modules() if n.startswith("fusion.")]
    assert list(find_modules(model, ["alias", "fusion.0.attn"])) == ["fusion.0.attn"]


def test_what_the_run_wrote_over_inference_tensors_stays():
    model = nn.Module()
    with torch.inference_mode():
        model.count, model.total = torch.zeros(1), torch.zeros(1)
    with Changes() as changes:
        without_inference_tensors(changes, model)
        model.count = model.count + 1
        model.total += 2
    assert model.count == 1
    assert model.total == 2


def test_names_leave_out_what_compiling_adds():
    inner: Any = torch.compile(nn.Sequential(nn.Linear(3, 3)))
    model: Any = nn.Sequential(inner)
    assert list(find_modules(model, "0.*")) == list(find_modules(model, "0._orig_mod.*")) == ["0.0"]
    whole: Any = torch.compile(model)
    assert find_modules(whole, "0")["0"] is model[0]._orig_mod


def streaming_model():
    """A model with a ring buffer and a view of it, and one tensor in two modules, all of inference mode."""
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with torch.inference_mode():
        model[0].ring = torch.arange(6.0)
        model[0].newest = model[0].ring[4:]
        model[0].shared = model[1].shared = torch.ones(2)
    return model


def test_inference_tensors_that_share_memory_have_copies_that_do():
    model = streaming_model()
    places = [(0, "ring"), (0, "newest"), (0, "shared"), (1, "shared")]
    before = {(i, name): model[i].__dict__[name] for i, name in places}
    with Changes() as changes:
        without_inference_tensors(changes, model)
        assert model[0].shared is model[1].shared
        assert not model[0].ring.is_inference()
        assert model[0].newest.data_ptr() == model[0].ring[4:].data_ptr()
        assert torch.equal(model[0].newest, torch.tensor([4.0, 5.0]))
    assert all(model[i].__dict__[name] is x for (i, name), x in before.items())


@pytest.mark.parametrize("counts", [True, False])
def test_what_a_run_writes_stays_with_all_that_shares_it(counts):
    model = streaming_model()
    with Changes() as changes:
        without_inference_tensors(changes, model)
        ring = model[0].ring if counts else model[0].ring.data
        ring[5] = 50
        own = model[0].ring, model[0].newest
    assert model[0].ring is own[0]
    assert model[0].newest is own[1]
    assert model[0].newest.tolist() == [4, 50]
    assert model[0].shared.is_inference()  # nobody wrote into that


def test_a_lazy_buffer_is_named():
    model = nn.Sequential(nn.LazyBatchNorm1d(affine=False)).eval()
    with pytest.raises(ValueError, match="'0.running_mean' has none. Run the model on one batch first"):
        check_shapes(model)
