"""Worker processes: they leave signals to their parent, and do not outlive it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread, current_thread, main_thread
from typing import Any

__all__ = ["Workers", "start_worker"]


class Workers(ProcessPoolExecutor):
    """Processes, spawned when they are needed, that do not get Ctrl-C, which reaches all processes of a terminal.

    Args:
        count: how many at most.
        start: called in each process before its first work.
        args: its arguments.
    """

    def __init__(self, count: int, start: Callable[..., None], *args: Any) -> None:
        super().__init__(count, get_context("spawn"), _start, (start, *args))

    def submit(self, work: Callable[..., object], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with _ctrl_c_held_back():
            return super().submit(work, *args, **kwargs)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends; a process that starts in it goes on without.

    Such a process inherits what is blocked. The parent gets the signal all the same if it has other threads. A process
    of which it had started one half would not know what to do.
    """
    if current_thread() is not main_thread() or not hasattr(signal, "pthread_sigmask"):  # Windows has none
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def start_worker() -> None:
    """Make the starting process ignore Ctrl-C, which the parent handles, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _start(start: Callable[..., None], *args: Any) -> None:
    start_worker()
    start(*args)


def _end_with_parent() -> None:
    """Wait for the parent's end, and end; a parent that is killed cannot tell workers, which would wait forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
