"""Protocols: which samples come in which order, and what is wrong with their sensors.

A protocol has conditions, the rows of its table. A condition and a seed give one stream. A model starts each stream as
the source model, and adapts along it without a reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from lightning_abpem.data.corruptions import Corruption, Sensor

__all__ = [
    "POOLED",
    "PROTOCOLS",
    "Condition",
    "Item",
    "Kinds",
    "Protocol",
    "chosen_kinds",
    "dirichlet_order",
    "find_protocol",
]

Kinds = Mapping[Sensor, Sequence[str]]
Labels = NDArray[np.int64]
POOLED = "all"
"""The condition of streams that draw from all kinds: other kinds make another stream."""

_GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)


@dataclass(frozen=True)
class Item:
    """One sample of a stream: its index, its sensors' faults, a modality that is missing, and the row it counts in."""

    index: int
    corruptions: tuple[Corruption, ...] = ()
    missing: Sensor | None = None
    row: str = ""


@dataclass(frozen=True)
class Condition:
    """A row of a protocol's table: its name, and the faults that its stream is built from."""

    name: str
    corruptions: tuple[Corruption, ...] = ()
    missing: Sensor | None = None


@dataclass(frozen=True)
class Protocol:
    """Functions that make the conditions at a severity, and a condition's stream.

    Args:
        make_conditions: from the kinds of corruption and a severity.
        stream: from a condition, the data's labels (N,) and random numbers.
        has_severity: True if the run's severity applies; else the protocol has its own.
    """

    make_conditions: Callable[[Kinds, int], list[Condition]]
    stream: Callable[[Condition, Labels, np.random.Generator], list[Item]]
    has_severity: bool = True

    def conditions(self, kinds: Kinds, severity: int) -> list[Condition]:
        """Return the rows of its table at a severity."""
        return self.make_conditions(kinds, severity if self.has_severity else 5)

    def faults(self, condition: Condition) -> list[Corruption]:
        """Return all faults that its streams may have: at every severity if the protocol has its own."""
        if self.has_severity:
            return list(condition.corruptions)
        return [Corruption(c.modality, c.kind, severity) for c in condition.corruptions for severity in range(1, 6)]


def find_protocol(name: str) -> Protocol:
    """Return the protocol of that name; "skewed-DELTA" takes any concentration.

    Raises:
        ValueError: there is none.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    stem, _, delta = name.partition("-")
    try:
        concentration = float(delta)
    except ValueError:
        concentration = -1.0
    if stem != "skewed" or not 0 < concentration < float("inf"):
        raise ValueError(f"Expected `protocol` to be one of {', '.join(PROTOCOLS)} or skewed-DELTA, but got {name!r}.")
    return Protocol(_single, partial(_skewed, delta=concentration))


def chosen_kinds(kinds: Kinds, names: Sequence[str]) -> Kinds:
    """Return the kinds that `names` select, in the benchmark's order, without modalities that have none.

    Args:
        kinds: of a benchmark.
        names: KIND for each modality that has it, or MODALITY:KIND.

    Raises:
        ValueError: there is no such kind.
    """
    known = {name for sensor, own in kinds.items() for kind in own for name in (kind, f"{sensor}:{kind}")}
    if unknown := [name for name in names if name not in known]:
        listed = "; of ".join(f"{sensor}: {', '.join(own)}" for sensor, own in kinds.items())
        raise ValueError(f"Expected `kinds` to be among those of {listed}; but got {', '.join(unknown)}.")
    chosen = {
        sensor: tuple(kind for kind in own if kind in names or f"{sensor}:{kind}" in names)
        for sensor, own in kinds.items()
    }
    return {sensor: own for sensor, own in chosen.items() if own}


def dirichlet_order(labels: Labels, delta: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return an order of the samples in which classes come in clumps, the denser the smaller `delta`.

    There are as many slots as classes. Every class is spread over them in shares drawn from Dirichlet(delta, ...,
    delta); within a slot, class follows class (Gong et al., "NOTE", NeurIPS 2022).

    Args:
        labels: (N,).
        delta: concentration, > 0.
        rng: random numbers.
    """
    classes = np.unique(labels)
    slots: list[list[NDArray[np.int64]]] = [[] for _ in classes]
    for label in rng.permutation(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(len(classes), delta))
        cuts = np.round(shares.cumsum()[:-1] * len(members)).astype(int)
        for slot, part in zip(slots, np.split(members, cuts), strict=True):
            slot.append(part)
    for slot in slots:
        rng.shuffle(slot)
    return np.concatenate([part for slot in slots for part in slot])


# ------------------------------------------------------------------------------------------------------- conditions


def _corruptions(kinds: Kinds, severity: int) -> list[Corruption]:
    return [Corruption(modality, kind, severity) for modality, names in kinds.items() for kind in names]


def _clean(kinds: Kinds, severity: int) -> list[Condition]:
    return [Condition("clean")]


def _single(kinds: Kinds, severity: int) -> list[Condition]:
    return [Condition(str(corruption), (corruption,)) for corruption in _corruptions(kinds, severity)]


def _all_in_one(kinds: Kinds, severity: int) -> list[Condition]:
    return [Condition(POOLED, tuple(_corruptions(kinds, severity)))]


def _pairs(kinds: Kinds, severity: int) -> list[Condition]:
    """Pair every kind of the modality that has more with the other's kinds, which repeat in turn."""
    if len(kinds) != 2:
        raise ValueError(f"Expected two modalities that can fail for the protocol `both`, but got {', '.join(kinds)}.")
    few, many = sorted(kinds, key=lambda modality: len(kinds[modality]))
    conditions = []
    for kind, other in zip(kinds[many], cycle(kinds[few]), strict=False):
        both = Corruption(many, kind, severity), Corruption(few, other, severity)
        conditions.append(Condition(" + ".join(map(str, both)), both))
    return conditions


def _each_missing(kinds: Kinds, severity: int) -> list[Condition]:
    return [Condition(f"{modality} missing", missing=modality) for modality in kinds]


# ---------------------------------------------------------------------------------------------------------- streams


def _shuffled(condition: Condition, labels: Labels, rng: np.random.Generator) -> list[Item]:
    """Return one shuffled pass in which every sample has all of the condition's faults."""
    return [Item(int(i), condition.corruptions, row=condition.name) for i in rng.permutation(len(labels))]


def _skewed(condition: Condition, labels: Labels, rng: np.random.Generator, delta: float) -> list[Item]:
    """One pass in which labels come in clumps."""
    order = dirichlet_order(labels, delta, rng)
    return [Item(int(i), condition.corruptions, row=condition.name) for i in order]


def _continual(condition: Condition, labels: Labels, rng: np.random.Generator) -> list[Item]:
    """A shuffled pass per fault, one after the other; each is a row."""
    passes = [(fault, rng.permutation(len(labels))) for fault in condition.corruptions]
    return [Item(int(i), (fault,), row=str(fault)) for fault, order in passes for i in order]


def _mixed(condition: Condition, labels: Labels, rng: np.random.Generator) -> list[Item]:
    """One shuffled pass; every sample has a fault and a severity of its own, and counts for the row of its sensor."""
    items = []
    for i in rng.permutation(len(labels)):
        fault = condition.corruptions[rng.integers(len(condition.corruptions))]
        drawn = Corruption(fault.modality, fault.kind, int(rng.integers(1, 6)))
        items.append(Item(int(i), (drawn,), row=f"{fault.modality}: mixed"))
    return items


def _gradual(condition: Condition, labels: Labels, rng: np.random.Generator) -> list[Item]:
    """One shuffled pass, in nine parts of severity 1 2 3 4 5 4 3 2 1."""
    (fault,) = condition.corruptions
    parts = np.array_split(rng.permutation(len(labels)), len(_GRADUAL))
    faults = [Corruption(fault.modality, fault.kind, severity) for severity in _GRADUAL]
    return [Item(int(i), (fault,), row=condition.name) for fault, part in zip(faults, parts, strict=True) for i in part]


def _failing(condition: Condition, labels: Labels, rng: np.random.Generator) -> list[Item]:
    """One shuffled pass of clean samples; in its second and third quarter a modality is missing."""
    order = rng.permutation(len(labels))
    start, stop = len(order) // 4, 3 * len(order) // 4
    return [
        Item(int(i), missing=condition.missing if start <= position < stop else None, row=condition.name)
        for position, i in enumerate(order)
    ]


PROTOCOLS: dict[str, Protocol] = {
    "clean": Protocol(_clean, _shuffled, has_severity=False),
    "iid": Protocol(_single, _shuffled),
    "continual": Protocol(_all_in_one, _continual),
    "mixed": Protocol(_all_in_one, _mixed, has_severity=False),
    "gradual": Protocol(_single, _gradual, has_severity=False),
    "both": Protocol(_pairs, _shuffled),
    "missing": Protocol(_each_missing, _failing, has_severity=False),
    "skewed-0.1": Protocol(_single, partial(_skewed, delta=0.1)),
    "skewed-1": Protocol(_single, partial(_skewed, delta=1.0)),
}
