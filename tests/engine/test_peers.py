"""One of two processes raises, is killed or stands still: what becomes of the other."""

import io
import logging
import os
import re
import signal
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_abpem import ABPEM
from lightning_abpem.engine.peers import Peers
from tests.ranks import FORKS, WORLD, free_port, in_two_processes
from tests.toy import MODALITIES, Toy, batches, make_toy


class Failing(Toy):
    """Meets its fate in its second batch."""

    fate: str | None = None

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().test_step(batch, batch_idx)
        if self.fate == "raise" and batch_idx == 1:
            raise OSError("the camera is gone")
        if self.fate is not None and self.fate.startswith("SIG") and batch_idx == 1:
            os.kill(os.getpid(), getattr(signal, self.fate))


def own_stream(rank, count=3):
    return [(*batch, torch.zeros(4, dtype=torch.long)) for batch in batches(count, seed=7 + rank)]


def run_of(rank, fate, sync="local"):
    """The error, the averages, the counts and the warnings of a run of which process 1 meets its fate."""
    os.environ.update(TORCHELASTIC_RUN_ID="1", LOCAL_RANK=str(rank), GROUP_RANK="0", LOCAL_WORLD_SIZE=str(WORLD))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lightning_abpem.engine.peers").addHandler(handler)
    torch.manual_seed(0)
    model, callback = Failing(), ABPEM("fusion.*.attn", MODALITIES, sync=sync)
    model.fate = fate if rank == 1 else None
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=WORLD, callbacks=[callback], use_distributed_sampler=False, **quiet
    )
    error = None
    try:
        trainer.test(model, DataLoader(own_stream(rank), batch_size=None), verbose=False)
    except (OSError, RuntimeError) as caught:
        error = str(caught)
    weights = [p.detach().clone() for p in model.parameters()]
    return error, callback.averages, (callback.updates, callback.skipped), said, weights


def alone():
    model, callback = make_toy(), ABPEM("fusion.*.attn", MODALITIES)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=[callback], **quiet).test(
        model, DataLoader(own_stream(0), batch_size=None), verbose=False
    )
    return callback.averages


def check_survivor(result, why):
    error, averages, counts, said, weights = result
    assert (error, counts) == (None, (3, 0))
    for name, value in alone()[0].items():
        torch.testing.assert_close(averages[0][name], value, rtol=0, atol=1e-6)
    assert len(said) == 1
    assert "Process 1 did not come to the end of its dataloader, so the averages are without its samples." in said[0]
    assert re.search(why, said[0])
    assert all(map(torch.equal, weights, make_toy().parameters()))


def test_a_process_that_raises():
    """It does not wait for the others with its error, and they do not wait for it, though it lives on."""
    first, second = in_two_processes(run_of, "raise")
    check_survivor(first, "It stopped with an error")
    assert second[0] == "the camera is gone"
    assert second[2] == (2, 0)


def _work(pipe, port, rank, fate, seconds, sync):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=seconds))
    result = io.BytesIO()
    torch.save(run_of(rank, fate, sync), result)
    pipe.send_bytes(result.getvalue())  # by value: tensors in shared memory would go with their process


def survivors(fate, seconds, sync):
    """The result of process 0, whatever became of process 1."""
    port = free_port()
    ours, theirs = FORKS.Pipe(duplex=False)
    workers = [FORKS.Process(target=_work, args=(theirs, port, rank, fate, seconds, sync)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    try:
        assert ours.poll(400), "the process that is left waits for ever"
        return torch.load(io.BytesIO(ours.recv_bytes()), weights_only=False)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


GONE = [
    ("SIGKILL", 120, r"[Cc]onnection (closed|reset) by peer"),
    pytest.param("SIGSTOP", 60, "[Tt]imed out", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fate", "seconds", "why"), GONE)
def test_a_process_that_is_gone(fate, seconds, why):
    check_survivor(survivors(fate, seconds, "local"), why)


@pytest.mark.parametrize(("fate", "seconds", "why"), GONE)
def test_a_process_that_is_gone_from_common_steps(fate, seconds, why):
    """The other one ends by an error, with its weights back and what it came to."""
    error, averages, counts, _, weights = survivors(fate, seconds, "global")
    assert re.search(why, error)
    assert counts == (2, 0)
    assert averages[0]["updated"] == 1
    assert all(map(torch.equal, weights, make_toy().parameters()))


def meeting(rank):
    """Objects of any size by process; a second meeting without the one that said it fails; a third run is another."""
    peers = Peers()
    first = peers.exchange({"rank": rank, "data": torch.full((1000 * rank,), 1.0)})
    if rank == 1:
        peers.abandon()
        peers.abandon()  # a message that nobody takes
    second = peers.exchange("second") if rank == 0 else None
    lost, third = peers.lost, Peers().exchange(f"third of {rank}")
    return {r: len(own["data"]) for r, own in first.items()}, second, lost, third


def test_what_is_exchanged():
    first, second = in_two_processes(meeting)
    assert first[0] == second[0] == {0: 0, 1: 1000}
    assert first[1] == {0: "second"}
    assert list(first[2]) == [1]
    assert first[3] == second[3] == {0: "third of 0", 1: "third of 1"}
