"""Interrupts that are injected at any byte code of the package, and what a run may not leave behind."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lightning_abpem
from lightning_abpem import ABPEM
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.methods import Tent
from lightning_abpem.modules.patches import _ADAPTING
from tests.toy import CLASSES, MODALITIES, PAPER, Toy, batches, make_toy

PACKAGE = str(Path(lightning_abpem.__file__).parent)
Event = tuple[CodeType | None, int, int]
NOWHERE: Event = (None, 0, 0)


class Stateful(Toy):
    """Keeps state of several kinds, each moved once by a forward; one is a tensor made in inference mode."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(make_toy().state_dict())  # ahead of what that has not
        self.register_buffer("total", torch.zeros(()))
        self.calls = 0
        self.history: list[int] = []
        with torch.inference_mode():
            self.kept = {"video": torch.zeros(3)}
        self.norm = nn.BatchNorm1d(CLASSES)
        self.audio.embed.weight.requires_grad_(False)
        self.audio.embed.bias.grad = torch.ones_like(self.audio.embed.bias)
        self.fusion[0].attn.qkv.bias.requires_grad_(False)  # which adapts

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        self.total += 1
        self.calls += 1
        self.history.append(self.calls)
        with torch.inference_mode(self.kept["video"].is_inference()):
            self.kept["video"].add_(1)
        return self.norm(super().forward(audio, video))


class Injector:
    """Raises KeyboardInterrupt at one byte code of the package while its block lasts.

    A trace function that there is, as coverage's, waits until the block ends.

    Args:
        at: which one: a function, the number of its call, and that of the event in its frame. None raises nothing and
            collects all events.

    Attributes:
        events: all events of the block, if none was asked for.
        place: where the interrupt was raised.
    """

    def __init__(self, at: Event | None = None) -> None:
        self._at, self._calls = at, Counter[CodeType]()
        self.events: list[Event] = []
        self.place = ""

    def __enter__(self) -> Injector:
        self._other = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._other)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        """Follow the frames of the package; while an interrupt is due, only the one where it is."""
        if not frame.f_code.co_filename.startswith(PACKAGE) and not _is_own_manager(frame):
            return None
        code = frame.f_code
        call, number = self._calls[code], 0
        self._calls[code] += 1
        if self._at is not None and self._at[:2] != (code, call):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def trace(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            nonlocal number
            if self._at is None:
                self.events.append((code, call, number))
            elif self._at[2] == number:
                sys.settrace(None)
                self.place = f"{code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} {code.co_name}"
                raise KeyboardInterrupt
            number += 1
            return trace

        return trace(frame, event, arg)


def _is_own_manager(frame: FrameType) -> bool:
    """Return True for a frame of `contextlib` that the package, or the user's code here, calls."""
    caller = frame.f_back
    return (
        frame.f_code.co_filename == contextlib.__file__
        and caller is not None
        and caller.f_code.co_filename.startswith((PACKAGE, __file__))
    )


def marks(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and torch's modes that a run may not leave changed; state is not in it."""
    found: dict[str, Any] = {"adapting": sorted(_ADAPTING)}
    found["modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    for name, p in model.named_parameters():
        found[f"parameter {name}"] = (id(p), p.requires_grad, id(p.grad), p.detach().numpy().tobytes())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("_hooks") or key.startswith("_forward_"):
                found[f"{key} of {name}"] = list(value.items()) if isinstance(value, dict) else value
        found |= {f"attribute {key} of {name}": "is there" for key in vars(module)}
        found[f"modes of {name}"] = module.training
        found[f"buffers of {name}"] = [(key, id(value)) for key, value in module._buffers.items()]
    return found


def abpem(**options: Any) -> ABPEM:
    adam = partial(torch.optim.Adam, lr=1e-2)
    given: dict[str, Any] = {"modalities": MODALITIES, "optimizer": adam} | PAPER | options
    return ABPEM("fusion.*.attn", **given)


def tent(**options: Any) -> Tent:
    return Tent(optimizer=partial(torch.optim.Adam, lr=1e-2), **options)


WAYS: dict[str, Callable[[], TestTimeAdaptation]] = {
    "memory 1": partial(abpem),
    "memory 1, no replay": partial(abpem, replay=False),
    "memory 2": partial(abpem, memory_batches=2),
    "memory 2, no replay": partial(abpem, memory_batches=2, replay=False),
    "two steps, spans read off": partial(abpem, modalities="auto", steps=2),
    "several rates": partial(abpem, learning_rate=(0.01, 0.1)),
    "another method": partial(tent),
}


def stream(callback: TestTimeAdaptation, model: nn.Module, injector: Injector) -> list[Tensor]:
    """Open, two batches, close, as a user writes it."""
    outputs: list[Tensor] = []
    with injector, torch.set_grad_enabled(not callback.settings.replay):
        try:
            with callback.attach(model):
                for args in batches(2):
                    outputs.append(model(*args))
        except KeyboardInterrupt:
            pass
    return outputs


def left_behind(model: nn.Module, before: dict[str, Any]) -> list[str]:
    gc.collect()
    after = marks(model)
    keys = before.keys() | after.keys()
    return [f"{key}: {before.get(key)} became {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def try_one(way: str, at: Event, expected: list[Tensor]) -> tuple[Injector, list[str]]:
    """Return what an interrupt at one byte code leaves behind."""
    model = Stateful().eval()
    before, history = marks(model), model.history
    injector, callback = Injector(at), WAYS[way]()
    stream(callback, model, injector)
    wrong = left_behind(model, before)
    if model.history is not history:
        wrong.append("identity of state")
    kept = int(model.kept["video"][0])
    counts = {model.calls, int(model.total), len(history), kept}
    if len(counts) > 1 or max(counts) > 2:
        wrong.append(f"state {model.calls, int(model.total), history, kept}")
    if callback._attached is not None:
        wrong.append("the callback's adaptation")
    if not wrong:
        try:
            again = stream(callback, model, Injector(NOWHERE))
        except Exception as error:
            return injector, [f"second run: {error!r}"]
        if len(again) != 2 or not all(map(torch.equal, again, expected)):
            wrong.append("second run differs")
    return injector, wrong


def events_of(way: str) -> tuple[list[Event], list[Tensor]]:
    """Return all places of a run where an interrupt may come, and its outputs."""
    stream(WAYS[way](), Stateful().eval(), Injector(NOWHERE))  # fills caches
    injector = Injector()
    outputs = stream(WAYS[way](), Stateful().eval(), injector)
    return injector.events, outputs
