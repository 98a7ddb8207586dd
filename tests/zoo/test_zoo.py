"""Adapting passes leave no trace, whatever a forward does; what cannot be kept is refused by name."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from tests.zoo.forwards import ENTRIES, Entry
from tests.zoo.harness import (
    Outcome,
    check_same,
    fingerprint,
    loop_by_hand,
    loop_of_trainer,
    make_callback,
    plain_run,
    run,
    seed,
)
from tests.zoo.nets import Call, Refusal
from tests.zoo.pictures import Picture, differences
from tests.zoo.twin import twin_run

WAYS = list(itertools.product(("attach", "Trainer"), (True, False), (1, 4)))


def cases(keep, fast):
    """Every entry in all its ways. One of them is fast, another one from entry to entry; `fast` says where to begin."""
    marked = []
    for i, entry in enumerate(ENTRIES.values()):
        ways = [way for way in WAYS if is_meant(entry, way[0], way[2]) and keep(entry, way[2])]
        for j, (how, replay, memory) in enumerate(ways):
            values = f"{entry.name}-{how}-{'replay' if replay else 'again'}-memory{memory}"
            marks = () if j == (i + fast) % len(ways) else pytest.mark.slow
            marked.append(pytest.param(entry, how, replay, memory, id=values, marks=marks))
    return marked


def is_meant(entry: Entry, how: str, memory: int) -> bool:
    return (entry.only is None or entry.only[0] == how) and not (memory > 1 and entry.memory)


def is_kept(entry: Entry, memory: int) -> bool:
    return entry.refused is None and not (memory > 1 and entry.memory_refused)


def is_refused(entry: Entry, memory: int) -> bool:
    return not is_kept(entry, memory)


def every_kept(fast: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("entry", "how", "replay", "memory"), cases(is_kept, fast))


@pytest.mark.filterwarnings("ignore")
@every_kept(fast=0)
def test_observing_leaves_no_trace(entry, how, replay, memory):
    got = run(entry, how, make_callback(entry, steps=0, replay=replay, memory_batches=memory))
    check_same(got, plain_run(entry.name, how))


@pytest.mark.filterwarnings("ignore")
@every_kept(fast=3)
def test_steps_are_those_of_the_twin(entry, how, replay, memory):
    got = run(entry, how, make_callback(entry, replay=replay, memory_batches=memory))
    check_adapted(got, entry, how, memory)


def check_adapted(got: Outcome, entry: Entry, how: str, memory: int) -> None:
    plain = plain_run(entry.name, how)
    assert fingerprint(got.model) == fingerprint(plain.model)
    assert got.skipped == 0
    if entry.twin:
        return
    assert got.updates == len(plain.given)
    twin = twin_run(entry.name, memory)
    assert differences(twin.given[0], plain.given[0], 1e-5), "the twin does not adapt, so nothing is tested"
    # A Trainer puts flags and gradients back, which the twin has nothing to do with; they are compared above.
    check_same(got, twin, entry.tolerance, but=(".training", ".grad"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(("entry", "how", "replay", "memory"), cases(is_refused, fast=0))
def test_what_cannot_be_kept_is_refused_by_name(entry, how, replay, memory, steps):
    refused = entry.refused or Refusal("call", entry.memory_refused, batch=1, steps=(1,))
    model, calls = entry.make(), entry.calls()
    given: list[Picture] = []
    stepped: list[Call] = []
    before, step = fingerprint(model, names=False), model.step

    def count(call):
        stepped.append(call)
        return step(call)

    model.step = count
    loop = loop_by_hand if how == "attach" else loop_of_trainer
    options = {"steps": steps, "replay": replay, "memory_batches": memory, "on_error": "raise"}
    seed()
    try:
        loop(entry, model, calls, make_callback(entry, **options), given, [])
    except Exception as error:
        check_message(error, refused.message)
        assert without(fingerprint(model, names=False), refused.moved) == without(before, refused.moved)
        assert len(given) <= refused.batch
        assert not (stepped and refused.at == "opening" and refused.is_needed)
    else:
        assert not (refused.is_needed and steps in refused.steps), "not refused"
        got = run(entry, how, make_callback(entry, **options))
        check_adapted(got, entry, how, memory) if steps else check_same(got, plain_run(entry.name, how))


def without(marks: dict[str, Any], moved: str) -> dict[str, Any]:
    return {name: mark for name, mark in marks.items() if not (moved and name.startswith(moved) and name[-1] == "=")}


def check_message(error: Exception, message: str) -> None:
    assert re.search(message, str(error)), f"{type(error).__name__}: {error}"
