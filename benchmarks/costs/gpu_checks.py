"""Checks of `benchmarks.costs.gpu`: what has to hold on a device whatever it costs.

Each gets the machine and returns its figure as words. It raises `CheckError` if something does not hold, and
`NeedsGPUError` where a CPU cannot tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from benchmarks.costs.gpu_rows import Machine
from benchmarks.costs.gpu_stress import (
    memory_does_not_grow,
    out_of_memory,
    process_group,
    resume_on_cpu,
    several_streams,
)
from benchmarks.costs.gpu_toy import (
    CheckError,
    Stream,
    abpem,
    distance,
    is_same,
    predictions,
    require,
    state_of,
    stream_of,
)
from lightning_abpem.demo.trainer import silent_trainer
from lightning_abpem.models import CAVMAE
from tests.golden_runs import Golden
from tests.toy import WIDTH, Toy, loader, make_toy

__all__ = ["CHECKS", "CheckError"]


def golden_runs(machine: Machine) -> str:
    """Compare predictions and weights with the authors' program's, in float64."""
    largest = 0.0
    for name, fused in (("abpem_nocache", True), ("abpem_cache2", False)):
        golden = Golden(name)
        model = golden.model().to(machine.device)
        optimizer = partial(torch.optim.Adam, lr=golden.config["lr"], fused=fused)
        with torch.no_grad(), golden.abpem(optimizer=optimizer).attach(model):
            for step in range(len(golden)):
                inputs, _ = golden[step]
                logits = model(*(x.to(machine.device) for x in inputs))
                largest = max(largest, distance(logits, golden.expected(f"after_{step}")))
            for own, recorded in (("weight", "fusion_qkv_weight"), ("bias", "fusion_qkv_bias")):
                moved = model.get_parameter(f"blocks_u.0.attn.qkv.{own}")
                largest = max(largest, distance(moved, golden.expected(recorded)))
    return require(largest <= 1e-10, f"largest difference {largest:.1e}, bound 1e-10")


BANDS: dict[str, tuple[str, float, float]] = {
    "float32": ("32-true", 1e-5, 0.999999),
    "float32, TF32": ("32-true", 5e-3, 0.999),
    "bf16-mixed": ("bf16-mixed", 2e-2, 0.999),
    "16-mixed": ("16-mixed", 3e-3, 0.9999),
    "bf16-true": ("bf16-true", 2e-2, 0.99),
    "16-true": ("16-true", 3e-3, 0.999),
}
"""How far logits may be from those in float64, and the least cosine of the ways that the weights have gone."""


def parity(machine: Machine, name: str) -> str:
    """Compare a Trainer's run in one precision with one in float64."""
    precision, bound, least = BANDS[name]
    before = torch.get_float32_matmul_precision()
    expected, way = _run_in(machine, precision="64-true")
    torch.set_float32_matmul_precision("high" if name.endswith("TF32") else "highest")
    try:
        options: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":
            scaler = torch.amp.GradScaler(machine.device, init_scale=1024.0)
            options = {"plugins": MixedPrecision("16-mixed", machine.device, scaler)}
        logits, own_way = _run_in(machine, **options)
    finally:
        torch.set_float32_matmul_precision(before)
    difference = max(distance(a, b) for a, b in zip(logits, expected, strict=True))
    cosine = F.cosine_similarity(own_way, way, dim=0).item()
    figure = f"logits differ by {difference:.1e} (bound {bound:.0e}), cosine {cosine:.8f} (bound {least})"
    return require(difference <= bound and cosine >= least, figure)


def _run_in(machine: Machine, **options: Any) -> tuple[list[Tensor], Tensor]:
    """Return the logits of a Trainer's run, and how far the weights have moved."""
    model = make_toy()
    callback = abpem(memory_batches=2, restore=False)
    source = model.get_parameter("fusion.0.attn.qkv.weight").detach().double().clone()
    silent_trainer(accelerator=machine.device, devices=1, callbacks=[callback], **options).test(
        model, loader(12), verbose=False
    )
    require((callback.updates, callback.skipped) == (12, 0), f"{callback.updates} steps, {callback.skipped} skipped")
    weight = model.get_parameter("fusion.0.attn.qkv.weight").detach().cpu().double()
    return model.seen, (weight - source).flatten()


def replay_bit_for_bit(machine: Machine) -> str:
    """Compare predictions with replay on and off, by algorithms that give the same bits each time."""
    torch.manual_seed(0)
    source = CAVMAE(20, 64, 2, 2).eval().to(machine.device)
    generator = torch.Generator().manual_seed(1)
    stream: Stream = [
        (torch.randn(2, 1024, 128, generator=generator), torch.randn(2, 3, 224, 224, generator=generator))
        for _ in range(3 if machine.tiny else 8)
    ]
    with _same_bits():
        for memory in (1, 3):
            options = {"fusion": "blocks_u.*.attn", "modalities": CAVMAE.modalities, "memory_batches": memory}
            runs = [
                predictions(deepcopy(source), stream, machine.device, replay=replay, **options)
                for replay in (True, True, False)
            ]
            again, off = (max(map(distance, runs[0], run)) for run in runs[1:])
            require(again == 0, f"two runs alike differ by {again:.1e}, so that nothing can be said")
            require(off == 0, f"with memory {memory} predictions differ by {off:.1e}")
    return f"no bit differs in {len(stream)} batches, with memory 1 and 3"


@contextmanager
def _same_bits() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without such an algorithm
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def narrow_weights_move(machine: Machine) -> str:
    """Move bfloat16 weights by steps too small for bfloat16, and restore them after the run."""
    model = make_toy().to(machine.device, torch.bfloat16)
    source = state_of(model)
    with torch.no_grad(), abpem().attach(model):
        for batch in stream_of(12, machine.device, torch.bfloat16):
            model(*batch)
        name = "fusion.0.attn.qkv.weight"
        moved = (model.get_parameter(name) - source[name]).ne(0).float().mean().item()
    require(is_same(source, model), "the source weights are not back")
    return require(moved > 0.9, f"{moved:.0%} of the weights moved in 12 steps, at least 90 % expected")


def loss_scale(machine: Machine) -> str:
    """Take steps under float16 autocast whose gradients are 0 in float16 unless the loss is scaled."""
    model = make_toy().to(machine.device)
    with torch.no_grad():
        model.get_parameter("head.1.weight").mul_(1e-5)
        model.get_parameter("head.1.bias").mul_(1e-5)
    weight = model.get_parameter("fusion.0.attn.qkv.weight")
    before = weight.clone()
    callback = abpem(attention_weight=0.0, optimizer=partial(torch.optim.SGD, lr=1e3))
    with torch.no_grad(), torch.autocast(machine.device, torch.float16), callback.attach(model):
        for batch in stream_of(4, machine.device):
            model(*batch)
        moved = (weight - before).abs().max().item()
    figure = f"weights moved by {moved:.1e} in {callback.updates} steps, {callback.skipped} skipped"
    return require(callback.updates > 0 and 0 < moved < float("inf"), figure)


class Recurrent(Toy):
    """An LSTM behind the fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        tokens = self.fusion(torch.cat((self.audio(audio), self.video(video)), dim=1))
        return self.head(self.lstm(tokens)[0][:, -1])


def _recurrent() -> Recurrent:
    torch.manual_seed(0)
    return Recurrent().eval()


def recurrent_behind_fusion(machine: Machine) -> str:
    """Adapt with an LSTM behind the fusion, in eval mode: results are as on a CPU, or an error names the LSTM."""
    expected = predictions(_recurrent(), stream_of(3), "cpu")
    model = _recurrent().to(machine.device)
    source = state_of(model)
    try:
        logits = predictions(model, stream_of(3), machine.device)
    except (ValueError, RuntimeError) as error:
        require(is_same(source, model), "the source weights are not back")
        return require("lstm" in str(error).lower(), f"{type(error).__name__}: {_first_line(error)}")
    require(is_same(source, model), "the source weights are not back")
    difference = max(map(distance, logits, expected))
    return require(difference <= 1e-4, f"works; logits differ from a CPU's by {difference:.1e}, bound 1e-4")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


CHECKS: dict[str, Callable[[Machine], str]] = {
    "golden runs in float64": golden_runs,
    **{f"parity, {name}": partial(parity, name=name) for name in BANDS},
    "replay on and off": replay_bit_for_bit,
    "narrow weights move": narrow_weights_move,
    "loss scale under float16": loss_scale,
    "an LSTM behind the fusion": recurrent_behind_fusion,
    "several streams": several_streams,
    "out of memory": out_of_memory,
    "a process group of one": process_group,
    "saved on the device, resumed on a CPU": resume_on_cpu,
    "memory does not grow": memory_does_not_grow,
}
"""By name, in the order in which they run."""
