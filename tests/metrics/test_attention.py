"""Figures of attention: class = function = a twin that makes every score map, in float64, a head at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_abpem.attention import capture_attention, find_attention, find_fusion
from lightning_abpem.attention.calls import FusedCall
from lightning_abpem.metrics import AttentionDivergence, AttentionGap
from lightning_abpem.metrics.functional import attention_divergence, attention_gap
from tests.families import FAMILIES
from tests.toy import MODALITIES, batches, make_toy

HEADS, WIDTH = 3, 4
SPANS = {"audio": (0, 6), "video": (6, 10), "text": (10, 15)}
FIGURES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "gap": (AttentionGap, attention_gap),
    "divergence": (AttentionDivergence, attention_divergence),
}
every_figure = pytest.mark.parametrize("figure", FIGURES)


def queries_and_keys(sizes=(4, 1, 7), tokens=15, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, n, HEADS, tokens, WIDTH, generator=generator).to(dtype)) for n in sizes]


def values_of(figure, cross, own):
    """One sample's, from the scores that count; None if there are no two."""
    if len(cross) < 2 or len(own) < 2 or not np.ptp(cross) or not np.ptp(own):
        return None
    a, s, b, t = cross.mean(), cross.std(ddof=1), own.mean(), own.std(ddof=1)
    return b - a if figure == "gap" else np.log(t / s) + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5


def by_pair(figure, data, spans, keep=None, scale=WIDTH**-0.5):
    """Means over all samples of all batches, and the mean of these."""
    found: dict[str, list[Any]] = {f"{m}_to_{n}": [] for m in spans for n in spans if m != n}
    for q, k in data:
        for i in range(len(q)):
            maps = [scale * np.asarray(q[i, h].double()) @ np.asarray(k[i, h].double()).T for h in range(q.shape[1])]
            scores = np.mean(maps, axis=0)
            kept = np.ones(scores.shape, bool) if keep is None else np.asarray(keep[i])
            block = {
                (m, n): scores[slice(*spans[m]), slice(*spans[n])][kept[slice(*spans[m]), slice(*spans[n])]]
                for m in spans
                for n in spans
            }
            for pair, values in found.items():
                m, n = pair.split("_to_")
                values.append(values_of(figure, block[m, n], block[n, n]))
    means = {pair: np.mean([x for x in values if x is not None] or [np.nan]) for pair, values in found.items()}
    return means, np.nanmean(list(means.values()))


def close(ours, expected, bound=1e-12):
    assert {name: x.item() for name, x in ours.items()} == pytest.approx(expected, abs=bound, nan_ok=True)


def metric_of(figure, spans, average, data, dtype=torch.float64, **options):
    metric = FIGURES[figure][0](spans, average=average, **options).set_dtype(dtype)
    for seen in data:
        metric.update(*seen)
    return metric.compute()


@every_figure
@pytest.mark.parametrize("names", [("audio", "video"), ("audio", "video", "text"), ("text", "audio")])
def test_class_function_and_twin_agree(figure, names):
    data, spans = queries_and_keys(), {name: SPANS[name] for name in names}
    pairs, mean = by_pair(figure, data, spans)
    close(metric_of(figure, spans, "none", data), pairs)
    assert metric_of(figure, spans, "macro", data).item() == pytest.approx(mean, abs=1e-12)
    whole = [torch.cat(parts) for parts in zip(*data, strict=True)]
    close(FIGURES[figure][1](*whole, modalities=spans, average="none"), pairs)
    assert FIGURES[figure][1](*whole, modalities=spans).item() == pytest.approx(mean, abs=1e-12)


@every_figure
def test_the_form_without_a_map_gives_the_same(figure):
    """Moments alone are made of many tokens."""
    data = queries_and_keys((3,), tokens=40)
    spans = {"audio": 25, "video": 15}
    pairs, _ = by_pair(figure, data, {"audio": (0, 25), "video": (25, 40)})
    close(FIGURES[figure][1](*data[0], modalities=spans, average="none"), pairs, 1e-11)


@every_figure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(figure, dtype):
    data = queries_and_keys(dtype=dtype)
    pairs, mean = by_pair(figure, data, SPANS)
    close(metric_of(figure, SPANS, "none", data, torch.float32), pairs, 1e-5)
    assert metric_of(figure, SPANS, "macro", data, torch.float32).item() == pytest.approx(mean, abs=1e-5)


@every_figure
def test_hidden_scores_do_not_count(figure):
    [(q, k)] = queries_and_keys((3,))
    visible = torch.ones(3, 15, dtype=torch.bool)
    visible[0, 4:6], visible[1, 7:10] = False, False  # of the second sample one token of the video is left
    mask = visible[:, None, None, :]
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    spans = {name: SPANS[name] for name in ("audio", "video")}
    pairs, mean = by_pair(figure, [(q, k)], spans, keep=visible[:, :, None] & visible[:, None, :])
    for given in (mask, added):
        close(FIGURES[figure][1](q, k, given, modalities=spans, average="none"), pairs)
        assert metric_of(figure, spans, "macro", [(q, k, given)]).item() == pytest.approx(mean, abs=1e-12)


@every_figure
def test_one_token(figure):
    """It has no spread of scores to be drawn to: that pair is NaN, and the mean is of the other."""
    data, spans = queries_and_keys((3,)), {"audio": (0, 6), "video": (6, 7)}
    pairs, _ = by_pair(figure, data, spans)
    assert np.isnan(pairs["audio_to_video"])
    close(metric_of(figure, spans, "none", data), pairs)
    assert metric_of(figure, spans, "macro", data).item() == pytest.approx(pairs["video_to_audio"], abs=1e-12)


@every_figure
def test_scale_and_grouped_keys(figure):
    [(q, k)] = queries_and_keys((3,))
    pairs, _ = by_pair(figure, [(q, k[:, :1].expand(k.shape))], SPANS, scale=0.3)
    close(FIGURES[figure][1](q, k[:, :1], modalities=SPANS, scale=0.3, average="none"), pairs)


@pytest.mark.filterwarnings("ignore:.*``compute`` method.*before the ``update``")
@every_figure
def test_without_a_sample_there_is_no_figure(figure):
    assert FIGURES[figure][0](SPANS).compute().isnan()
    empty = metric_of(figure, SPANS, "none", queries_and_keys((0,)))
    assert all(value.isnan() for value in empty.values())


def test_scores_that_are_not_numbers_do_not_pass_unnoticed():
    [(q, k)] = queries_and_keys((3,))
    q[1, 0, 2] = torch.nan
    assert FIGURES["gap"][1](q, k, modalities=SPANS).isnan()


def test_the_gradient_is_that_of_the_cross_blocks():
    [(q, k)] = queries_and_keys((3,))
    q, k = q.requires_grad_(), k.requires_grad_()
    FIGURES["divergence"][1](q, k, modalities={"audio": (0, 6), "video": (6, 10)}).backward()
    assert q.grad.isfinite().all()
    assert q.grad[:, :, :10].abs().sum() > 0
    assert q.grad[:, :, 10:].abs().sum() == 0
    metric = AttentionDivergence(SPANS)
    metric.update(q, k)
    assert not metric.total.requires_grad


@every_figure
@pytest.mark.parametrize("depth", [1, 2])
def test_captured_calls_of_a_forward(figure, depth):
    """Layer by layer: as q and k of each, given by themselves."""
    model = make_toy(depth=depth).double()
    fusion = find_fusion(model, ["fusion.*.attn"])
    metric, by_hand = (FIGURES[figure][0](MODALITIES).set_dtype(torch.float64) for _ in range(2))
    for size in (2, 5):
        with torch.no_grad(), capture_attention(fusion.watched) as calls:
            model(*(x.double() for x in batches(1, size)[0]))
        metric.update(calls)
        for call in calls:
            assert isinstance(call, FusedCall)
            by_hand.update(*(x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (call.q, call.k)))
    assert metric.compute().item() == pytest.approx(by_hand.compute().item(), abs=1e-12)
    single = FIGURES[figure][1](calls[0], modalities=MODALITIES)
    assert single.item() == pytest.approx(FIGURES[figure][1](iter(calls[:1]), modalities=MODALITIES).item(), abs=0)


@every_figure
def test_modules_by_pair(figure):
    """BridgeTower: cross-attention here, self-attention there; the figures of the engine's own pass."""
    pytest.importorskip("transformers")
    from lightning_abpem import ABPEM

    torch.manual_seed(0)
    family = FAMILIES["BridgeTower"]()
    callback = ABPEM(**family.options, steps=0)
    fusion = find_fusion(family.model, callback.settings.patterns or [])
    with torch.no_grad(), callback.attach(family.model) as adaptation:
        family.model(**family.inputs)
    metric = FIGURES[figure][0](["text", "image"], fusion, average="none")
    with torch.no_grad(), capture_attention(fusion.watched) as calls:
        family.model(**family.inputs)
    metric.update(calls)
    label = {"gap": "attention_gap", "divergence": "divergence"}[figure]
    recorded = {name.split("/")[1]: x.item() for name, x in adaptation.record.items() if name.startswith(f"{label}/")}
    assert len(recorded) == 2
    close(metric.compute(), recorded, 1e-6)


@every_figure
@pytest.mark.parametrize("average", ["macro", "none"])
def test_plots(figure, average):
    pytest.importorskip("matplotlib").use("Agg")
    metric = FIGURES[figure][0](SPANS, average=average)
    metric.update(*queries_and_keys()[0])
    drawn, axes = metric.plot()
    assert axes.has_data()
    __import__("matplotlib.pyplot").pyplot.close(drawn)


def calls_of(*shapes):
    return [FusedCall("fusion.attn", torch.randn(*shape), torch.randn(*shape), 0.5) for shape in shapes]


Q = torch.randn(2, 3, 10, 4)
SEPARATE = find_fusion(make_toy(depth=2), {("a", "b"): ["fusion.0.attn"], ("b", "b"): ["fusion.1.attn"]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionGap({"audio": 10}), "`modalities` to name at least two modalities"),
        (lambda: AttentionGap(["audio", "video"]), r"`modalities` to say how many tokens .* but got \['audio'"),
        (lambda: AttentionGap("auto"), "`modalities` to say how many tokens .* but got 'auto'"),
        (lambda: AttentionGap({"a": lambda x: x, "b": (0, 2)}), "a length or .* for modality 'a', but got <function"),
        (lambda: AttentionGap(MODALITIES, average="micro"), '`average` to be "macro" or "none", but got \'micro\''),  # type: ignore[arg-type]
        (lambda: attention_gap(Q, Q, modalities=MODALITIES, average=None), "`average` .* but got None"),  # type: ignore[arg-type]
        (lambda: attention_gap(Q, modalities=MODALITIES), r"`q` and `k` to be .* got \(2, 3, 10, 4\) and NoneType"),
        (lambda: attention_gap(Q[0], Q[0], modalities=MODALITIES), r"`q` and `k` .* got \(3, 10, 4\) and \(3, 10, 4\)"),
        (lambda: attention_gap(Q, Q[:, :2], modalities=MODALITIES), r"got \(2, 3, 10, 4\) and \(2, 2, 10, 4\)"),
        (
            lambda: attention_gap(Q, Q[:, :, :9], modalities=MODALITIES),
            "one joint sequence, but got 10 query and 9 key",
        ),
        (lambda: attention_gap(Q[:, :, :9], Q[:, :, :9], modalities=MODALITIES), "got 10 .* and 9 tokens"),
        (lambda: attention_gap(Q, Q, torch.ones(5, 10), modalities=MODALITIES), r"`mask` to expand .* got \(5, 10\)"),
        (lambda: attention_gap([], modalities=MODALITIES), r"queries and keys, or the calls .* but got \[\]"),
        (lambda: attention_gap([1], modalities=MODALITIES), r"but got \['int'\]"),  # type: ignore[list-item]
        (lambda: attention_gap(calls_of((2, 10, 4)), Q, modalities=MODALITIES), "captured calls alone"),
        (
            lambda: attention_gap(calls_of((2, 10, 4), (3, 10, 4)), modalities=MODALITIES),
            r"one forward, .* but got 2 calls of \[2, 3\] samples",
        ),
        (
            lambda: attention_gap(calls_of((2, 10, 4)), modalities=["a", "b"], fusion=SEPARATE),
            r"calls of fusion.0.attn, fusion.1.attn, .* but got \['fusion.attn'\]",
        ),
        (lambda: AttentionGap(["a", "c"], SEPARATE), r"`modalities` to hold \['b'\], which `fusion` names"),
    ],
)
def test_errors_name_what_was_seen(make, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        make()


def test_an_attention_is_found_by_its_module():
    model = make_toy()
    with torch.no_grad(), capture_attention([find_attention(model.fusion[0].attn, "attn")]) as calls:
        model(*batches(1)[0])
    assert FIGURES["gap"][1](calls, modalities=MODALITIES).isfinite()
