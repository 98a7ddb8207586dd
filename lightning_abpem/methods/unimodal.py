"""Unimodal passes through a model with one fused head: the other modalities' inputs are zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_abpem.engine.checks import listed_names, shown
from lightning_abpem.engine.method import Edit, Rerun

__all__ = ["Inputs", "check_inputs", "only", "unimodal_logits"]

Inputs = Mapping[str, int | str]
"""Position or keyword of each modality among the target's arguments."""


def check_inputs(inputs: Inputs) -> None:
    """Hold the option against its form.

    Raises:
        ValueError: fewer than two modalities, or one that is neither a position nor a name.
    """
    if not isinstance(inputs, Mapping) or len(inputs) < 2 or not listed_names(list(inputs)):
        raise ValueError(f'Expected `inputs` such as {{"audio": 0, "video": 1}}, but got {shown(inputs)}.')
    for modality, place in inputs.items():
        if isinstance(place, bool) or not isinstance(place, (int, str)) or (isinstance(place, int) and place < 0):
            raise ValueError(
                f"Expected `inputs` to say at which position or under which keyword the target takes {modality}, but "
                f"got {shown(place)}."
            )


def only(inputs: Inputs, modality: str) -> Edit:
    """Return an edit of the target's arguments that makes them those of a unimodal pass.

    Zeros stand for what a normalised input is on average, as when a sensor is missing.
    """

    def edit(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        places: dict[int | str, Any] = dict(enumerate(args))
        places.update(kwargs)
        if unknown := {name: place for name, place in inputs.items() if place not in places}:
            raise ValueError(
                f"Expected `inputs` to name arguments of the target, which was called with {len(args)} positions and "
                f"the keywords {sorted(kwargs)}, but got {unknown}."
            )
        for name, place in inputs.items():
            if name != modality:
                places[place] = tree_map(lambda x: x.new_zeros(x.shape) if isinstance(x, Tensor) else x, places[place])
        return [places[position] for position in range(len(args))], {name: places[name] for name in kwargs}

    return edit


def unimodal_logits(inputs: Inputs, rerun: Rerun) -> list[Tensor]:
    """Run a unimodal pass for each modality: their logits (B, C), in the order of `inputs`."""
    return [rerun(only(inputs, modality)).logits for modality in inputs]
