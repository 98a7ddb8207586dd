"""Runs of the zoo's models, plain and adapted, and what is compared of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_abpem import ABPEM
from tests.zoo.forwards import ENTRIES
from tests.zoo.nets import Call, Entry, Net
from tests.zoo.pictures import Album, Picture, differences

LR, K = 0.05, 2


@contextmanager
def _stacked(*contexts: Any) -> Iterator[None]:
    with contexts[0], contexts[1]:
        yield


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": nullcontext,
    "autocast": lambda: _stacked(torch.no_grad(), torch.autocast("cpu", torch.bfloat16)),
}


@dataclass
class Outcome:
    """Outputs and state after a run.

    Args:
        given: each output, as it was when the caller got it.
        after: all that is reachable from outputs, model and arguments after the run.
        random: the states of the global generators.
        model: of the run.
        updates: steps taken.
        skipped: steps not taken.
    """

    given: list[Picture]
    after: Picture
    random: Any
    model: Net
    updates: int = 0
    skipped: int = 0


def seed() -> None:
    """The global generators, as every run begins."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


def random_state() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_random_state(state: tuple[Tensor, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def make_callback(entry: Entry, **options: Any) -> ABPEM:
    """ABPEM with the published loss and plain SGD, so that a twin is easily written."""
    fusion = ".".join(filter(None, [entry.core, "fusion.*.attn"]))
    loss = {"k": K, "attention_weight": 1.0, "balance": "marginal"}
    known = {"fusion": fusion, "modalities": {"audio": 6, "video": 4}, **loss, **entry.options, **options}
    return ABPEM(**known, optimizer=lambda params: torch.optim.SGD(params, lr=LR))


def run(entry: Entry, how: str, callback: ABPEM | None = None) -> Outcome:
    """All batches, by a loop of one's own ("attach") or by Trainer.predict ("Trainer"); plain without a callback."""
    model, calls, album = entry.make(), entry.calls(), Album()
    album.picture((model, calls))
    seed()
    given: list[Picture] = []
    outputs: list[Any] = []
    loop = loop_by_hand if how == "attach" else loop_of_trainer
    adaptation = loop(entry, model, calls, callback, given, outputs)
    counts = (adaptation.updates, adaptation.skipped) if callback is not None else ()
    state = random_state()
    return Outcome(given, album.picture({"outputs": outputs, "model": model, "calls": calls}), state, model, *counts)


def loop_by_hand(
    entry: Entry, model: Net, calls: list[Call], callback: ABPEM | None, given: list[Picture], outputs: list[Any]
) -> Any:
    attached = nullcontext() if callback is None else callback.attach(model)
    with MODES[entry.around](), attached as adaptation:
        for call in calls:
            take(model.step(call), given, outputs)
    return adaptation


class _Takes(Callback):
    def __init__(self, given: list[Picture], outputs: list[Any]) -> None:
        self.given, self.outputs = given, outputs

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        take(outputs, self.given, self.outputs)


def loop_of_trainer(
    entry: Entry, model: Net, calls: list[Call], callback: ABPEM | None, given: list[Picture], outputs: list[Any]
) -> Any:
    callbacks = [_Takes(given, outputs), *([] if callback is None else [callback])]
    off: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, **off)
    data: Any = calls  # a list will do for a data set
    # Its own generator: a loader draws its workers' seed, also without workers.
    loader: DataLoader[Any] = DataLoader(data, batch_size=None, collate_fn=_untouched, generator=torch.Generator())
    trainer.predict(model, loader, return_predictions=False)
    return callback


def _untouched(call: Any) -> Any:
    return call


def take(output: Any, given: list[Picture], outputs: list[Any]) -> None:
    given.append(Album().picture(output))
    outputs.append(output)


# ------------------------------------------------------------------------------------------------------- expectations


@cache
def plain_run(name: str, how: str) -> Outcome:
    return run(ENTRIES[name], how)


def check_same(got: Outcome, expected: Outcome, tolerance: float = 0, but: tuple[str, ...] = ()) -> None:
    """Outputs as they were given, all that is reachable afterwards, and the generators."""
    assert len(got.given) == len(expected.given)
    for i, (x, y) in enumerate(zip(got.given, expected.given, strict=True)):
        assert not (found := differences(x, y, tolerance)), f"batch {i}: {found[:5]}"
    assert not (found := differences(got.after, expected.after, tolerance, but)), found[:8]
    check_random(got.random, expected.random)


def check_random(got: Any, expected: Any) -> None:
    assert torch.equal(got[0], expected[0]), "torch's generator"
    assert got[1] == expected[1], "Python's generator"
    assert all(np.array_equal(x, y) for x, y in zip(got[2], expected[2], strict=True)), "NumPy's generator"


def fingerprint(model: nn.Module, names: bool = True) -> dict[str, Any]:
    """Return all that an adaptation changes while it lasts: parameters, flags, gradients, modes, hooks, attributes."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    marks: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {kind: len(getattr(module, kind, ())) for kind in kinds}
        own = sorted(name for name in vars(module) if name not in ("_trainer", "_fabric")) if names else []
        marks[name] = (
            module.training,
            hooks,
            own,
            [name for name, _ in module.named_buffers(recurse=False)] if names else [],
        )
    for name, p in model.named_parameters():
        is_made = not isinstance(p, nn.UninitializedParameter)
        gradient = None if p.grad is None else p.grad.tolist()
        marks[f"{name}="] = (p.requires_grad, gradient, p.detach().tolist() if is_made else None)
    return marks
