"""Checks of `benchmarks.costs.gpu`: streams, memory that ends or grows, process groups, another device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.costs.gpu_rows import Machine, NeedsGPUError
from benchmarks.costs.gpu_toy import abpem, distance, is_same, predictions, require, state_of, stream_of
from benchmarks.costs.programs import FusionAlone
from lightning_abpem import ABPEM
from lightning_abpem.demo.trainer import silent_trainer
from tests.toy import loader, make_toy

__all__ = ["memory_does_not_grow", "out_of_memory", "process_group", "resume_on_cpu", "several_streams"]


def several_streams(machine: Machine) -> str:
    """Predict on side streams, in float64: all batches on one, and every other batch on another."""
    if machine.device != "cuda":
        raise NeedsGPUError
    largest = 0.0
    stream = stream_of(8, machine.device, torch.float64)
    expected = predictions(make_toy().double(), stream, machine.device, memory_batches=3)
    sides = torch.cuda.Stream(), torch.cuda.Stream()
    for own in ((sides[0], sides[0]), (torch.cuda.default_stream(), sides[0]), sides):
        adapted = make_toy().double().to(machine.device)
        logits = []
        torch.cuda.synchronize()
        with torch.no_grad(), abpem(memory_batches=3).attach(adapted):
            for i, batch in enumerate(stream):
                own[i % 2].wait_stream(own[(i + 1) % 2])  # as torch asks of whoever changes streams
                with torch.cuda.stream(own[i % 2]):
                    logits.append(adapted(*batch))
            torch.cuda.synchronize()
        largest = max(largest, *map(distance, logits, expected))
    return require(largest <= 1e-10, f"largest difference {largest:.1e}, bound 1e-10")


class Tight(FusionAlone):
    """A model whose adapting pass raises torch's out-of-memory error, for a dry run on a CPU."""

    fails = False

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if self.fails and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("simulated")
        return super().forward(first, second)


def out_of_memory(machine: Machine) -> str:
    """Run out of memory in the adapting pass: the batch is predicted or refused, and the model stays intact."""
    torch.manual_seed(0)
    tokens, width = (64, 16) if machine.device == "cpu" else (8192, 256)
    model = Tight(tokens, width).eval().to(machine.device)
    inputs = [torch.randn(4, tokens // 2, width, device=machine.device) for _ in range(2)]
    source = state_of(model)
    with torch.no_grad():
        plain = model(*inputs)
        run = partial(_adapted_twice, model, inputs)
        least, most = _most_memory(machine.device, partial(model, *inputs)), _most_memory(machine.device, run)
        with _memory_of(model, machine.device, least + (most - least) // 4):
            try:
                require(run() < 2, "memory did not end, so that nothing can be said")
                outcome = "the batch was predicted all the same"
            except torch.OutOfMemoryError:
                outcome = "the run ended with torch's OutOfMemoryError"
        require(is_same(source, model), "the source weights are not back")
        require(torch.equal(model(*inputs), plain), "the model predicts something else")
        updates = run()
    return require(updates == 2, f"{outcome}; weights back, {updates} of 2 steps once there is memory again")


def _adapted_twice(model: nn.Module, inputs: list[Tensor]) -> int:
    half = {"first": inputs[0].shape[1], "second": inputs[1].shape[1]}
    callback = ABPEM("block.attn", half, k=5, memory_batches=2, memory_at="block")
    with callback.attach(model):
        model(*inputs)
        model(*inputs)
    return callback.updates


def _most_memory(device: str, run: Callable[[], Any]) -> int:
    """Return a function's peak GPU memory in bytes; 0 on a CPU."""
    if device != "cuda":
        run()
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_reserved()


@contextmanager
def _memory_of(model: Tight, device: str, size: int) -> Iterator[None]:
    """Cap the GPU's memory inside the `with` block; on a CPU the adapting pass raises the error instead."""
    model.fails = device != "cuda"
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        model.fails = False
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


def process_group(machine: Machine) -> str:
    """Adapt inside a group of one process, NCCL's or gloo's, with `attach` and in a Trainer with DDP."""
    require(not dist.is_initialized(), "a process group is there already")
    backend = "nccl" if machine.device == "cuda" else "gloo"
    expected = predictions(make_toy(), stream_of(4), machine.device)
    with TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            one = torch.ones(1, device=machine.device)
            dist.all_reduce(one)
            attached = predictions(make_toy(), stream_of(4), machine.device)
            model = make_toy()
            runner = silent_trainer(accelerator=machine.device, devices=1, strategy="ddp", callbacks=[abpem()])
            runner.test(model, loader(4), verbose=False)
        finally:
            dist.destroy_process_group()
    difference = max(*map(distance, attached, expected), *map(distance, model.seen, expected))
    return require(one.item() == 1 and difference <= 1e-6, f"{backend}: logits differ by {difference:.1e}, bound 1e-6")


def resume_on_cpu(machine: Machine) -> str:
    """Save a stream on the device, and go on with it on the CPU, in float64."""
    stream = stream_of(8, "cpu", torch.float64)
    whole = predictions(make_toy().double(), stream, machine.device, memory_batches=3)
    first, second = abpem(memory_batches=3), abpem(memory_batches=3)
    model = make_toy().double().to(machine.device)
    with TemporaryDirectory() as folder:
        with torch.no_grad(), first.attach(model):
            for batch in stream[:4]:
                model(*(x.to(machine.device) for x in batch))
        second.load(first.save(Path(folder) / "state.pt"))
        model = make_toy().double()
        with torch.no_grad(), second.attach(model):
            rest = [model(*batch) for batch in stream[4:]]
    require(second.updates == 8, f"{second.updates} steps instead of 8")
    difference = max(map(distance, rest, whole[4:]))
    return require(difference <= 1e-9, f"logits differ by {difference:.1e}, bound 1e-9")


def memory_does_not_grow(machine: Machine) -> str:
    """Compare device memory and Python's objects after many updates with those after a few."""
    updates = 100 if machine.tiny else 5000
    model, sizes = make_toy().to(machine.device), []
    stream = stream_of(4, machine.device)
    with torch.no_grad(), abpem(memory_batches=2).attach(model):
        for i in range(updates):
            model(*stream[i % 4])
            if i + 1 in (updates // 5, updates):
                gc.collect()
                allocated = torch.cuda.memory_allocated() if machine.device == "cuda" else _tensors()
                sizes.append((allocated, len(gc.get_objects())))
    memory, objects = (end - begin for begin, end in zip(*sizes, strict=True))
    figure = f"{memory} bytes and {objects} objects more after {updates} updates than after {updates // 5}"
    return require(memory <= 2**16 and objects <= 500, figure)


def _tensors() -> int:
    """Return the bytes of all tensors that Python's garbage collector knows."""
    return sum(x.nbytes for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
