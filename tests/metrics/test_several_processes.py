"""Two real processes: each has other batches, and both compute what one has of all of them."""

from collections.abc import Callable

import pytest
import torch
from torchmetrics import Metric

from lightning_abpem.metrics import (
    AttentionDivergence,
    AttentionGap,
    ClassShare,
    Entropy,
    FlipRate,
    Information,
    PrincipalEntropy,
)
from tests.ranks import in_two_processes

CLASSES, SPANS = 5, {"audio": 6, "video": 4}
METRICS: dict[str, Callable[[], Metric]] = {
    "Entropy": Entropy,
    "PrincipalEntropy": PrincipalEntropy,
    "FlipRate": FlipRate,
    "ClassShare": lambda: ClassShare(CLASSES),
    "Information": lambda: Information(CLASSES),
    "AttentionGap": lambda: AttentionGap(SPANS),
    "AttentionDivergence": lambda: AttentionDivergence(SPANS),
}
SIZES = ((3, 1), (5, 2, 4)), ((2,), ())  # by case and process: uneven, and one that has no batch


def batches(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (*3 * torch.randn(2, n, CLASSES, generator=generator), *torch.randn(2, n, 2, 10, 4, generator=generator))
        for n in sizes
    ]


def update(metric, batch):
    logits, source, q, k = batch
    is_of_attention = isinstance(metric, AttentionGap | AttentionDivergence)
    metric.update(*((q, k) if is_of_attention else (logits, source) if isinstance(metric, FlipRate) else (logits,)))


def computed(metric, given):
    for batch in given:
        update(metric, batch)
    return metric.compute().item()


def of_a_process(rank):
    return [{name: computed(make(), batches(sizes[rank], rank)) for name, make in METRICS.items()} for sizes in SIZES]


@pytest.mark.filterwarnings("ignore:.*``compute`` method.*before the ``update``")
def test_both_have_the_figures_of_all_batches():
    found = in_two_processes(of_a_process)
    for case, sizes in enumerate(SIZES):
        given = [batch for rank in range(2) for batch in batches(sizes[rank], rank)]
        expected = {name: computed(make(), given) for name, make in METRICS.items()}
        for own in found:
            assert own[case] == pytest.approx(expected, abs=1e-6)
    assert found[0] == found[1]
