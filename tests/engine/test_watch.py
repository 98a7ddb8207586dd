"""The adapted model against the source: figures against a twin that is written out sample by sample."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch

from lightning_abpem import ABPEM
from lightning_abpem.engine.watch import Watch
from lightning_abpem.functional import entropy
from lightning_abpem.methods import SAR, Source, Tent
from tests.ranks import in_two_processes
from tests.toy import MODALITIES, batches, make_toy

ADAM = partial(torch.optim.Adam, lr=1e-2)


def stream(count=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, 8, 1, 5, 8, 8][:count]
    return [tuple(3 * torch.randn(n, classes, generator=generator).double() for _ in range(2)) for n in sizes]


def nats(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def written_out(pairs, classes=5):
    """The figures of each batch; a sample's part in a mean is exp(-n / (5 C)) with n samples in later batches."""
    every: list[Any] = []
    figures = []
    for logits, source in pairs:
        size = len(logits)
        every = [(weight * math.exp(-size / (5 * classes)), *rest) for weight, *rest in every]
        p, q = logits.softmax(1).tolist(), source.softmax(1).tolist()
        every += [(1.0, a, b) for a, b in zip(p, q, strict=True)]
        total = sum(weight for weight, *_ in every)
        mean = [sum(w * a[c] for w, a, _ in every) / total for c in range(classes)]
        figures.append(
            {
                "flip_rate": sum(a.index(max(a)) != b.index(max(b)) for a, b in zip(p, q, strict=True)) / size,
                "source_entropy": sum(map(nats, q)) / size,
                "class_share": nats(mean),
                "information": nats(mean) - sum(w * nats(a) for w, a, _ in every) / total,
            }
        )
    return figures


def values(figures):
    return {name: x.item() for name, x in figures.items()}


def test_figures_are_those_of_the_twin():
    watch, pairs = Watch(), stream()
    for (logits, source), wanted in zip(pairs, written_out(pairs), strict=True):
        figures = watch.see(logits, source)
        assert values(figures) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("place", range(4))
def test_a_batch_that_is_not_finite_does_not_count(place):
    watch, twin = Watch(), Watch()
    for i, (logits, source) in enumerate(stream(4)):
        if i == place:
            watch.see(torch.full_like(logits, torch.nan), source)
        figures, wanted = watch.see(logits, source), twin.see(logits, source)
    assert values(figures) == values(wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    watch, twin = Watch(), Watch()
    for logits, source in stream():
        figures = watch.see(logits.to(dtype), source.to(dtype))
        wanted = twin.see(logits.to(dtype).double(), source.to(dtype).double())
        assert {k: x.item() for k, x in figures.items()} == pytest.approx(
            {k: x.item() for k, x in wanted.items()}, abs=1e-5
        )


def test_a_class_that_no_sample_can_have():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.float64)
    figures = Watch().see(logits, logits)
    assert figures["flip_rate"] == 0
    assert all(x.isfinite() for x in figures.values())


def run(model, make, data, **options):
    records = []
    with torch.no_grad(), make(optimizer=ADAM, **options).attach(model) as adaptation:
        adaptation.on_step = lambda record, samples: records.append(record)
        logits = [model(*batch) for batch in data]
        weights = [p.detach().clone() for p in adaptation.params.values()]
    return logits, weights, records


ABPEM_OPTIONS: dict[str, Any] = {"fusion": "fusion.*.attn", "modalities": MODALITIES}


@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("replay", [True, False])
def test_it_changes_no_prediction_and_no_weight(memory, replay):
    data = batches(5)
    make = partial(ABPEM, **ABPEM_OPTIONS, memory_batches=memory, replay=replay)
    model = make_toy()
    before = copy.deepcopy(model.state_dict())
    watched = run(model, make, data, monitor="source")
    plain = run(make_toy(), make, data)
    assert all(torch.equal(a, b) for a, b in zip(watched[0] + watched[1], plain[0] + plain[1], strict=True))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert plain[2][0].keys().isdisjoint({"flip_rate", "drift"})


@pytest.mark.parametrize("make", [Tent, partial(SAR, radius=3.0, entropy_margin=1.0)])
def test_the_source_is_the_model_as_it_was(make):
    """The comparison is with a copy that nobody adapts, of the model as it is before each step."""
    data, model, source = batches(4), make_toy(), make_toy()
    seen = []
    with torch.no_grad(), make(optimizer=ADAM, monitor="source").attach(model) as adaptation:
        start = [p.detach().clone() for p in adaptation.params.values()]
        adaptation.on_step = lambda record, samples: seen.append(record)
        for batch in data:
            frozen = copy.deepcopy(source)
            for (name, p), own in zip(frozen.named_parameters(), source.parameters(), strict=True):
                p.copy_(adaptation.params[name].detach() if name in adaptation.params else own)
            before, original = frozen(*batch), source(*batch)
            way = torch.cat([(p - s).flatten() for p, s in zip(adaptation.params.values(), start, strict=True)])
            drift = way.norm() / torch.cat([s.flatten() for s in start]).norm()
            model(*batch)
            assert seen[-1]["flip_rate"] == (before.argmax(1) != original.argmax(1)).double().mean()
            torch.testing.assert_close(seen[-1]["source_entropy"], entropy(original).mean())
            torch.testing.assert_close(seen[-1]["drift"], drift)


def test_every_third_batch():
    _, _, records = run(make_toy(), Tent, batches(7), monitor=3)
    assert ["flip_rate" in record for record in records] == [False, False, True, False, False, True, False]


def test_the_encoders_run_once_per_batch_all_the_same():
    """A comparison runs the source's fusion on tokens that are there already. The first two batches are audited."""
    counts = []
    for monitor in ("off", "source"):
        model = make_toy()
        with torch.no_grad(), ABPEM(**ABPEM_OPTIONS, monitor=monitor).attach(model):
            runs = []
            for batch in batches(5):
                before = model.audio.runs
                model(*batch)
                runs.append(model.audio.runs - before)
        counts.append(runs[2:])
    assert counts == [[1, 1, 1]] * 2


def in_one_of_two(rank, options):
    model, records = make_toy().double(), []
    data = [tuple(x.double()[rank::2] for x in batch) for batch in batches(4, 6)]
    with torch.no_grad(), Tent(optimizer=ADAM, monitor="source", **options).attach(model) as adaptation:
        adaptation.on_step = lambda record, samples: records.append(record)
        for batch in data:
            model(*batch)
        adaptation.drain(is_last=True)
    return records


def test_two_processes_see_what_one_does():
    both = in_two_processes(in_one_of_two, {})
    model, records = make_toy().double(), []
    with torch.no_grad(), Tent(optimizer=ADAM, monitor="source").attach(model) as adaptation:
        adaptation.on_step = lambda record, samples: records.append(record)
        for batch in batches(4, 6):
            model(*(x.double() for x in batch))
    for own in both:
        for a, b in zip(own, records, strict=True):
            assert values(a) == pytest.approx(values(b), abs=1e-9)


def test_the_source_itself_is_compared_too():
    """No weight moves, so there is no way, and no class flips."""
    model = make_toy()
    with torch.no_grad(), Source(monitor="source").attach(model) as adaptation:
        model(*batches(1)[0])
    assert adaptation.record["drift"] == adaptation.record["flip_rate"] == 0
    assert adaptation.record["information"].isfinite()


def test_every_eighth_batch_by_default():
    _, _, records = run(make_toy(), Tent, batches(17))
    assert [i for i, record in enumerate(records) if "flip_rate" in record] == [7, 15]
