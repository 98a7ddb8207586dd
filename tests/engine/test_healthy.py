"""Samples whose logits are not finite: the step is that of the others, held against a twin that never saw them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.methods import EATA, MMTTA, READ, SAR, Source, SuMi, Tent
from tests.ranks import in_two_processes
from tests.toy import (
    AUDIO,
    HEADS,
    MODALITIES,
    PAPER,
    SPANS,
    VIDEO,
    Block,
    FusedAttention,
    Toy,
    batches,
    listed,
    loader,
    make_toy,
)

RATE, SIZE = 0.5, 8
SGD = partial(torch.optim.SGD, lr=RATE)
BROKEN = {1: [2], 2: [0, 7], 4: [5]}  # by batch, which samples
SPLIT = 5  # of a batch, the samples of the first of two processes
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


def stream(count=6):
    return [tuple(x.double() for x in batch) for batch in batches(count, SIZE)]


def spoiled(own, broken=BROKEN):
    """Break samples: a NaN in one modality, infinities in the other."""
    own = [tuple(x.clone() for x in batch) for batch in own]
    for i, rows in broken.items():
        own[i][i % 2][rows, 1] = torch.nan if i % 2 else torch.inf
    return own


def healthy(i, x, broken=BROKEN):
    return x[[row for row in range(SIZE) if row not in broken.get(i, ())]]


class Twin:
    """The published steps on a toy, written out, in float64: no engine, no capture, one attention map per head."""

    def __init__(self, memory=1):
        self.model, self.memory, self.past = make_toy().double(), memory, []
        self.params = list(self.model.fusion[0].attn.qkv.parameters())

    def adapt(self, audio, video, rows=None):
        """Take a step; past batches have so many rows in it, if another process has no part in it."""
        with torch.no_grad():
            self.past.append(torch.cat((self.model.audio(audio), self.model.video(video)), 1))
        past = self.past if rows is None else [x[:n] for x, n in zip(self.past, rows, strict=False)]
        loss = self.loss(torch.cat(past[-self.memory :]))
        for p, gradient in zip(self.params, torch.autograd.grad(loss, self.params), strict=True):
            p.data -= RATE * gradient
        with torch.no_grad():
            return self.model(audio, video)

    def loss(self, tokens):
        p = self.model.head(self.model.fusion(tokens).mean(1)).softmax(1)
        kept = p.sort(1, descending=True).values[:, : PAPER["k"]]
        mean = p.mean(0)
        return -(kept * (kept + 1e-6).log()).sum(1).mean() + (mean * mean.log()).sum() + self.bootstrapping(tokens)

    def bootstrapping(self, tokens):
        block = self.model.fusion[0]
        q, k, _ = (x.unflatten(2, (HEADS, -1)) for x in block.attn.qkv(block.norm(tokens)).chunk(3, 2))
        scores = sum(q[:, :, h] @ k[:, :, h].mT for h in range(HEADS)) / q.shape[3] ** 0.5 / HEADS
        total = 0
        for m, n in (("audio", "video"), ("video", "audio")):
            cross, own = scores[:, SPANS[m], SPANS[n]].flatten(1), scores[:, SPANS[n], SPANS[n]].flatten(1).detach()
            a, s, b, t = cross.mean(1), cross.std(1), own.mean(1), own.std(1)
            total = total + ((t / s).log() + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5).mean()
        return total


def published(**options):
    return ABPEM("fusion.*.attn", MODALITIES, optimizer=SGD, **{**PAPER, **options})


def twins_run(memory, broken=BROKEN, away=None):
    twin, logits = Twin(memory), []
    of_first = [sum(row not in broken.get(i, ()) for row in range(SPLIT)) for i in range(6)]
    for i, batch in enumerate(stream()):
        audio, video = (healthy(i, x, broken) for x in batch)
        logits.append(twin.adapt(audio, video, rows=of_first if i == away else None))
    return logits, twin.params


def check_weights(params, expected):
    assert (expected[0] - make_toy().double().fusion[0].attn.qkv.weight).abs().max() > 1e-3
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p, value.detach(), **CLOSE)


@pytest.mark.parametrize("memory", [1, 4])
def test_the_step_is_that_of_the_healthy_samples(memory, caplog):
    expected, params = twins_run(memory)
    model, callback = make_toy().double(), published(memory_batches=memory)
    with torch.no_grad(), callback.attach(model) as adaptation:
        for i, batch in enumerate(spoiled(stream())):
            logits = model(*batch)
            torch.testing.assert_close(healthy(i, logits), expected[i], **CLOSE)
            plain = make_toy().double()
            plain.load_state_dict(model.state_dict())
            torch.testing.assert_close(logits, plain(*batch), rtol=0, atol=0, equal_nan=True)
            assert logits[BROKEN.get(i, [])].isnan().all()
        check_weights([p.detach() for p in adaptation.params.values()], params)
        assert (adaptation.updates, adaptation.skipped_for, adaptation.left_out) == (6, {}, 4)
    stored = callback.state_dict()["memory"]
    assert [len(next(iter(batch["tensors"].values()))) for batch in stored] == [8, 7, 8][: memory - 1]
    assert all(x.isfinite().all() for batch in stored for x in batch["tensors"].values())
    assert callback.left_out == 4
    assert caplog.text.count("are left out of its step") == 1


def test_in_a_trainer(tmp_path):
    expected, params = twins_run(4)
    model, callback = make_toy().double(), published(memory_batches=4, restore=False)
    own = [(*batch, torch.zeros(SIZE, dtype=torch.long)) for batch in spoiled(stream())]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.test(model, listed(own), verbose=False)
    for i, logits in enumerate(model.seen):
        torch.testing.assert_close(healthy(i, logits), expected[i], **CLOSE)
    check_weights([p.detach() for p in model.fusion[0].attn.qkv.parameters()], params)
    assert (callback.updates, callback.skipped, callback.left_out) == (6, 0, 4)
    assert callback.averages[0]["updated"] == 1
    assert "left out of steps: 4 samples" in list(callback.summary._notes())


ALSO_ALL = {**BROKEN, 3: [5, 6, 7]}  # all of the second process's


def halves(rank, memory):
    own = [tuple(x[SPLIT:] if rank else x[:SPLIT] for x in batch) for batch in spoiled(stream(), ALSO_ALL)]
    model, callback = make_toy().double(), published(memory_batches=memory)
    with torch.no_grad(), callback.attach(model) as adaptation:
        logits = [model(*batch) for batch in own]
        params = [p.detach().clone() for p in adaptation.params.values()]
    return logits, params, (callback.updates, callback.skipped, callback.left_out)


@pytest.mark.parametrize("memory", [1, 4])
def test_in_two_processes(memory):
    expected, params = twins_run(memory, ALSO_ALL, away=3)
    results = in_two_processes(halves, memory)
    assert not any(isinstance(result, Exception) for result in results), results
    for _, own, counts in results:
        check_weights(own, params)
        assert counts == (6, 0, 7)
    for i, parts in enumerate(zip(*(logits for logits, _, _ in results), strict=True)):
        torch.testing.assert_close(healthy(i, torch.cat(parts), ALSO_ALL), expected[i], **CLOSE)


class Pooled(Block):
    def forward(self, x, keep):
        return (super().forward(x) * keep.unsqueeze(2)).sum(1) / keep.sum(1, keepdim=True)


class Masked(Toy):
    """Takes both modalities in a dict, and a padding mask of the joint sequence."""

    def __init__(self):
        super().__init__()
        self.fusion = torch.nn.ModuleList([Pooled(FusedAttention())])

    def forward(self, clip, *, keep):
        tokens = torch.cat((self.audio(clip["audio"]), self.video(clip["video"])), 1)
        return {"logits": self.head(self.fusion[0](tokens, keep))}


MASKS = {
    "audio": lambda clip, keep: keep & (torch.arange(AUDIO + VIDEO) < AUDIO),
    "video": lambda clip, keep: keep & (torch.arange(AUDIO + VIDEO) >= AUDIO),
}


@pytest.mark.parametrize("memory", [1, 3])
def test_arguments_in_containers_and_masks_that_they_make(memory):
    def run(own):
        torch.manual_seed(0)
        model = Masked().double().eval()
        callback = ABPEM("fusion.*.attn", MASKS, optimizer=SGD, memory_batches=memory, monitor="source", **PAPER)
        records = []
        with torch.no_grad(), callback.attach(model) as adaptation:
            adaptation.on_step = lambda record, samples: records.append({**record, "samples": torch.tensor(samples)})
            logits = [model({"audio": a, "video": v}, keep=keep)["logits"] for a, v, keep in own]
        return logits, records, (callback.updates, callback.skipped)

    keep = torch.rand(SIZE, AUDIO + VIDEO, generator=torch.Generator().manual_seed(0)) < 0.8
    got = run([(*batch, keep) for batch in spoiled(stream())])
    expected = run([tuple(healthy(i, x) for x in (*batch, keep)) for i, batch in enumerate(stream())])
    assert got[2] == expected[2] == (6, 0)
    for i, (own, value) in enumerate(zip(got[0], expected[0], strict=True)):
        torch.testing.assert_close(healthy(i, own), value, **CLOSE)
    for own, record in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(own, record, **CLOSE)


INPUTS = {"audio": 0, "video": 1}
OTHERS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "tent": Tent,
    "eata": partial(EATA, redundancy=1.0, entropy_margin=1.0),
    "sar": partial(SAR, entropy_margin=1.0),
    "read": partial(READ, "fusion.*.attn"),
    "mmtta": partial(MMTTA, INPUTS),
    "two steps": partial(ABPEM, "fusion.*.attn", MODALITIES, steps=2),
    "before": partial(ABPEM, "fusion.*.attn", MODALITIES, predicts="before"),
}


def adapted(callback, own, model=None):
    model = make_toy().double() if model is None else model
    with torch.no_grad(), callback.attach(model) as adaptation:
        logits = [model(*batch) for batch in own]
        values = {name: p.detach().clone() for name, p in adaptation.params.items()}
    return logits, values, callback


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods(name):
    whole = stream(3)
    logits, values, callback = adapted(OTHERS[name](optimizer=SGD), spoiled(whole, {1: [2]}))
    without = [tuple(healthy(i, x, {1: [2]}) for x in batch) for i, batch in enumerate(whole)]
    expected, weights, twin = adapted(OTHERS[name](optimizer=SGD), without)
    assert callback.left_out == 1
    assert (callback.updates, callback.skipped) == (twin.updates, twin.skipped)
    assert callback.updates >= 3
    for i, own in enumerate(logits):
        torch.testing.assert_close(healthy(i, own, {1: [2]}), expected[i], **CLOSE)
    for parameter, value in weights.items():
        torch.testing.assert_close(values[parameter], value, **CLOSE)


class Mixing(Toy):
    """Every sample sees the batch's mean, of what is finite."""

    def forward(self, audio, video):
        tokens = torch.cat((self.audio(audio), self.video(video)), 1)
        return self.head((self.fusion(tokens) + tokens.nan_to_num().mean(0)).mean(1))


class Opaque(Toy):
    """Takes objects of a class that holds the tensors, which nothing can replace."""

    def forward(self, clip):
        return super().forward(clip.audio, clip.video)


class Clip:
    def __init__(self, audio, video):
        self.audio, self.video = audio, video


def mixing():
    return published(), Mixing().double().eval(), spoiled(stream(3), {1: [2]})


def opaque():
    return published(), Opaque().double().eval(), [(Clip(*batch),) for batch in spoiled(stream(3), {1: [2]})]


def nobody_is_healthy():
    return published(memory_batches=2), None, spoiled(stream(3), {1: list(range(SIZE))})


def outputs_are_watched():
    sumi = SuMi(INPUTS, {"audio": "audio", "video": "video"}, fused_margin=1.0, unimodal_margin=0.0, optimizer=SGD)
    return sumi, None, spoiled(stream(3), {1: [2]})


@pytest.mark.parametrize("case", [mixing, opaque, nobody_is_healthy, outputs_are_watched])
def test_a_step_that_needs_all_samples_is_skipped(case, caplog):
    callback, model, own = case()
    logits, values, _ = adapted(callback, own, model)
    assert (callback.updates, callback.skipped_for, callback.left_out) == (2, {"not finite": 1}, 0)
    assert all(value.isfinite().all() for value in values.values())
    assert logits[1].isnan().any()
    assert "are left out of its step" not in caplog.text


def test_where_looking_waits_the_first_such_step_is_skipped(monkeypatch):
    monkeypatch.setattr("lightning_abpem.engine.healthy.reading_waits", lambda x: True)
    *_, callback = adapted(published(), spoiled(stream(5), {1: [2], 3: [0, 5]}))
    assert (callback.updates, callback.skipped_for, callback.left_out) == (4, {"not finite": 1}, 2)


def test_the_source_alone_records_the_healthy_samples():
    *_, callback = adapted(Source(), spoiled(stream(2), {1: [2]}))
    assert callback.record["entropy"].isfinite()
    assert (callback.skipped, callback.left_out) == (0, 1)


def test_the_count_goes_with_the_state_and_samples_count_for_a_reset():
    *_, callback = adapted(published(reset="17 samples"), spoiled(stream(3), {1: [2]}))
    state = callback.state_dict()
    assert state["left_out"] == 1
    assert state["samples"] == 3 * SIZE  # the reset is due at the next batch
    again = published()
    again.load_state_dict(state)
    adapted(again, spoiled(stream(2), {1: [2]}))
    assert again.left_out == 2


def test_a_broken_loader_in_a_trainer_costs_no_result(tmp_path):
    """The user's own figure of such a batch is NaN, as without the callback; the averages of the callback are not."""
    whole = list(loader(3, SIZE))
    whole[1][0][3] = torch.nan
    callback = published()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.predict(make_toy(), listed(whole))
    assert all(value.isfinite() for value in callback.averages[0].values())
    assert callback.left_out == 1
