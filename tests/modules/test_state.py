"""A snapshot puts everything back by value, also if a part of it cannot be."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem.modules.state import Snapshot


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.ring, self.calls = nn.Linear(3, 3), torch.zeros(4, 3), 0
        self.rows = [self.ring[i] for i in range(4)]
        self.sparse, self.latent = torch.eye(3).to_sparse(), torch.ones(3, requires_grad=True)
        self.latent.grad = torch.ones(3)


def test_what_cannot_be_put_back_is_said_once_and_the_rest_is_put_back():
    model = Holds()
    snapshot = Snapshot(model)
    with torch.enable_grad():
        model.rows[1].copy_(model.linear.bias + 1)
        model.sparse.mul_(2)
        model.ring[0] = 5
        model.calls = 7
    with pytest.raises(ValueError, match="'rows' of module 'Holds', 1|'sparse' of module 'Holds'"):
        snapshot.restore()
    assert not model.ring.any()
    assert model.calls == 0
    assert not model.ring.requires_grad
    snapshot.restore()


def test_a_latent_is_the_same_leaf_in_a_pass():
    model = Holds()
    latent, gradient = model.latent, model.latent.grad
    snapshot = Snapshot(model)
    assert model.latent is latent
    with torch.enable_grad():
        (model.latent * 3).sum().backward()
    with torch.no_grad():
        model.latent.add_(1).requires_grad_(False)
    snapshot.restore()
    assert torch.equal(model.latent, torch.ones(3))
    assert model.latent.requires_grad
    assert model.latent.grad is gradient
    assert gradient is not None
    assert torch.equal(gradient, torch.ones(3))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_kept_unless_it_is_edited(layout):
    clips = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    snapshot = Snapshot(nn.Linear(3, 3), [clips])
    assert snapshot.args[0] is clips
    snapshot.restore()
    clips.mul_(2)
    with pytest.raises(ValueError, match="argument 0 alone.*(nested Tensor|NestedTensor) with layout"):
        snapshot.restore()


def test_a_snapshot_is_let_go_of_without_a_collection():
    none: list[int] = []
    nothing = (x for x in none)
    snapshot = Snapshot(Holds(), [torch.zeros(2, 3), [torch.ones(3)], nothing], {"more": {"a": torch.ones(1)}})
    is_there = weakref.ref(snapshot)
    gc.collect()
    gc.disable()
    try:
        snapshot.restore()
        del snapshot
        assert is_there() is None
    finally:
        gc.enable()


TABLES = [name for name, value in nn.Module().__dict__.items() if isinstance(value, dict | set)]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_a_module_is_put_back(name):
    """Also the next torch's: a new kind of hooks fails here by its name."""
    model = Holds()
    before = dict.fromkeys(model.__dict__[name])
    snapshot = Snapshot(model)
    table = model.linear.__dict__[name], model.__dict__[name]
    for own in table:
        own.add("new") if isinstance(own, set) else own.update(new=None)
    assert id(model) in snapshot.restore()
    assert dict.fromkeys(model.__dict__[name]) == before
    assert "new" not in model.linear.__dict__[name]


def test_too_deep_a_chain_of_tuples_is_named():
    model: Any = Holds()
    for i in range(2000):
        model.history = (getattr(model, "history", None), i)
    with pytest.raises(ValueError, match="'history' of module 'Holds' holds tuples in tuples, too deep"):
        Snapshot(model)
