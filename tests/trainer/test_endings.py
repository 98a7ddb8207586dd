"""Runs that end early, wherever that comes from: the error is raised, all is put back, the stream can go on."""

import os
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from tests.engine.interrupts import Stateful, abpem, left_behind, marks
from tests.reference import same_state
from tests.toy import batches, make_toy

COUNT, BAD = 4, 2  # batches, and the one at which something ends the run


class Stream(Dataset):
    """Batches, of which one cannot be had, or ends the process that reads it."""

    def __init__(self, fate=None):
        self.batches, self.fate = [(*batch, torch.zeros(4, dtype=torch.long)) for batch in batches(COUNT)], fate

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        if i == BAD and self.fate == "raises":
            raise OSError("the disk is gone")
        if i == BAD and self.fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.batches[i]


class Ends(Callback):
    """Another callback, one hook of which does something at the bad batch, or at once."""

    def __init__(self, hook, act):
        def call(*args, **kwargs):
            if "batch" not in hook or args[-1] == BAD or (len(args) > 4 and args[4] == BAD) or args[-2:] == (BAD, 0):
                act()

        setattr(self, hook, call)


class Model(Stateful):
    """Its own hooks and its step may do something at the bad batch."""

    acts: dict[str, Any] = {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().test_step(batch, batch_idx)
        if batch_idx == BAD and "step" in self.acts:
            self.acts["step"]()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if torch.equal(batch[0], Stream().batches[BAD][0]) and "transfer" in self.acts:
            self.acts["transfer"]()
        return batch


def lose():
    raise OSError("the disk is gone")


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def hook(name, act=lose):
    return {"callbacks": [Ends(name, act)]}


ENDS = {  # by name: what does it, how many batches were adapted to before
    "the loader": ({"fate": "raises"}, BAD),
    "a worker": ({"fate": "raises", "workers": 1}, BAD),
    "a worker that dies": ({"fate": "dies", "workers": 1}, BAD),
    "the transfer": ({"transfer": lose}, BAD),
    "the step": ({"step": lose}, BAD + 1),
    "an interrupt in the step": ({"step": interrupt}, BAD + 1),
    "SIGTERM in the step": ({"step": terminate}, BAD + 1),
    "SIGTERM that the program handles": ({"step": terminate}, BAD + 1),
    "setup": (hook("setup"), 0),
    "start": (hook("on_test_start"), 0),
    "epoch's start": (hook("on_test_epoch_start"), 0),
    "a batch's start": (hook("on_test_batch_start"), BAD),
    "a batch's end": (hook("on_test_batch_end"), BAD + 1),
    "a batch's end, interrupted": (hook("on_test_batch_end", interrupt), BAD + 1),
    "epoch's end": (hook("on_test_epoch_end"), COUNT),
    "end": (hook("on_test_end"), COUNT),
    "teardown": (hook("teardown"), COUNT),
}


def run(model, callback, data, callbacks=(), workers=0, checkpoint=None):
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    trainer: Any = Trainer(callbacks=[*callbacks, callback], **options)
    loop = trainer.test_loop
    try:
        loader = DataLoader(
            data, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        trainer.test(model, loader, verbose=False)
    finally:
        assert loop.inference_mode is True
        assert trainer.callbacks[: len(callbacks)] == list(callbacks)


@pytest.fixture
def _handler(name):
    """A program's handler of SIGTERM that raises SystemExit; without it Lightning's handler is alone."""

    def end(*_):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end if "handles" in name else signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_handler")
@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_run(name):
    acts, adapted = ENDS[name]
    model, callback = Model().eval(), abpem(memory_batches=2)
    model.acts = {key: act for key, act in acts.items() if key in ("step", "transfer")}
    state, before = {k: v.clone() for k, v in make_toy().state_dict().items()}, marks(model)
    with pytest.raises((OSError, RuntimeError, SystemExit, KeyboardInterrupt)) as caught:
        run(model, callback, Stream(acts.get("fate")), acts.get("callbacks", ()), acts.get("workers", 0))
    said = str(caught.value)
    assert (
        "disk is gone" in said
        or "DataLoader worker" in said
        or (name == "a worker that dies" and isinstance(caught.value, ConnectionError))
        or isinstance(caught.value, SystemExit | KeyboardInterrupt)
    )
    left = [line for line in left_behind(model, before) if not line.startswith(("modes", "attribute", "parameter"))]
    assert not left
    assert same_state({k: v for k, v in model.state_dict().items() if k in state}, state)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in Model().parameters()]
    assert callback._run is None
    if name == "a worker that dies":  # its signal comes at any time
        assert callback.updates + callback.skipped <= adapted
        return
    assert (callback.updates, callback.skipped) == (adapted, 0)
    if adapted:
        assert callback.averages[0]["updated"] == 1
    if 0 < adapted < COUNT:
        check_that_it_goes_on(callback, adapted)


def check_that_it_goes_on(callback, adapted):
    """The state is that of a run that was never ended: what is left of the stream is predicted the same."""
    whole, rest = Model().eval(), Model().eval()
    run(whole, abpem(memory_batches=2), Stream())
    again = abpem(memory_batches=2)
    again.load_state_dict(callback.state_dict())
    with torch.no_grad(), again.attach(rest):
        for i in range(adapted, COUNT):
            assert torch.equal(rest(*Stream().batches[i][:2]), whole.seen[i])
        assert again.updates == COUNT
