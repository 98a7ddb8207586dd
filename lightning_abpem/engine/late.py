"""Answers that are on their way from the device, which nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LateBools", "answers_late"]


class LateBools:
    """Bool scalars of one device, read on the host later.

    On CUDA they are copied without waiting, and to read them waits only until the copy is made, not for what came
    after.
    """

    def __init__(self, *values: Tensor) -> None:
        flags = torch.stack(values)
        self._arrived = None
        if flags.is_cuda:
            self._flags = flags.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._flags = flags.cpu()

    def read(self) -> list[bool]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._flags.tolist()


def answers_late(x: Tensor) -> bool:
    """Whether to look at a value means to wait for its device."""
    return x.device.type != "cpu"
