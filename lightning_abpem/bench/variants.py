"""Methods by the labels of a run: a method with options, built for a benchmark."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from lightning_abpem.bench.benchmark import Benchmark
from lightning_abpem.bench.optimizers import named_optimizer, refuse_code
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.data.corruptions import Sensor
from lightning_abpem.engine.checks import check_range
from lightning_abpem.methods import ABPEM, EATA, MMTTA, READ, SAR, Source, SuMi, Tent

__all__ = ["METHODS", "VARIANTS", "Variant", "find_variants"]

_RIVALS = {"learning_rate": "optimizer", "memory_samples": "memory_batches"}
"""Options of a variant, and those of the constructor that say the same."""

METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "source": Source,
    "tent": Tent,
    "eata": EATA,
    "sar": SAR,
    "mmtta": MMTTA,
    "sumi": SuMi,
    "read": READ,
    "abpem-published": partial(ABPEM, attention_weight=1.0, balance="marginal"),
    "abpem": ABPEM,
}
"""By their names; "abpem" with the package's defaults, which need no labels, and in its published form."""


@dataclass(frozen=True)
class Variant:
    """A method with options of its own.

    Args:
        method: a key of `METHODS`.
        options: of its constructor; one `learning_rate` is that of Adam. Besides them `memory_samples`, how many
            samples the memory holds, the current batch included. `optimizer` may also be one of torch's by its name,
            ``{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}``.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {self.method!r}.")
        # Not `report`: the options may be a stranger's, who would choose what is overwritten.
        own = {*_arguments(METHODS[self.method])} - {"restore", "stages", "report"}
        known = {*own, "learning_rate", "memory_samples"}
        if unknown := sorted(set(self.options) - known):
            raise ValueError(f"Expected options of {self.method}, {', '.join(sorted(known))}, but got {unknown}.")
        for one, other in _RIVALS.items():
            if one in self.options and other in self.options:
                raise ValueError(f"Expected `{one}` or `{other}`, which say the same, but got both.")
        for name, value in self.options.items():
            if name == "optimizer" and isinstance(value, Mapping):
                named_optimizer(value, "options.optimizer")
            else:
                refuse_code(value, f"options.{name}")
        logits = self.options.get("logits")
        if logits is not None and not callable(logits):
            raise ValueError(
                f"Expected `options.logits` to be a function, which no config can name, but got {logits!r}."
            )

    def resolved(self, benchmark: Benchmark, sensors: Sequence[Sensor]) -> dict[str, Any]:
        """Return the options for a benchmark when those sensors fail: the benchmark's, overridden by the variant's."""
        replaced = {one for pair in _RIVALS.items() for one in pair if not self.options.keys().isdisjoint(pair)}
        own = benchmark.options(self.method, sensors)
        return {**{name: value for name, value in own.items() if name not in replaced}, **self.options}

    def build(
        self, benchmark: Benchmark, sensors: Sequence[Sensor], samples: int, batch_size: int
    ) -> TestTimeAdaptation:
        """Build the callback.

        Raises:
            ValueError: an option is out of its range.
        """
        options = self.resolved(benchmark, sensors)
        constructor = METHODS[self.method]
        wanted = _arguments(constructor)
        fitting: dict[str, Any] = {
            "fusion": benchmark.fusion,
            "modalities": benchmark.modalities,
            "inputs": {sensor: position for position, sensor in enumerate(benchmark.sensors)},
            "encoders": benchmark.encoders,
            "total_batches": -(-samples // batch_size),
        }
        rate = options.get("learning_rate")
        if rate is not None and rate != "auto" and not isinstance(rate, list):  # those are side by side
            check_range("learning_rate", rate, above=0)
            options["optimizer"] = partial(torch.optim.Adam, lr=options.pop("learning_rate"))
        if isinstance(options.get("optimizer"), Mapping):
            options["optimizer"] = named_optimizer(options["optimizer"], "options.optimizer")
        if "memory_samples" in options:
            held = options.pop("memory_samples")
            if isinstance(held, bool) or not isinstance(held, int) or held < 1:
                raise ValueError(f"Expected `memory_samples` to be an integer >= 1, but got {held!r}.")
            options["memory_batches"] = max(held // batch_size, 1)
        fitting = {name: value for name, value in fitting.items() if name in wanted}
        try:
            return constructor(**{**fitting, **options})
        except TypeError as error:  # a value that is not even of a kind that its check expects
            raise ValueError(f"Expected options that fit {self.method}, but got {self.options!r}: {error}.") from error


def _arguments(constructor: Callable[..., TestTimeAdaptation]) -> list[str]:
    return list(inspect.signature(constructor).parameters)


VARIANTS: dict[str, Variant] = {
    **{name: Variant(name) for name in METHODS},
    "pem": Variant("abpem", {"attention_weight": 0.0}),
    "abpem-no-balance": Variant("abpem", {"balance_weight": 0.0}),
    "abpem-no-memory": Variant("abpem", {"memory_samples": 1}),
    "pem-published": Variant("abpem-published", {"attention_weight": 0.0}),
    "pem-published-no-balance": Variant("abpem-published", {"attention_weight": 0.0, "balance_weight": 0.0}),
    "bootstrapping": Variant("abpem-published", {"entropy_weight": 0.0, "balance_weight": 0.0}),
    "abpem-published-no-balance": Variant("abpem-published", {"balance_weight": 0.0}),
    "abpem-published-no-memory": Variant("abpem-published", {"memory_samples": 1}),
}
"""Every method as its paper has it, and ABPEM's parts."""


def find_variants(labels: Sequence[str], own: Mapping[str, Variant]) -> dict[str, Variant]:
    """Return the variants of those labels; the user's own take precedence over the package's.

    Raises:
        ValueError: there is none of that label.
    """
    known = VARIANTS | dict(own)
    if unknown := [label for label in labels if label not in known]:
        raise ValueError(f"Expected `methods` to be among {', '.join(known)}, but got {', '.join(unknown)}.")
    return {label: known[label] for label in labels}
