"""A clock for work that a device may do later: on CUDA by events, elsewhere by the host's time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Clock"]

_PENDING = 64  # blocks whose time has not been read


class Clock:
    """Sums the time of blocks. On CUDA that is the device's, and nothing waits for it before `read`.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the block."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((start, self._now()))
            if len(self._spans) >= _PENDING:
                self._add(_PENDING // 2)  # so long ago that the device has done with them

    def read(self) -> float:
        """Return the seconds of all blocks that have ended; waits for the device."""
        self._add(len(self._spans))
        return self._seconds

    def _add(self, count: int) -> None:
        """Add the first blocks to the sum, and forget them."""
        spans, self._spans = self._spans[:count], self._spans[count:]
        for start, end in spans:
            if self._on_device:
                end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000 if self._on_device else end - start

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
