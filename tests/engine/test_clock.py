"""Time on a device is read by events, after the work: with stand-ins for those of CUDA."""

from typing import Any

import torch

from lightning_abpem.engine.clock import Clock


class Event:
    """Stands for an event of CUDA; its time is the number of events before it, in half seconds."""

    made: list[Any] = []

    def __init__(self, enable_timing):
        assert enable_timing
        self.waited = False

    def record(self):
        self.made.append(self)

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited
        return 500 * (self.made.index(end) - self.made.index(self))


def test_blocks_on_cuda_are_timed_by_events(monkeypatch):
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = Clock(torch.device("cuda"))
    for _ in range(3):
        with clock.running():
            pass
    assert not any(event.waited for event in Event.made)
    assert clock.read() == 1.5
    with clock.running():
        pass
    assert clock.read() == 2.0


def test_a_long_run_keeps_few_blocks_and_loses_no_time(monkeypatch):
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr("torch.cuda.Event", Event)
    clock = Clock(torch.device("cuda"))
    for _ in range(1000):
        with clock.running():
            pass
    assert not any(event.waited for event in Event.made[-64:])  # of late nothing was waited for
    assert Event.made[1].waited
    assert clock.read() == 500
