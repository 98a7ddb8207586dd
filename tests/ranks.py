"""Running a function in two real processes that share a gloo process group."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns in each, by rank; an exception is returned as such."""
    context = get_context("spawn")
    port, queue = free_port(), context.Queue()
    workers = [context.Process(target=_work, args=(queue, port, rank, function, args)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    results = dict(torch.load(io.BytesIO(queue.get(timeout=240)), weights_only=False) for _ in workers)
    for worker in workers:
        worker.join()
    return [results[rank] for rank in range(WORLD)]


def _work(queue: Any, port: int, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
        queue.put(_packed(rank, function(rank, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # what a test looks at
        queue.put(_packed(rank, error))


def _packed(*result: Any) -> bytes:
    """By value: tensors in shared memory would go with their process."""
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return buffer.getvalue()
