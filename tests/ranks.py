"""Running a function in two real processes that share a gloo process group.

The two are kept for the next function. They are forked from a process that has imported torch and Lightning, which
takes longer than most of what they are asked.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["lightning.pytorch", "lightning_abpem.methods", "tests.toy", __name__])
TIMEOUT = 240
"""Seconds in which both must have answered."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(rank, *args)` returns in each, by rank; an exception is returned as such.

    Raises:
        RuntimeError: if one of them dies or does not answer.
    """
    pool = _kept.pop() if _kept else Pool()
    try:
        results = pool.run(function, args, TIMEOUT)
    except BaseException:
        pool.close()
        raise
    if any(isinstance(result, Exception) for result in results):
        pool.end()  # who knows what they are like
    else:
        _kept.append(pool)
    return results


class Pool:
    """Two processes that wait for functions. They end with this one."""

    def __init__(self) -> None:
        pipes = [FORKS.Pipe() for _ in range(WORLD)]
        self._folder = TemporaryDirectory()
        self._traces = [Path(self._folder.name) / f"{rank}.txt" for rank in range(WORLD)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            FORKS.Process(target=_serve, args=(theirs, rank, self._traces[rank]), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # or else its death would not be seen

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        end = time.monotonic() + timeout
        with TemporaryDirectory() as folder:  # where they meet: a port that is free may not be so for long
            for own in self._ends:
                own.send((function, args, Path(folder) / "store"))
            return [self._answer(rank, end) for rank in range(WORLD)]

    def _answer(self, rank: int, end: float) -> Any:
        if not self._ends[rank].poll(max(0, end - time.monotonic())):
            for process in self._processes:
                assert process.pid is not None  # it is started
                os.kill(process.pid, signal.SIGABRT)  # at which they write where they are
                process.join()
            traces = "".join(path.read_text() for path in self._traces)
            raise RuntimeError(f"Expected process {rank} to answer, but it hangs. The lines of both:\n{traces}")
        try:
            content = self._ends[rank].recv_bytes()
        except EOFError:
            self._processes[rank].join()
            code, trace = self._processes[rank].exitcode, self._traces[rank].read_text()
            raise RuntimeError(
                f"Expected process {rank} to answer, but it died with exit code {code}. {trace}"
            ) from None
        return torch.load(io.BytesIO(content), weights_only=False)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def end(self) -> None:
        """Let both end by themselves: coverage writes then what it has seen."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
        self.close()


_kept: list[Pool] = []


@atexit.register  # after multiprocessing, so before it terminates them
def _end_all() -> None:
    while _kept:
        _kept.pop().end()


def _serve(end: Connection, rank: int, trace: Path) -> None:
    """Answer one function after the other, each in a process group of its own, until the parent is gone."""
    with trace.open("w") as file:
        faulthandler.enable(file)
        _answer_all(end, rank)
    atexit._run_exitfuncs()  # which a forked process leaves out: coverage writes what it has seen


def _answer_all(end: Connection, rank: int) -> None:
    environment = dict(os.environ)
    while True:
        try:
            function, args, store = end.recv()
        except EOFError:
            return
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE=str(WORLD))
        torch.manual_seed(0)
        result = _result(function, args, store, rank)
        os.environ.clear()
        os.environ.update(environment)
        end.send_bytes(_packed(result))


def _result(function: Callable[..., Any], args: tuple[Any, ...], store: Path, rank: int) -> Any:
    limit = timedelta(seconds=60)
    try:
        dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=WORLD, timeout=limit)
        try:
            result = function(rank, *args)
            dist.barrier()
        finally:
            dist.destroy_process_group()
    except Exception as error:  # what a test looks at
        return error
    return result


def _packed(result: Any) -> bytes:
    """By value: tensors in shared memory would go with their process."""
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return buffer.getvalue()
