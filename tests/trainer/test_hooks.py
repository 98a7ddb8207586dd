"""The modes that the user's own hooks see while a model adapts, hook by hook: those that they see without it."""

import functools
import inspect
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.engine.attached import abpem, fingerprint
from tests.reference import same_state
from tests.toy import Toy, loader
from tests.trainer.test_callback import trainer

STAGES = ("test", "predict", "validate")
ASKED = ("on_test_model_train", "on_predict_model_train", "on_validation_model_train")  # by default these do the work
STATE = ("on_save_checkpoint", "on_load_checkpoint")


def hooks_of(kind):
    """The names of a class's hooks that a run without checkpoints can call."""
    names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction)]
    return [name for name in names if name.startswith(("on_", "setup", "teardown")) and name not in ASKED + STATE]


class Log:
    """Record of the modes that each hook saw, in order; one of the hooks may raise."""

    def __init__(self, fails_in=None):
        self.seen, self.fails_in = [], fails_in
        self.model: Any = None

    def __call__(self, name):
        modes = [(where, module.training) for where, module in self.model.named_modules()]
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        self.seen.append((name, torch.is_grad_enabled(), autocast, modes))
        if name == self.fails_in:
            raise ValueError(name)


def logging_class(kind, own_name) -> Any:
    """A subclass whose hooks first tell `self.told`."""

    def told(name):
        original = getattr(kind, name)

        @functools.wraps(original)
        def hook(self, *args, **kwargs):
            self.told(f"{own_name}.{name}")
            return original(self, *args, **kwargs)

        return hook

    return type(f"Logging{own_name}", (kind,), {name: told(name) for name in hooks_of(kind)})


LoggingModule: Any = logging_class(Toy, "module")
LoggingCallback: Any = logging_class(pl.Callback, "callback")


class Model(LoggingModule):
    """In part in training mode, with dropout, before the run."""

    def __init__(self, told):
        torch.manual_seed(0)
        super().__init__()
        self.head.insert(0, nn.Dropout(0.5))
        self.told = told
        self.train()
        self.video.eval()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.told("module.step before")
        super().test_step(batch, batch_idx, dataloader_idx)
        self.told("module.step after")

    validation_step = test_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.told("module.step before")
        return super().predict_step(batch, batch_idx, dataloader_idx)


def run(stage, adapts, fails_in=None, **options):
    """The log of a run, with and without adaptation, and its model and Trainer."""
    told = Log(fails_in)
    model = told.model = Model(told)
    other = LoggingCallback()
    other.told = told
    callbacks = [other, abpem(stages=STAGES)] if adapts else [other]
    runner = trainer(*callbacks, **options)
    arguments = {} if stage == "predict" else {"verbose": False}
    raises = nullcontext() if fails_in is None else pytest.raises(ValueError, match=fails_in)
    with raises:
        getattr(runner, stage)(model, loader(2), **arguments)
    told.fails_in = None
    told("outside")
    return told.seen, model, runner


def first_difference(seen, expected):
    assert [name for name, *_ in seen] == [name for name, *_ in expected]
    return next(((own, other) for own, other in zip(seen, expected, strict=True) if own != other), None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_hooks_see_the_modes_of_a_run_without_it(stage, precision):
    seen, *_ = run(stage, True, precision=precision)
    expected, *_ = run(stage, False, precision=precision)
    assert len(seen) > 20
    assert first_difference(seen, expected) is None


@functools.cache
def hooks_called(stage):
    names = dict.fromkeys(name for name, *_ in run(stage, False)[0])
    return [name for name in names if name != "outside"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_in_any_hook_leaves_everything_as_lightning_does(stage):
    for name in hooks_called(stage):
        seen, model, runner = run(stage, True, fails_in=name)
        expected, twin, _ = run(stage, False, fails_in=name)
        assert first_difference(seen, expected) is None, name
        own, other = fingerprint(model), fingerprint(twin)
        for key in ("requires_grad", "training", "hooks"):
            assert own[key] == other[key], (name, key)
        assert same_state(model.state_dict(), twin.state_dict())
        assert getattr(runner, f"{stage}_loop").inference_mode is True
        assert [type(callback).__name__ for callback in runner.callbacks][:2] == ["Loggingcallback", "ABPEM"]


def test_lightning_has_the_switch_that_a_run_sets():
    """`inference_mode` of a loop is no documented name: should it go, each batch would be copied instead."""
    runner = trainer()
    for stage in STAGES:
        assert hasattr(getattr(runner, f"{stage}_loop"), "inference_mode")
