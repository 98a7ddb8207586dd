"""An interrupt at any byte code leaves nothing behind, and a run that goes on goes on as it should.

200 of them, spread over all byte codes; `make fuzz-interrupts` tries 5,000 others.
"""

import gc
import logging
import os
import sys
from functools import partial

import pytest
import torch

from lightning_abpem.modules.patches import Changes
from tests.engine.interrupts import (
    NOWHERE,
    PACKAGE,
    WAYS,
    Injector,
    Stateful,
    abpem,
    events_of,
    left_behind,
    marks,
    try_one,
)
from tests.toy import batches

COUNT = int(os.environ.get("FUZZ_INTERRUPTS", "200"))
SGD = partial(torch.optim.SGD, lr=0.1)
SEVERAL = {"learning_rate": (0.1, 0.01)}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: None)  # an interrupt in the closing of a lost list
    logging.disable(logging.INFO)
    gc.collect()
    gc.freeze()  # what there is by now need not be looked through each time
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `with` block ended")
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_leaves_nothing_behind(way):
    events, expected = events_of(way)
    count = -(-COUNT // len(WAYS))
    injected, left = 0, {}
    for i in range(count):
        for at in events[(2 * i + 1) * len(events) // (2 * count) :: 101]:
            injector, wrong = try_one(way, at, expected)
            if injector.place:  # else this run, whose sets have another order, has no such byte code
                break
        injected += bool(injector.place)
        if wrong:
            left[at] = injector.place, wrong
    print(f"{way}: {len(left)} of {injected} left something behind, out of {len(events)} byte codes")  # noqa: T201
    assert injected == count
    assert not left


def streams(options):
    """The third prediction, by the number of the second batch's steps."""
    found = {}
    for skipped in (True, False):
        model = Stateful().eval()
        with torch.no_grad(), abpem(optimizer=SGD, **options).attach(model):
            first, second, third = batches(3)
            for args in (first, third) if skipped else (first, second, third):
                found[not skipped] = model(*args)
    return found


@pytest.mark.parametrize("options", [{}, {"memory_batches": 2}, {"replay": False}, {"predicts": "before"}, SEVERAL])
def test_after_an_interrupt_the_next_batch_is_adapted_to(options):
    """By the weights with the interrupted step, which is counted then, or by those without it."""
    expected = streams(options)
    first, second, third = batches(3)

    def run(injector):
        model = Stateful().eval()
        before = marks(model)
        with torch.no_grad(), abpem(optimizer=SGD, **options).attach(model) as adaptation:
            model(*first)
            try:
                with injector:
                    model(*second)
            except KeyboardInterrupt:
                pass
            taken = adaptation.updates == 2
            flags = [p.requires_grad for p in model.parameters()]
            output = model(*third)
            assert torch.equal(output, expected[taken]), (injector.place, taken, adaptation.skipped)
            assert adaptation.updates == 2 + taken
            if not injector.place.endswith(("thaw", "freeze", "_adapt")):
                assert flags == [p.requires_grad for p in Stateful().parameters()], injector.place
        with torch.inference_mode(False):
            assert not left_behind(model, before)
        assert model.calls == int(model.total) == len(model.history)
        return injector

    run(Injector(NOWHERE))
    events = run(Injector()).events
    assert sum(bool(run(Injector(events[(2 * i + 1) * len(events) // 24])).place) for i in range(12)) > 6


def test_closing_goes_on_where_it_was_interrupted():
    """At every byte code of it."""

    class Owner:
        pass

    def run(at):
        owner, changes, injector = Owner(), Changes(), Injector(at)
        before = dict(vars(owner))
        for name in ("a", "b", "c"):
            changes.set(owner, name, 1)
        try:
            with injector:
                changes.close()
        except KeyboardInterrupt:
            changes.close()
        assert vars(owner) == before
        assert not len(changes)
        return injector

    events = run(None).events
    assert len(events) > 50
    for at in events:
        assert run(at).place


def test_a_list_of_changes_that_is_lost_is_undone():
    class Owner:
        a: int

    owner, changes = Owner(), Changes()
    changes.set(owner, "a", 1)
    assert owner.a == 1
    del changes
    assert not hasattr(owner, "a")


def test_interrupts_come_in_the_package_alone():
    injector = Injector()
    with injector:
        batches(1)
    assert not injector.events
    assert PACKAGE.endswith("lightning_abpem")
