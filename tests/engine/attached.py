"""ABPEM attached to the toy model, for the tests of the engine and of the Trainer."""

from functools import partial

import torch

from lightning_abpem import ABPEM
from tests.toy import (
    MODALITIES,
    PAPER,
)

ADAM = partial(torch.optim.Adam, lr=1e-2)


def abpem(**changes):
    options = {"fusion": "fusion.*.attn", "modalities": MODALITIES, "optimizer": ADAM, **PAPER} | changes
    return ABPEM(**options)


def predictions(model, stream, **changes):
    with torch.no_grad(), abpem(**changes).attach(model):
        return [model(*args) for args in stream]


def fingerprint(model):
    """Everything about a model that a run could leave changed."""
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [id(p.grad) for p in model.parameters()],
        "parameters": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


def as_on_a_gpu(monkeypatch):
    """Nobody looks at a value before the next batch."""
    for module in ("engine.healthy", "engine.recorded", "engine.weights", "modules.parameters", "modules.tensors"):
        monkeypatch.setattr(f"lightning_abpem.{module}.reading_waits", lambda x: True)
