"""Figures that a report gathers: nothing waits, nothing changes."""

import torch

from lightning_abpem.engine.guard import Event
from lightning_abpem.engine.recording import Recorder

CPU = torch.device("cpu")


def test_many_steps_are_copied_at_once(monkeypatch):
    copies = []
    plain = torch.Tensor.tolist

    def copied(x):
        copies.append(len(x))
        return plain(x)

    monkeypatch.setattr(torch.Tensor, "tolist", copied)
    recorder = Recorder(CPU)
    for i in range(300):
        logits = torch.eye(4)[[i % 4, 3]]
        recorder.add({"loss": torch.tensor(float(i)), "updated": torch.tensor(1.0)}, 2, logits, [], 0)
    result = recorder.result()
    assert copies == [512, 512, 88, 88]
    assert result["steps"]["figures"]["loss"] == [float(i) for i in range(300)]
    assert result["counts"] == {"steps": 300, "resets": 0}
    assert result["classes"]["names"] == [0, 1, 2, 3]
    assert sum(map(sum, result["classes"]["counts"])) == 600


def test_marks_stand_at_the_step_that_they_came_before():
    recorder, event = Recorder(CPU), Event(3, 2, "rollback", "harm")
    recorder.known_events = 1  # of a loaded state
    record, logits = {"loss": torch.tensor(0.0)}, torch.zeros(2, 3)
    recorder.add(record, 2, logits, [event], 0)
    recorder.add(record, 2, logits, [event], 0)  # another step for the same batch
    recorder.dataloader = 1
    recorder.add(record, 2, torch.zeros(2, 3), [event, event], 1)
    result = recorder.result()
    assert result["events"] == [{"step": 2, "action": "rollback", "cause": "harm"}]
    assert result["resets"] == [2]
    assert [(own["index"], own["first"], own["samples"]) for own in result["dataloaders"]] == [(0, 0, 4), (1, 2, 2)]
    assert sum(map(sum, result["classes"]["counts"])) == 4


def test_a_batch_that_cannot_be_copied_is_told(caplog):
    recorder = Recorder(CPU)
    recorder.keep(((x for x in "ab"),), {})
    recorder.keep((torch.zeros(2),), {})
    recorder.see_blocks(None)
    assert recorder.result()["blocks"] is None
    assert "cannot be copied" in recorder.result()["no_blocks"]
    assert caplog.text.count("no attention blocks") == 1


def test_the_clock_adds_what_ended():
    recorder = Recorder(CPU)
    with recorder.clock.running():
        assert recorder.clock.read() == 0
    first = recorder.clock.read()
    assert first > 0
    with recorder.clock.running():
        pass
    assert recorder.clock.read() > first
