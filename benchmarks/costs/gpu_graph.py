"""A check of `benchmarks.costs.gpu`: how much a CUDA graph of a small model's step saves; launches dominate it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.costs.gpu_rows import Machine, NeedsGPUError, Steps, Workload
from benchmarks.costs.programs import Inputs, anatomy, loss_by_hand, only_moving

__all__ = ["try_graph"]


def try_graph(machine: Machine) -> dict[str, Any]:
    """Time a hand-written step of the digits' model, eager and as a CUDA graph.

    Returns:
        seconds of both, and a line with their ratio and the largest difference of the logits that both predict.

    Raises:
        NeedsGPUError: on a CPU, after the eager step has run.
        RuntimeError: what torch says if the step cannot be captured.
    """
    work = Workload("digits", 8, machine.device, "32-true", compiled=False, threads=torch.get_num_threads())
    inputs = work.batches()[0]
    count = 3 if machine.tiny else 50
    eager, expected = _graphed_step(work, inputs)
    seconds = _seconds(eager, machine.device, count)
    if machine.device != "cuda":
        raise NeedsGPUError
    step, logits = _graphed_step(work, inputs)  # a fresh model: it warms up as often as the eager one
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replayed = _seconds(graph.replay, machine.device, count)
    difference = (logits["now"] - expected["now"]).abs().max().item()
    figure = f"{1e3 * replayed:.3f} ms replayed, {1e3 * seconds:.3f} ms eager: a ratio of {replayed / seconds:.2f}"
    return {
        "seconds": replayed,
        "eager_seconds": seconds,
        "figure": f"{figure}; logits differ by at most {difference:.1e}",
    }


def _graphed_step(work: Workload, inputs: Inputs) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Return a capturable step, warmed up on a side stream, and the tensor that gets its prediction."""
    model = work.build()
    own = anatomy(model)
    moving = only_moving(model, own.block)
    on_gpu = work.accelerator == "cuda"
    optimizer = torch.optim.Adam(moving, lr=1e-4, fused=True, capturable=on_gpu)
    predicted: dict[str, Tensor] = {}
    step = partial(_step, own, moving, optimizer, inputs, predicted)
    if on_gpu:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
    return step, predicted


def _step(own: Any, moving: Any, optimizer: Any, inputs: Inputs, predicted: dict[str, Tensor]) -> None:
    tokens = own.encode(inputs)
    output, q, k = own.block.fused(tokens)
    loss = loss_by_hand(own, own.head(output), q, k)
    for parameter, gradient in zip(moving, torch.autograd.grad(loss, moving), strict=True):
        parameter.grad = gradient
    optimizer.step()
    with torch.no_grad():
        predicted["now"] = own.head(own.block.fused(tokens)[0])


def _seconds(step: Callable[[], None], device: str, count: int) -> float:
    """Return the median seconds of `count` steps."""
    steps = Steps(device, warmup=1, timed=count, most_seconds=60)  # as many eagerly as replayed
    for _ in steps:
        step()
    return steps.figures()["seconds"]
