"""Flags copied from the GPU without blocking, read at the next batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DeviceFlags"]


class DeviceFlags:
    """Bool scalars of one device, read on the host later.

    On CUDA they are copied without waiting. Reading them waits only until the copy is made, not for what came after.
    """

    def __init__(self, *values: Tensor) -> None:
        flags = torch.stack(values)
        self._copied = None
        if flags.is_cuda:
            self._flags = flags.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flags = flags.cpu()

    def read(self) -> list[bool]:
        """Return the flags' values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._flags.tolist()
