"""Protocols: what each stream is made of, and that it follows its random numbers alone."""

import re
from collections import Counter

import numpy as np
import pytest

from lightning_abpem.bench.protocols import PROTOCOLS, chosen_kinds, dirichlet_order, find_protocol
from lightning_abpem.data.corruptions import Corruption, Sensor

KINDS: dict[Sensor, tuple[str, ...]] = {"image": ("fog", "contrast", "snow"), "audio": ("wind", "rain")}
LABELS = np.repeat(np.arange(10), 18)


def streams(name, severity=5, seed=0):
    protocol = find_protocol(name)
    conditions = protocol.conditions(KINDS, severity)
    return {c.name: protocol.stream(c, LABELS, np.random.default_rng(seed)) for c in conditions}


def indices(items):
    return [item.index for item in items]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_sample_comes_once_per_pass_in_an_order_of_the_seed(name):
    first, again, other = streams(name), streams(name), streams(name, seed=1)
    assert first == again
    for condition, items in first.items():
        passes = 5 if name == "continual" else 1
        assert Counter(indices(items)) == dict.fromkeys(range(len(LABELS)), passes)
        assert indices(items) != indices(other[condition])


def test_iid_is_one_fault_per_stream():
    found = streams("iid", severity=3)
    assert list(found) == ["image: fog", "image: contrast", "image: snow", "audio: wind", "audio: rain"]
    assert {item.corruptions for item in found["audio: rain"]} == {(Corruption("audio", "rain", 3),)}
    assert {item.row for item in found["audio: rain"]} == {"audio: rain"}


def test_clean_has_no_fault():
    assert {(item.corruptions, item.missing) for item in streams("clean")["clean"]} == {((), None)}


def test_continual_goes_through_all_faults_in_turn():
    (items,) = streams("continual").values()
    rows = [item.row for item in items]
    assert list(dict.fromkeys(rows)) == list(streams("iid"))
    assert rows == sorted(rows, key=list(streams("iid")).index)
    assert indices(items[:180]) != indices(items[180:360])


def test_mixed_draws_a_fault_and_a_severity_per_sample():
    (items,) = streams("mixed").values()
    assert all(len(item.corruptions) == 1 for item in items)
    drawn = Counter(item.corruptions[0].severity for item in items)
    assert set(drawn) == {1, 2, 3, 4, 5}
    assert max(drawn.values()) < 60  # 36 each on average
    assert {item.row for item in items} == {"image: mixed", "audio: mixed"}
    assert all(item.row.startswith(item.corruptions[0].modality) for item in items)


def test_gradual_rises_and_falls():
    items = streams("gradual")["image: fog"]
    severities = [item.corruptions[0].severity for item in items]
    assert severities == [s for s in (1, 2, 3, 4, 5, 4, 3, 2, 1) for _ in range(20)]
    assert {item.corruptions[0].kind for item in items} == {"fog"}


def test_both_pairs_every_kind_of_the_larger_modality():
    found = streams("both", severity=2)
    assert list(found) == [
        "image: fog + audio: wind",
        "image: contrast + audio: rain",
        "image: snow + audio: wind",
    ]
    assert all(len(item.corruptions) == 2 for items in found.values() for item in items)


def test_missing_lacks_one_modality_in_the_middle_half():
    found = streams("missing")
    assert list(found) == ["image missing", "audio missing"]
    lacks = [item.missing for item in found["audio missing"]]
    assert lacks == [None] * 45 + ["audio"] * 90 + [None] * 45
    assert all(item.corruptions == () for item in found["audio missing"])


@pytest.mark.parametrize(("delta", "low", "high"), [(0.1, 0.5, 1.0), (1.0, 0.2, 0.6), (100.0, 0.1, 0.25)])
def test_labels_are_the_more_skewed_the_smaller_delta(delta, low, high):
    """The share of the commonest class in a window of one slot's length, on average."""
    labels = np.repeat(np.arange(10), 60)
    orders = [dirichlet_order(labels, delta, np.random.default_rng(seed)) for seed in range(5)]
    shares = [
        np.bincount(labels[order][start : start + 60]).max() / 60 for order in orders for start in range(0, 600, 60)
    ]
    if delta < 100:
        assert low < np.mean(shares) <= high
    else:  # classes follow each other within a slot, but each slot has all of them
        slots = [set(labels[order][start : start + 70]) for order in orders for start in range(0, 500, 60)]
        assert np.mean([len(slot) for slot in slots]) > 8


def test_any_concentration_has_a_name():
    assert streams("skewed-0.1") == streams("skewed-.1") == streams("skewed-0.10")
    assert streams("skewed-0.1") != streams("skewed-7")


@pytest.mark.parametrize("name", ["shuffled", "skewed", "skewed-0", "skewed--1", "skewed-inf", "skewed-x"])
def test_unknown_protocols(name):
    with pytest.raises(ValueError, match=rf"Expected `protocol` to be one of clean, iid, .*but got '{name}'"):
        find_protocol(name)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fog"], {"image": ("fog",)}),
        (["rain", "snow", "fog"], {"image": ("fog", "snow"), "audio": ("rain",)}),
        (["noise"], {"image": ("noise",), "audio": ("noise",)}),
        (["audio:noise", "fog"], {"image": ("fog",), "audio": ("noise",)}),
    ],
)
def test_kinds_are_chosen_by_name(names, expected):
    assert chosen_kinds({"image": ("fog", "snow", "noise"), "audio": ("noise", "rain")}, names) == expected


@pytest.mark.parametrize("name", ["haze", "Fog", "audio:fog", "", "fog "])
def test_unknown_kinds_are_named_with_those_that_are_there(name):
    words = f"Expected `kinds` to be among those of image: fog, contrast, snow; of audio: wind, rain; but got {name}."
    with pytest.raises(ValueError, match=re.escape(words)):
        chosen_kinds(KINDS, ["fog", name])


@pytest.mark.parametrize("name", ["iid", "gradual", "skewed-1", "both", "clean"])
def test_streams_of_chosen_kinds_are_those_of_all(name):
    """Condition by condition, so that a run may go on with other kinds."""
    protocol, every = find_protocol(name), streams(name)
    some = chosen_kinds(KINDS, ["fog", "snow", "contrast", "wind"])
    conditions = [c for c in protocol.conditions(some, 5) if c.name in every]
    assert conditions
    for condition in conditions:
        assert protocol.stream(condition, LABELS, np.random.default_rng(0)) == every[condition.name]
