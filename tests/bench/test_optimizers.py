"""torch's optimizers by name: each steps as the one that a program makes, and nothing else has a name."""

import pytest
import torch
from torch import nn

from lightning_abpem.bench.cells import run_cell
from lightning_abpem.bench.optimizers import named_optimizer, refuse_code
from lightning_abpem.bench.variants import Variant
from tests.bench.runs import CELL
from tests.toybench import ToyBench


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("Adam", {"lr": 0.01, "betas": [0.8, 0.9]}),
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
        ("RMSprop", {}),
    ],
)
def test_a_named_optimizer_is_torchs(name, arguments):
    made = named_optimizer({"class_path": f"torch.optim.{name}", "init_args": arguments}, "optimizer")
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(5))
    second = nn.Parameter(first.detach().clone())
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    optimizers = made([first]), getattr(torch.optim, name)([second], **values)
    for _ in range(3):
        gradient = torch.randn(5)
        for optimizer, parameter in zip(optimizers, (first, second), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(first, second)


def test_a_variant_with_one_adapts_as_with_learning_rate():
    bench, found = ToyBench(), []
    for options in (
        {"learning_rate": 0.01},
        {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}},
    ):
        result = run_cell(bench, CELL, Variant("abpem", options), bench.source("one"))
        assert result["updates"] == 3
        found.append({**result, "seconds": 0})
    assert found[0] == found[1]


@pytest.mark.parametrize("rates", ["auto", [0.01, 0.1]])
def test_rates_side_by_side(rates):
    bench = ToyBench()
    built = Variant("abpem", {"learning_rate": rates}).build(bench, bench.sensors[:1], 12, 4)
    assert list(built.settings.learning_rates) == ([1e-4, 1e-3, 3e-3] if rates == "auto" else rates)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "one of ASGD, .* but got None"),
        ({"class_path": "os.system"}, "`x.class_path` .* but got 'os.system'"),
        ({"class_path": "torch.optim.Optimizer"}, "but got 'torch.optim.Optimizer'"),
        ({"class_path": "torch.optim.adam.Adam"}, "but got 'torch.optim.adam.Adam'"),
        ({"class_path": "torch.optim.SGD", "dict_kwargs": {}}, r"but got \['dict_kwargs'\] too"),
        ({"class_path": "torch.optim.SGD", "init_args": {"params": []}}, "`x.init_args` of torch.optim.SGD among"),
        ({"class_path": "torch.optim.SGD", "init_args": [1]}, r"`x.init_args` of torch.optim.SGD among .* got \[1\]"),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": "fast"}}, "`x.init_args` to fit torch.optim.SGD"),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": -1}}, "Invalid learning rate: -1"),
        ({"class_path": "torch.optim.LBFGS"}, "`x.init_args` to fit torch.optim.LBFGS, .*closure"),
    ],
)
def test_what_is_no_optimizer_is_refused(spec, words):
    with pytest.raises(ValueError, match=words) as error:
        named_optimizer(spec, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, 1, "os.system", [1, {"a": [2]}], {"class": 1}])
def test_plain_values_are_no_code(value):
    refuse_code(value, "x")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"class_path": "os.system"}, "got 'os.system' in `x.class_path`"),
        ({"a": [{"init_args": 1}]}, "got 1 in `x.a.0.init_args`"),
    ],
)
def test_mappings_that_name_code(value, words):
    with pytest.raises(ValueError, match=words):
        refuse_code(value, "x")
