"""Figures of predictions: class = function = a float64 twin, over batches of different sizes."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_abpem import functional as F
from lightning_abpem.metrics import (
    ClassShare,
    Entropy,
    ExpectedCalibrationError,
    FlipRate,
    Information,
    PrincipalEntropy,
)
from tests import reference

CLASSES = 6
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [tuple(3 * torch.randn(2, n, CLASSES, generator=GENERATOR).double()) for n in (5, 1, 8, 3)]


def softmax(logits):
    x = np.asarray(logits, dtype=np.float64)
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def nats(p):
    return -sum(x * np.log(x) for x in np.ravel(p) if x > 0)


def class_share(logits, _):
    return nats(softmax(logits).mean(0))


METRICS: dict[str, tuple[Callable[..., Metric], Callable[..., Tensor], Callable[..., Any]]] = {
    "Entropy": (Entropy, lambda x, s: F.entropy(x).mean(), lambda x, s: np.mean(reference.entropies(x))),
    "PrincipalEntropy, k=3": (
        lambda **kwargs: PrincipalEntropy(3, **kwargs),
        lambda x, s: F.principal_entropy(x, 3).mean(),
        lambda x, s: np.mean(reference.principal_entropies(x, 3)),
    ),
    "PrincipalEntropy": (
        PrincipalEntropy,
        lambda x, s: F.principal_entropy(x, F.classes_kept("auto", x.shape[1])).mean(),
        lambda x, s: np.mean(reference.principal_entropies(x, 2)),
    ),
    "FlipRate": (FlipRate, F.flip_rate, lambda x, s: np.mean(softmax(x).argmax(1) != softmax(s).argmax(1))),
    "ClassShare": (
        lambda classes=CLASSES, **kwargs: ClassShare(classes, **kwargs),
        lambda x, s: F.class_share(x),
        class_share,
    ),
    "Information": (
        lambda classes=CLASSES, **kwargs: Information(classes, **kwargs),
        lambda x, s: F.information(x),
        lambda x, s: class_share(x, s) - np.mean([nats(p) for p in softmax(x)]),
    ),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def update(metric, logits, source):
    metric.update(*((logits, source) if isinstance(metric, FlipRate) else (logits,)))


def computed(name, batches, dtype=torch.float64, **options):
    metric = METRICS[name][0](**options).set_dtype(dtype)
    for logits, source in batches:
        update(metric, logits, source)
    return metric.compute()


def whole(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@every_metric
def test_class_function_and_twin_agree(name):
    _, function, twin = METRICS[name]
    expected = twin(*whole(BATCHES))
    assert computed(name, BATCHES).item() == pytest.approx(expected, abs=1e-12)
    assert function(*whole(BATCHES)).item() == pytest.approx(expected, abs=1e-7)  # a rate is float32
    assert computed(name, BATCHES, torch.float32).item() == pytest.approx(expected, abs=1e-6)


@every_metric
def test_what_a_step_gets_is_the_batch_s(name):
    metric = METRICS[name][0]()
    for logits, source in BATCHES:
        own = metric(logits, source) if isinstance(metric, FlipRate) else metric(logits)
        assert own.item() == pytest.approx(METRICS[name][2](logits, source), abs=1e-6)
    assert metric.compute().item() == pytest.approx(METRICS[name][2](*whole(BATCHES)), abs=1e-6)
    metric.reset()
    update(metric, *BATCHES[0])
    assert metric.compute().item() == pytest.approx(METRICS[name][2](*BATCHES[0]), abs=1e-6)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name, dtype):
    halves = [tuple(x.to(dtype) for x in pair) for pair in BATCHES]
    exact = [tuple(x.double() for x in pair) for pair in halves]
    assert computed(name, halves, torch.float32).item() == pytest.approx(METRICS[name][2](*whole(exact)), abs=1e-5)


@every_metric
def test_a_module_that_is_cast_leaves_the_sums_as_they_are(name):
    module: Any = torch.nn.Module()
    module.metric = METRICS[name][0]()
    module.to(torch.float16)
    for _ in range(2):
        module.metric.reset()
        assert torch.float16 not in {state.dtype for state in module.metric.metric_state.values()}
        for _ in range(40):
            update(module.metric, *BATCHES[0])
        assert module.metric.compute().item() == pytest.approx(METRICS[name][2](*BATCHES[0]), abs=1e-5)


@every_metric
def test_classes_at_minus_infinity(name):
    hidden = torch.zeros(CLASSES, dtype=torch.bool)
    hidden[[1, 4]] = True
    batches = [tuple(x.masked_fill(hidden, -torch.inf) for x in pair) for pair in BATCHES]
    assert computed(name, batches).item() == pytest.approx(METRICS[name][2](*whole(batches)), abs=1e-12)


@every_metric
def test_one_class(name):
    batches = [(torch.randn(4, 1), torch.randn(4, 1))]
    options = {"classes": 1} if name in ("ClassShare", "Information") else {}
    if name.endswith("k=3"):
        with pytest.raises(ValueError, match="got 3 and logits of 1 classes"):
            computed(name, batches)
    else:
        assert computed(name, batches, **options).item() == pytest.approx(0, abs=2e-6)  # the 1e-6 of the logarithm


@every_metric
def test_an_empty_batch_changes_nothing(name):
    empty = (torch.zeros(0, CLASSES), torch.zeros(0, CLASSES))
    assert torch.equal(computed(name, [BATCHES[0], empty]), computed(name, BATCHES[:1]))


@pytest.mark.parametrize("name", [name for name in METRICS if name != "FlipRate"])
def test_a_sample_without_a_prediction_does_not_pass_unnoticed(name):
    batch = torch.full((2, CLASSES), -torch.inf), torch.zeros(2, CLASSES)
    assert computed(name, [*BATCHES, batch]).isnan()


@pytest.mark.filterwarnings("ignore:.*``compute`` method.*before the ``update``")
@every_metric
def test_without_a_sample_there_is_no_figure(name):
    assert METRICS[name][0]().compute().isnan()


@every_metric
def test_nothing_keeps_a_graph(name):
    logits = BATCHES[0][0].clone().requires_grad_()
    metric = METRICS[name][0]()
    update(metric, logits, BATCHES[0][1])
    assert not any(torch.as_tensor(state).requires_grad for state in metric.metric_state.values())


def test_bounds_of_the_information():
    even = 100 * torch.eye(4)
    assert F.information(even).item() == pytest.approx(np.log(4), abs=1e-6)
    assert F.information(torch.zeros(4, 4)).item() == pytest.approx(0, abs=1e-6)
    assert F.class_share(even[[0, 0, 0]]).item() == pytest.approx(0, abs=1e-6)


def test_function_and_balance_are_one_figure():
    logits = BATCHES[2][0]
    torch.testing.assert_close(F.class_share(logits), F.marginal_balance(logits), rtol=0, atol=1e-12)


@every_metric
def test_plots_pickles_and_copies(name):
    pytest.importorskip("matplotlib").use("Agg")
    metric = METRICS[name][0]()
    update(metric, *BATCHES[0])
    figure, axes = metric.plot()
    assert axes.get_title() or axes.has_data()
    metric.plot([metric.compute()] * 3, ax=axes)
    __import__("matplotlib.pyplot").pyplot.close(figure)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())


def test_in_a_collection():
    collection = MetricCollection([Entropy(), PrincipalEntropy(), ClassShare(CLASSES), Information(CLASSES)])
    for logits, _ in BATCHES:
        collection.update(logits)
    values = {name: value.item() for name, value in collection.compute().items()}
    expected = {name: METRICS[name][2](*whole(BATCHES)) for name in values}
    assert values == pytest.approx(expected, abs=1e-6)


def test_calibration_is_torchmetrics_own():
    metric, labels = ExpectedCalibrationError(CLASSES), torch.arange(8) % CLASSES
    metric.update(BATCHES[2][0], labels)
    assert torch.equal(metric.compute(), multiclass_calibration_error(BATCHES[2][0], labels, CLASSES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrincipalEntropy(0), '`k` to be an integer in .* or "auto", but got 0'),
        (lambda: ClassShare(0), "`num_classes` to be an integer >= 1, but got 0"),
        (lambda: Information(2.0), "`num_classes` to be an integer >= 1, but got 2.0"),  # type: ignore[arg-type]
        (
            lambda: Entropy().update(torch.zeros(3)),
            r"`logits` to be a .* \(samples, classes\), but got .*float32 \(3,\)",
        ),
        (lambda: Entropy().update(torch.zeros(3, 2).long()), r"but got torch.int64 \(3, 2\)"),
        (lambda: Entropy().update(None), "but got NoneType"),  # type: ignore[arg-type]
        (lambda: Entropy().update(torch.zeros(3, 0)), r"but got torch.float32 \(3, 0\)"),
        (lambda: ClassShare(5).update(torch.zeros(3, 4)), r"of \(samples, 5\), but got torch.float32 \(3, 4\)"),
        (lambda: PrincipalEntropy(5).update(torch.zeros(3, 4)), "but got 5 and logits of 4 classes"),
        (lambda: FlipRate().update(torch.zeros(3, 4), torch.zeros(3)), "`source` to be a floating point tensor"),
        (lambda: FlipRate().update(torch.zeros(3, 4), torch.zeros(2, 4)), r"but got \(3, 4\) and \(2, 4\)"),
    ],
)
def test_errors_name_what_was_seen(make, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        make()
