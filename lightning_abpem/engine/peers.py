"""Messages between processes that adapt on streams of their own: none waits for a process that is gone."""

from __future__ import annotations

import logging
import pickle
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_abpem.engine.ranks import process

__all__ = ["Peers"]

log = logging.getLogger(__name__)
_NOTHING = -1  # the length of a message that does not come
_RUNS = count()  # the same in all processes: a message that nobody took is no other run's
_LEFT: list[Any] = []  # messages of runs that failed, which the others take when they come to their end


class Peers:
    """The other processes of a run in which each adapts on its own stream: they meet at the end of a dataloader.

    What one has to say goes to each of the others by itself. So one that is gone is known by its number, and the rest
    do without it. One that fails calls `abandon`. One that is killed is lost with its connection, one that stands still
    after the process group's timeout.

    Attributes:
        size: the number of processes.
        lost: by process, how it was lost.
    """

    def __init__(self) -> None:
        self._rank, self.size = process()
        self.lost: dict[int, str] = {}
        # Other backends block the device until the message is taken, or send tensors of their own device alone.
        self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._tag = next(_RUNS)

    def exchange(self, own: object) -> dict[int, Any]:
        """Return what each process gives to its call of this, by process, without those that are lost."""
        data = torch.frombuffer(bytearray(pickle.dumps(own)), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        messages = {rank: [work for x in (size, data) for work in self._send(x, rank)] for rank in self._others}
        everybody = {self._rank: own}
        for rank in self._others:
            try:
                received = self._receive(rank)
                for message in messages[rank]:
                    message.wait()
                everybody[rank] = received
            except RuntimeError as error:
                self._lose(rank, str(error))
        return dict(sorted(everybody.items()))

    def abandon(self) -> None:
        """Tell the others that this process fails; it does not wait for them."""
        for rank in self._others:
            message = torch.tensor([_NOTHING])
            _LEFT.append((message, self._send(message, rank)))

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self._rank and rank not in self.lost]

    def _send(self, x: Tensor, rank: int) -> list[Any]:
        try:
            return [dist.isend(x, rank, self._group, self._tag)]
        except RuntimeError as error:
            self._lose(rank, str(error))
            return []

    def _receive(self, rank: int) -> Any:
        size = torch.empty(1, dtype=torch.long)
        dist.recv(size, rank, self._group, self._tag)
        if size.item() == _NOTHING:
            raise RuntimeError("It stopped with an error, which it has reported.")
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, rank, self._group, self._tag)
        return pickle.loads(data.numpy().tobytes())

    def _lose(self, rank: int, why: str) -> None:
        if rank not in self.lost:
            self.lost[rank] = why
            log.warning(
                "Process %d did not come to the end of its dataloader, so the averages are without its samples. %s",
                *(rank, why),
            )
