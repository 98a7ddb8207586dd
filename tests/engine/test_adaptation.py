"""The engine through `attach`: the authors' numbers, restoration, guards, memory, and clear refusals."""

import pickle
from collections import OrderedDict, UserDict
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_abpem import ABPEM
from lightning_abpem.attention.calls import FusedCall
from lightning_abpem.attention.fusion import JointFusion
from lightning_abpem.attention.spans import Tokens
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.method import Method
from tests.golden_runs import Golden, both_runs
from tests.reference import same_state
from tests.toy import (
    AUDIO,
    CLASSES,
    HEADS,
    MODALITIES,
    PAPER,
    SPANS,
    VIDEO,
    WIDTH,
    EagerSplitAttention,
    FusedAttention,
    TorchAttention,
    batches,
    make_toy,
)

ADAM = partial(torch.optim.Adam, lr=1e-2)


class OwnDict(dict):
    """Which torch's trees take for a leaf."""


@dataclass
class Pair:
    audio: torch.Tensor
    video: dict


@dataclass(frozen=True)
class Frozen:
    audio: torch.Tensor
    video: dict


def abpem(**changes):
    options = {"fusion": "fusion.*.attn", "modalities": MODALITIES, "optimizer": ADAM, **PAPER} | changes
    return ABPEM(**options)


def predictions(model, stream, **changes):
    with torch.no_grad(), abpem(**changes).attach(model):
        return [model(*args) for args in stream]


def fingerprint(model):
    """Everything about a model that a run could leave changed."""
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [id(p.grad) for p in model.parameters()],
        "parameters": [id(p) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


def as_on_a_gpu(monkeypatch):
    """Nobody looks at a value before the next batch."""
    for module in ("engine.healthy", "engine.replay", "engine.weights", "modules.tensors"):
        monkeypatch.setattr(f"lightning_abpem.{module}.reading_waits", lambda x: True)


# ------------------------------------------------------------------------------------------------ the authors' numbers


@both_runs
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("replay", "fused", "late"), [(1, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 1)])
def test_golden(name, dtype, bound, replay, fused, late, monkeypatch):
    golden = Golden(name, dtype)
    optimizer = partial(torch.optim.Adam, lr=golden.config["lr"], fused=bool(fused))
    if late:
        as_on_a_gpu(monkeypatch)
    model = golden.model()
    before = []

    def logits(output):
        before.append(output.detach())
        return output

    def check(ours, expected):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=bound)

    with (
        torch.no_grad(),
        golden.abpem(logits=logits, replay=bool(replay), optimizer=optimizer).attach(model) as adaptation,
    ):
        for step, (inputs, _) in enumerate(golden):
            before.clear()
            check(model(*inputs), golden.expected(f"after_{step}"))
            check(before[0], golden.expected(f"before_{step}"))
            record = adaptation.record
            parts = [record["principal_entropy"], record["balance"]]
            parts.append(record["divergence/audio_to_video"] + record["divergence/video_to_audio"])
            check(torch.stack(parts), golden.expected("losses")[step])
        check(model.blocks_u[0].attn.qkv.weight, golden.expected("fusion_qkv_weight"))
        check(model.blocks_u[0].attn.qkv.bias, golden.expected("fusion_qkv_bias"))
    assert same_state(model.state_dict(), golden.model().state_dict())


# ----------------------------------------------------------------------------------------------------- the same result


@pytest.mark.parametrize("memory_batches", [1, 3])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("attention", [FusedAttention, EagerSplitAttention, TorchAttention])
def test_replay_changes_no_bit(memory_batches, steps, attention):
    results = []
    for replay in (True, False):
        model = make_toy(attention())
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        options = {"memory_batches": memory_batches, "steps": steps, "replay": replay}
        results.append(torch.stack(predictions(model, batches(6), **options)))
        assert model.audio.runs == (6 + 2 if replay else 6 * (steps + 1)) + (2 if replay and steps == 2 else 0)
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_gives_the_same(mode):
    expected = predictions(make_toy(), batches())
    model = make_toy()
    with mode(), abpem().attach(model):
        got = [model(*(x.clone() for x in args)) for args in batches()]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert not any(p.is_inference() for p in model.parameters())


def test_inputs_that_carry_gradients():
    expected = predictions(make_toy(), batches(1))
    model = make_toy()
    with abpem().attach(model):
        inputs = [x.requires_grad_() for x in batches(1)[0]]
        got = model(*inputs)
    assert torch.equal(got, expected[0])
    assert all(x.grad is None for x in inputs)


def test_keyword_arguments():
    expected = predictions(make_toy(), batches())
    model = make_toy()
    with torch.no_grad(), abpem(memory_batches=2).attach(model):
        got = [model(video=video, audio=audio) for audio, video in batches()]
    assert torch.equal(got[0], expected[0])


class Stashing(nn.Module):
    """A frozen head that reads what the fusion left behind, with a gradient, and gets no tensor."""

    def __init__(self):
        super().__init__()
        self.toy = make_toy()
        self.toy.fusion.register_forward_hook(lambda module, args, output: setattr(self, "state", output))
        self.reader = nn.Linear(WIDTH, CLASSES)
        self.reader.forward = lambda: nn.functional.linear(self.state.mean(1), self.reader.weight)

    def forward(self, audio, video):
        self.toy(audio, video)
        return self.reader()


class InPlace(nn.Module):
    """A residual added in place to what a frozen linear puts out."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.norm = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.fusion, self.head = nn.Sequential(nn.ModuleDict({"attn": FusedAttention()})), nn.Linear(WIDTH, CLASSES)

    def forward(self, audio, video):
        x = self.proj(self.embed(torch.cat([audio, video], 1)))
        x += self.fusion[0]["attn"](self.norm(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize("make", [Stashing, InPlace])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_replay_changes_nothing_where_state_or_storage_is_shared(make, weight):
    predictions = []
    for replay in (True, False):
        torch.manual_seed(0)
        model = make().eval()
        fusion = "toy.fusion.*.attn" if make is Stashing else "fusion.*.attn"
        with torch.no_grad(), abpem(fusion=fusion, replay=replay, attention_weight=weight).attach(model) as adaptation:
            predictions.append(torch.stack([model(*args) for args in batches()]))
        assert adaptation.updates == len(batches())
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def test_it_is_repeated_adam_on_the_loss():
    """Against the loop one would write by hand: forward, loss, backward, step, forward."""
    model, by_hand = make_toy(), make_toy()
    weights = [by_hand.fusion[0].attn.qkv.weight, by_hand.fusion[0].attn.qkv.bias]
    optimizer = ADAM(weights)
    objective = abpem().settings.method.objective
    tokens = {name: Tokens(span) for name, span in SPANS.items()}

    with torch.no_grad(), abpem().attach(model):
        for args in batches():
            adapted = model(*args)
            with torch.enable_grad():
                x = torch.cat((by_hand.audio(args[0]), by_hand.video(args[1])), dim=1)
                q, k, _ = by_hand.fusion[0].attn.qkv(by_hand.fusion[0].norm(x)).chunk(3, dim=-1)
                call = FusedCall("", q, k, (WIDTH // HEADS) ** -0.5 / HEADS)
                parts = objective(by_hand(*args), JointFusion([], [("", None)]).compare([call], tokens))
                loss = parts.confidence + parts.bootstrapping
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.testing.assert_close(adapted, by_hand(*args), rtol=0, atol=1e-6)


def test_adaptation_lowers_the_loss():
    for attention in (FusedAttention, EagerSplitAttention, TorchAttention):
        model = make_toy(attention())
        with torch.no_grad(), abpem().attach(model) as adaptation:
            losses = [model(*batches(1)[0]) is None or adaptation.record["loss"].item() for _ in range(10)]
        assert losses[-1] < losses[0]


def test_several_fusion_layers():
    model = make_toy(depth=2)
    with torch.no_grad(), abpem(memory_batches=2).attach(model) as adaptation:
        source = [p.clone() for p in adaptation.params.values()]
        for args in batches():
            model(*args)
        assert len(source) == 4
        assert not any(torch.equal(p, s) for p, s in zip(adaptation.params.values(), source, strict=True))


# --------------------------------------------------------------------------------------------------------- restoration


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("memory_batches", [1, 2])
def test_everything_is_put_back(fails, memory_batches):
    model = make_toy()
    model.head[1].weight.requires_grad_(False)
    model.fusion[0].attn.qkv.weight.grad = torch.ones(3 * WIDTH, WIDTH)
    before, state = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with abpem(memory_batches=memory_batches).attach(model):
            for args in batches():
                model(*args)
            assert not same_state(state, model.state_dict())
            if fails:
                model(torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError:
        assert fails
    assert same_state(state, model.state_dict())
    assert fingerprint(model) == before
    assert torch.equal(model.fusion[0].attn.qkv.weight.grad, torch.ones(3 * WIDTH, WIDTH))


def test_adapted_weights_can_be_kept():
    model = make_toy()
    before, state = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    last = predictions(model, batches(), restore=False)[-1]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {"fusion.0.attn.qkv.weight", "fusion.0.attn.qkv.bias"}
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(*batches()[-1]), last)


def test_a_frozen_model_adapts():
    model = make_toy()
    model.requires_grad_(False)
    assert torch.equal(predictions(model, batches())[-1], predictions(make_toy(), batches())[-1])
    assert not any(p.requires_grad for p in model.parameters())


def test_a_failing_optimizer_leaves_nothing():
    model = make_toy()
    before = fingerprint(model)
    with pytest.raises(TypeError), abpem(optimizer=lambda params, missing: None).attach(model):
        pass
    assert fingerprint(model) == before


def test_state_left_by_inference_mode():
    """A cached tensor from an earlier run in inference mode must not break a later one."""
    model = make_toy()
    model.fusion[0].norm = nn.Sequential(Scale()).eval()
    with torch.inference_mode():
        model(*batches(1)[0])
    assert model.fusion[0].norm[0].cache.is_inference()
    assert all(x.isfinite().all() for x in predictions(model, batches()))
    assert model.fusion[0].norm[0].cache.is_inference()


class Scale(nn.Module):
    cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(WIDTH)
        return x * self.cache


# ----------------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("memory_batches", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_is_skipped_and_counted(memory_batches, bad, caplog):
    clean = batches(4)
    poisoned = [*clean[:2], (clean[0][0] * bad, clean[0][1]), *clean[2:]]
    model = make_toy()
    with torch.no_grad(), abpem(memory_batches=memory_batches).attach(model) as adaptation:
        got = [model(*args) for args in poisoned]
        assert (adaptation.updates, adaptation.skipped) == (4, 1)
        assert adaptation.record["updated"] == 1
    assert "not finite" in caplog.text
    expected = predictions(make_toy(), clean, memory_batches=memory_batches)
    assert all(torch.equal(a, b) for a, b in zip([*got[:2], *got[3:]], expected, strict=True))


def test_a_non_finite_gradient_is_skipped():
    """The loss is finite, its gradient is not: the square root at zero, in the head."""
    model = make_toy()
    model.head.register_forward_hook(lambda module, args, output: output + (0 * output).sqrt())
    with torch.no_grad(), abpem().attach(model) as adaptation:
        model(*batches(1)[0])
        assert (adaptation.updates, adaptation.skipped) == (0, 1)
        assert adaptation.record["updated"] == 0
        assert adaptation.record["loss"].isfinite()


@pytest.mark.parametrize("attention", [FusedAttention, EagerSplitAttention, TorchAttention])
def test_a_sample_whose_tokens_are_all_alike_does_not_spoil_the_step(attention):
    """A silent sensor: its scores have no spread, so its divergence would be infinite. The others count."""
    audio, video = batches(1)[0]
    audio[1], video[2] = 1.0, 0.0

    def observed(*args):
        with torch.no_grad(), abpem(steps=0).attach(make_toy(attention())) as adaptation:
            adaptation.model(*args)
        return adaptation.record

    torch.manual_seed(0)
    record = observed(audio, video)
    for pair, others in (("audio_to_video", [0, 1, 3]), ("video_to_audio", [0, 2, 3])):
        torch.manual_seed(0)
        expected = observed(audio[others], video[others])[f"divergence/{pair}"]
        torch.testing.assert_close(record[f"divergence/{pair}"], expected)
    torch.manual_seed(0)
    with torch.no_grad(), abpem().attach(make_toy(attention())) as adaptation:
        adaptation.model(audio, video)
        adaptation.model(torch.ones_like(audio), torch.ones_like(video))
    assert adaptation.updates == 2


# --------------------------------------------------------------------------------------------------- memory and resets


@pytest.mark.parametrize("hides", [False, True])
def test_memory_that_misses_a_bypass(hides):
    """A residual around the remembered module: with a batch of one it broadcasts silently, and is found out."""

    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_toy()

        def forward(self, audio, video):
            x = torch.cat((self.inner.audio(audio), self.inner.video(video)), dim=1)
            logits = self.inner.head((x + self.inner.fusion[0](x)).mean(1))
            return logits.index_fill(1, torch.tensor(4), -torch.inf) if hides else logits

    model = Bypass().eval()
    with pytest.raises(ValueError, match="'inner.fusion.0' to give the same logits again.*memory_at"):
        predictions(model, batches(3, size=1), fusion="inner.fusion.0.attn", memory_batches=2)


def test_memory_needs_a_block():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = FusedAttention()

        def forward(self, x):
            return self.attn(x).mean(1)

    with (
        pytest.raises(ValueError, match="'attn' has no block of its own"),
        abpem(fusion="attn", memory_batches=2).attach(Bare().eval()),
    ):
        pass


def test_memory_at_a_module_that_is_not_called():
    model = make_toy()
    model.unused = nn.Sequential(*model.fusion).eval()
    with pytest.raises(ValueError, match="a module that the target calls, but got 'unused'"):
        predictions(model, batches(1), memory_batches=2, memory_at="unused")


def test_memory_at_a_module_without_the_attention():
    model = make_toy()
    with pytest.raises(ValueError, match="'fusion.0.attn' to attend over stored samples .* it is outside 'audio'"):
        predictions(model, batches(1), memory_batches=2, memory_at="audio")


def test_uneven_batches_in_memory():
    stream = [batches(1, size, seed=size)[0] for size in (4, 1, 3, 2)]
    assert [len(x) for x in predictions(make_toy(), stream, memory_batches=3)] == [4, 1, 3, 2]


def test_episodic_reset():
    stream = batches(3)
    alone = [predictions(make_toy(), [args])[0] for args in stream]
    together = predictions(make_toy(), stream, reset="batch")
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_reset_after_a_number_of_updates():
    stream = batches(5)
    parts = [
        *predictions(make_toy(), stream[:2], memory_batches=2),
        *predictions(make_toy(), stream[2:4], memory_batches=2),
    ]
    whole = predictions(make_toy(), stream, reset=2, memory_batches=2)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=False))


def test_reset_after_a_number_of_samples():
    """Six samples: after batches of 4 and 2, and after one of 7. A step that is not taken counts too."""
    stream = [batches(1, size, seed=size)[0] for size in (4, 2, 7, 1, 1)]
    stream[1][0].fill_(torch.nan)
    parts = [x for part in (stream[:2], stream[2:3], stream[3:]) for x in predictions(make_toy(), part)]
    whole = predictions(make_toy(), stream, reset="6 samples")
    assert all(torch.equal(a, b) or b.isnan().all() for a, b in zip(parts, whole, strict=True))
    assert not torch.equal(whole[-1], predictions(make_toy(), stream)[-1])


def test_observing_moves_nothing():
    model = make_toy()
    with torch.no_grad():
        plain = [model(*args) for args in batches()]
    with torch.no_grad(), abpem(steps=0).attach(model) as adaptation:
        assert all(torch.equal(model(*args), p) for args, p in zip(batches(), plain, strict=True))
        assert adaptation.updates == adaptation.skipped == adaptation.record["updated"] == 0
        assert adaptation.record["entropy"] > 0
        assert "no weight moves" in adaptation.describe()


def test_a_single_sample_is_said_once(caplog):
    predictions(make_toy(), batches(3, size=1))
    assert caplog.text.count("A batch of one sample") == 1


# --------------------------------------------------------------------------------------------------------- the target


def test_target_and_logits():
    expected = predictions(make_toy(), batches())
    outer = nn.Module().eval()
    outer.model = make_toy()
    with torch.no_grad(), abpem(fusion="model.fusion.*.attn", target="model").attach(outer):
        got = [outer.model(*args) for args in batches()]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "blocks_u.*.attn"}, "matches none of its"),
        ({"fusion": "head"}, "'head' to be an attention module"),
        ({"fusion": "fusion"}, "it holds 2"),
        ({"target": "modle"}, "`target` to name a module of Toy, but got 'modle'. Its children: audio"),
        ({"memory_batches": 2, "memory_at": "blok"}, "`memory_at` to name a module of Toy, but got 'blok'"),
        ({"reset": "dataloader"}, "needs a Trainer"),
    ],
)
def test_what_does_not_fit_the_model(changes, message):
    model = make_toy(depth=2)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message), abpem(**changes).attach(model):
        pass
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"audio": AUDIO, "video": VIDEO + 1}}, "but got 11 .* and 10 tokens"),
        ({"modalities": {"audio": AUDIO - 1, "video": VIDEO}}, "but got 9 .* and 10 tokens"),
        ({"k": CLASSES + 1}, f"got {CLASSES + 1} and logits of {CLASSES} classes"),
        ({"logits": lambda output: output.mean(1)}, "shape"),
        ({"fusion": "unused"}, "attention calls inside unused.*Seen elsewhere: fusion.0.attn .10 query and 10 key"),
    ],
)
def test_what_shows_at_the_first_batch(changes, message):
    model = make_toy()
    model.unused = FusedAttention().eval()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, fingerprint(model)
    with pytest.raises(ValueError, match=message), abpem(**changes).attach(model):
        try:
            model(*batches(1)[0])
        finally:
            assert same_state(state, model.state_dict())
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_batches": 0}, "`memory_batches` to be an integer >= 1, but got 0"),
        ({"steps": -1}, "`steps` to be an integer >= 0, but got -1"),
        ({"reset": "sometimes"}, "`reset` to be .*'sometimes'"),
        ({"reset": 0}, "`reset` to be .*0"),
        ({"reset": True}, "`reset` to be .*True"),
        ({"reset": "batch", "memory_batches": 2}, "`memory_batches` to be 1"),
        ({"optimizer": "adam"}, "`optimizer` to be a function .*'adam'"),
        ({"k": 0}, "`k`"),
        ({"attention_weight": -1.0}, "`attention_weight`"),
        ({"modalities": {"audio": 3}}, "two modalities"),
        ({"stages": ("fit",)}, "`stages` to hold some of"),
        ({"stages": "test"}, "`stages` to hold some of"),
    ],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        abpem(**changes)


def test_training_mode_with_dropout():
    model = make_toy()
    model.head.insert(0, nn.Dropout(0.1).train())
    with pytest.raises(ValueError, match=r"eval mode, but 1 of its modules .*: head.0. Call model.eval\(\)"):
        predictions(model, batches(1))
    assert torch.equal(predictions(model.eval(), batches(1))[0], predictions(make_toy(), batches(1))[0])


def test_tied_parameters_are_named():
    model = make_toy()
    model.audio.tied = model.fusion[0].attn.qkv
    with torch.no_grad(), abpem().attach(model) as adaptation:
        assert "audio.tied.weight is the same tensor, so it moves as well" in adaptation.describe()
        model(*batches(1)[0])
        assert adaptation.updates == 1


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = make_toy()
    with pytest.raises(ValueError, match="made inside torch.inference_mode"), abpem().attach(model):
        pass


# --------------------------------------------------------------------------------------- what a review brought to light


class Mutating(nn.Module):
    """Edits its inputs in place, and takes them out of their dict."""

    def __init__(self):
        super().__init__()
        self.inner = make_toy()

    def forward(self, batch):
        audio = batch.pop("audio")
        audio -= 1
        return self.inner(audio, batch["video"])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_forward_that_edits_its_inputs(steps):
    shifted = [(audio - 1, video) for audio, video in batches()]
    expected = predictions(make_toy(), shifted, steps=steps)
    model = Mutating().eval()
    with torch.no_grad(), abpem(fusion="inner.fusion.*.attn", steps=steps).attach(model):
        for (audio, video), logits in zip(batches(), expected, strict=True):
            batch = {"audio": audio.clone(), "video": video}
            assert torch.equal(model(batch), logits)
            assert set(batch) == {"video"}


def test_spans_are_held_against_every_batch():
    model = make_toy()
    good, (audio, video) = batches(2)
    with pytest.raises(ValueError, match="but got 10 .* and 12 tokens"):
        predictions(model, [good, (audio, torch.cat((video, video[:, :2]), dim=1))], on_error="raise")


def test_attention_that_is_not_batch_first_is_refused():
    class Folded(FusedAttention):
        """Heads folded into the batch, of q, k and v that are changed after their projection."""

        def forward(self, x):
            parts = self.qkv(x).tanh().chunk(3, -1)
            q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2).flatten(0, 1) for part in parts)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2))

    with pytest.raises(ValueError, match="'fusion.0.attn' to attend with 4 samples, .* got 12"):
        predictions(make_toy(Folded()), batches(1))


def test_shared_projections_are_stepped_once():
    model = make_toy(depth=2)
    model.fusion[1].attn.qkv = model.fusion[0].attn.qkv
    with torch.no_grad(), abpem(optimizer=partial(torch.optim.Adam, lr=1e-3)).attach(model) as adaptation:
        before = model.fusion[0].attn.qkv.weight.clone()
        model(*batches(1)[0])
        assert (model.fusion[0].attn.qkv.weight - before).abs().max() == pytest.approx(1e-3, rel=1e-2)
        assert set(adaptation.params) == {"fusion.0.attn.qkv.weight", "fusion.0.attn.qkv.bias"}
        assert "fusion.1.attn.qkv.weight is the same tensor" in adaptation.describe()


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_no_stale_casts_in_a_surrounding_autocast(reset):
    def run(around):
        model, logits = make_toy(), []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
            with abpem(reset=reset, optimizer=partial(torch.optim.SGD, lr=0.5)).attach(model):
                for args in batches():
                    with torch.autocast("cpu", torch.bfloat16):
                        logits.append(model(*args))
            with torch.autocast("cpu", torch.bfloat16):
                logits.append(model(*batches(1)[0]))
        return torch.stack(logits)

    assert torch.equal(run(True), run(False))


def test_gradients_of_the_caller_stay_apart():
    expected = predictions(make_toy(), batches())
    model = make_toy()
    outside = nn.Linear(5, 5)
    model.extra = [outside]
    with abpem(logits=lambda output: output + 0 * model.extra[0](output)).attach(model):
        for args, logits in zip(batches(), expected, strict=True):
            output = model(*args)
            torch.testing.assert_close(output, logits)
            (100 * output.sum()).backward()
    assert outside.weight.grad is None


def test_every_matched_attention_must_be_called():
    model = make_toy(depth=2)
    model.unused = FusedAttention().eval()
    with pytest.raises(ValueError, match="attention calls inside unused, but .* Seen elsewhere: fusion.0.attn"):
        predictions(model, batches(1), fusion=["fusion.*.attn", "unused"])


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(3, 3, 2, dropout=0.5), lambda: nn.LayerNorm(3), lambda: nn.Dropout(0.1)]
)
def test_any_module_in_training_mode_is_refused(make):
    model = make_toy()
    model.more = make().train()
    with pytest.raises(ValueError, match=r"eval mode, but 1 of its modules .*: more. Call model.eval\(\)"):
        predictions(model, batches(1))


def test_attaching_twice():
    model = make_toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="being adapted already"), abpem().attach(model), abpem().attach(model):
        pass
    assert fingerprint(model) == before


def test_memory_failures_name_the_memory():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_toy()

        def forward(self, audio, video, labels):
            logits = self.inner(audio, video)
            return nn.functional.cross_entropy(logits, labels), logits

    model = WithLoss().eval()
    labelled = [(*args, torch.zeros(4, dtype=torch.long)) for args in batches(2)]
    options = {"fusion": "inner.fusion.*.attn", "logits": lambda output: output[1]}
    assert len(predictions(model, labelled, **options)) == 2
    with pytest.raises(ValueError, match="Expected input batch_size") as caught:
        predictions(model, labelled, memory_batches=2, **options)
    notes = getattr(caught.value, "__notes__", None)  # Python 3.10 has none and logs it
    assert notes is None or "4 stored samples in front of the batch at 'inner.fusion.0'" in notes[0]


def test_a_forward_without_gradients():
    model = make_toy()
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(ValueError, match="the scores of 'fusion.0.attn' to carry gradients .* torch.no_grad"):
        predictions(model, batches(1))
    assert len(predictions(model, batches(1), steps=0)) == 1


def test_gradients_that_pass_the_parameters_by():
    """The logits have a graph, but it leads elsewhere."""
    model = make_toy()
    model.head.register_forward_hook(lambda module, args, output: output.detach() + torch.zeros(1, requires_grad=True))
    with pytest.raises(ValueError, match="no gradient reaches fusion.0.attn.qkv.weight"):
        predictions(model, batches(1), attention_weight=0.0)


@pytest.mark.parametrize("memory_batches", [1, 2])
def test_an_empty_batch_is_left_alone(memory_batches):
    model = make_toy()
    first, second = batches(2)
    empty = tuple(x[:0] for x in first)
    got = predictions(model, [first, empty, second], memory_batches=memory_batches)
    expected = predictions(make_toy(), [first, second], memory_batches=memory_batches)
    assert got[1].shape == (0, CLASSES)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[1])


@pytest.mark.parametrize("factory", [lambda params: None, torch.optim.LBFGS])
def test_a_factory_of_something_else(factory):
    with pytest.raises(ValueError, match="`optimizer` to make a torch optimizer that steps without a closure"):
        predictions(make_toy(), batches(1), optimizer=factory)


def test_attaching_to_a_part_of_what_adapts():
    outer = nn.Module().eval()
    outer.model = make_toy()
    first = abpem(fusion="model.fusion.*.attn", target="model")
    with pytest.raises(ValueError, match="being adapted already"), first.attach(outer), abpem().attach(outer.model):
        pass
    assert len(predictions(outer.model, batches(1))) == 1


def test_nothing_was_called():
    model = make_toy()
    with pytest.warns(UserWarning, match="nothing was adapted"), abpem().attach(model):
        model.head(torch.zeros(1, WIDTH))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_move_by_way_of_float32(dtype):
    """Adam at 1e-4 moves no bfloat16 weight of 1 by itself, and makes float16 ones non-finite."""
    model = make_toy().to(dtype)
    source = {name: p.clone() for name, p in model.named_parameters()}
    stream = [tuple(x.to(dtype) for x in args) for args in batches(12)]
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    with torch.no_grad(), abpem(optimizer=optimizer).attach(model) as adaptation:
        logits = [model(*args) for args in stream]
        assert (adaptation.updates, adaptation.skipped) == (12, 0)
        moved = (model.fusion[0].attn.qkv.weight - source["fusion.0.attn.qkv.weight"]).abs()
        assert moved.max() > 5e-3
        assert moved.ne(0).float().mean() > 0.9
    assert all(x.isfinite().all() for x in logits)
    assert same_state(source, dict(model.named_parameters()))


def test_a_step_that_ruins_the_weights_is_taken_back():
    class Ruin(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if Ruin.countdown == 0:
                self.param_groups[0]["params"][0].data.fill_(float("inf"))
            Ruin.countdown -= 1

    Ruin.countdown = 2
    stream, model = batches(5), make_toy()
    with torch.no_grad(), abpem(optimizer=partial(Ruin, lr=0.1)).attach(model) as adaptation:
        got = [model(*args) for args in stream]
        assert (adaptation.updates, adaptation.skipped) == (4, 1)
    sgd = partial(torch.optim.SGD, lr=0.1)
    expected = predictions(make_toy(), [*stream[:2], *stream[3:]], optimizer=sgd)
    assert all(torch.equal(a, b) for a, b in zip([*got[:2], *got[3:]], expected, strict=True))


def test_a_part_without_weight_cannot_spoil_the_loss():
    """Tokens all alike: no divergence exists, but none is asked for."""
    alike = torch.ones(2, AUDIO, 3), torch.ones(2, VIDEO, 3)
    model = make_toy()
    with torch.no_grad(), abpem(attention_weight=0.0).attach(model) as adaptation:
        model(*alike)
        assert adaptation.updates == 1


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values that are read there, and comparisons that answer there."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_random_state = args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.uint8  # of the host
        if func.name().partition("::")[2].partition(".")[0] in WAITING and not is_random_state:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def tokens_of(first):
    """A mask that the batch's own arguments give: the tokens of the first modality, or of the second."""
    return lambda audio, video: (torch.arange(AUDIO + VIDEO) < AUDIO).expand(len(audio), -1) == first


MASKS = {"audio": tokens_of(True), "video": tokens_of(False)}
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select"}


@pytest.mark.parametrize("options", [{}, PAPER, {"memory_batches": 3}, {"modalities": MASKS}])
def test_no_step_waits_for_the_device(monkeypatch, options):
    """As on a GPU, where comparisons are not looked at in the batch itself; the first batches are audited."""
    as_on_a_gpu(monkeypatch)
    model = make_toy()
    abpem = ABPEM("fusion.*.attn", **({"modalities": MODALITIES} | options))
    with torch.no_grad(), abpem.attach(model) as adaptation:
        reads = Reads()
        for i, args in enumerate(batches(8)):
            with reads if i >= 5 else nullcontext():
                model(*args)
        assert reads.seen == []
        assert adaptation.updates == 8


class Twice(type(make_toy())):
    """Its forward calls itself on the sequence turned around."""

    def forward(self, audio, video, turned=False):
        logits = super().forward(audio, video)
        if turned:
            return logits
        self.interrupt()
        return (logits + self(audio.flip(1), video, turned=True)) / 2

    def interrupt(self):
        """Nothing."""


@pytest.mark.parametrize("options", [{}, {"memory_batches": 3}, {"predicts": "before"}, {"reset": "batch"}])
def test_a_forward_that_calls_itself_is_one_call(options):
    model = make_toy()
    model.__class__ = Twice
    outputs = []
    with torch.no_grad(), abpem(**options).attach(model) as adaptation:
        for args in batches(4):
            outputs.append(model(*args))
            if options.get("predicts") != "before":  # both views by the weights of now
                audio, video = args
                views = [Twice.__mro__[1].forward(model, view, video) for view in (audio, audio.flip(1))]
                torch.testing.assert_close(outputs[-1], sum(views) / 2)
        assert adaptation.calls == adaptation.updates == 4


def test_a_call_that_was_interrupted_is_over():
    model = make_toy()
    model.__class__ = Twice
    with torch.no_grad(), abpem().attach(model) as adaptation:
        calls = []
        for i, args in enumerate(batches(4)):

            def interrupt(i=i):
                calls.append(i)
                if calls.count(1) == 2:  # in the second batch's prediction
                    calls.append(None)
                    raise KeyboardInterrupt

            model.interrupt = interrupt
            try:
                model(*args)
            except KeyboardInterrupt:
                calls.append(1)
        assert adaptation.calls == adaptation.updates == 4


def test_observing_is_of_each_batch_by_itself():
    """Also where the loss looks back along the stream."""
    stream = batches(3)
    alone = []
    with torch.no_grad():
        for args in stream:
            with abpem(steps=0, balance="stream").attach(make_toy()) as adaptation:
                adaptation.model(*args)
                alone.append(dict(adaptation.record))
        model = make_toy()
        with abpem(steps=0, balance="stream").attach(model) as adaptation:
            for args, own in zip(stream, alone, strict=True):
                model(*args)
                assert same_state(adaptation.record, own)


class Streaming(type(make_toy())):
    """Its video is mixed with a hidden state, which every call moves."""

    def __init__(self, way):
        super().__init__()
        self.load_state_dict(make_toy().state_dict())
        self.way, self.hidden = way, torch.zeros(1, VIDEO, 3)
        if way == "buffer":
            del self.hidden
            self.register_buffer("hidden", torch.zeros(1, VIDEO, 3))

    def forward(self, audio, video):
        hidden = 0.5 * self.hidden + video.mean(0, keepdim=True)
        if self.way == "in place":
            self.hidden.copy_(hidden)
        else:
            self.hidden = hidden
        return super().forward(audio, video + hidden)


@pytest.mark.parametrize("way", ["buffer", "attribute", "in place"])
def test_state_that_a_forward_carries_moves_once_for_a_batch(way):
    expected, model = Streaming(way).eval(), Streaming(way).eval()
    with torch.no_grad():
        plain = [expected(*args) for args in batches(4)]
        with abpem(steps=0).attach(model):
            outputs = [model(*args) for args in batches(4)]
        assert all(map(torch.equal, outputs, plain))
        assert torch.equal(model.hidden, expected.hidden)
        moved = Streaming(way).eval()
        with abpem(steps=2).attach(moved) as adaptation:
            for args in batches(4):
                moved(*args)
        assert adaptation.updates == 8
        assert torch.equal(moved.hidden, expected.hidden)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("kind", [UserDict, OwnDict, Pair, Frozen])
def test_a_forward_that_edits_other_containers(kind, inference_mode):
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_toy()

        def forward(self, batch):
            if is_dataclass(batch):
                audio, video = batch.audio, batch.video["tokens"]
            else:
                audio, video = batch.pop("audio"), batch["video"]["tokens"]
            audio -= 1
            return self.inner(audio, video)

    expected = predictions(make_toy(), [(audio - 1, video) for audio, video in batches()])
    model = Taking().eval()
    with torch.inference_mode(inference_mode), torch.no_grad(), abpem(fusion="inner.fusion.*.attn").attach(model):
        for (audio, video), logits in zip(batches(), expected, strict=True):
            batch = kind(audio=audio.clone(), video={"tokens": video.clone()})
            assert torch.equal(model(batch), logits)
            assert is_dataclass(batch) or set(batch) == {"video"}


class Wrong(Method):
    name = "Wrong"

    def __init__(self, collected, made):
        self.collected, self.made = collected, made

    def collect(self, model, fusion):
        return super().collect(model, fusion) if self.collected is None else self.collected

    def loss(self, step):
        return self.made(step.logits.square().mean())


@pytest.mark.parametrize(
    ("collected", "made", "message"),
    [
        ([], None, "Expected `collect` of Wrong to give parameters by their names, but got a list"),
        (None, lambda loss: loss, "Expected Wrong to give a pair, .* but got Tensor"),
        (None, lambda loss: (loss, {"loss": 0.5}), "a dict of tensors to record, but got {'loss': 0.5}"),
        (None, lambda loss: (loss, {}), r"Expected Wrong to record its `loss`, but got \[\]"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_what_a_method_of_ones_own_may_get_wrong(collected, made, message, steps):
    callback = TestTimeAdaptation(Wrong(collected, made), "fusion.*.attn", steps=steps)
    model = make_toy()
    with pytest.raises(ValueError, match=message), callback.attach(model), torch.no_grad():
        model(*batches(1)[0])


def test_a_method_with_a_loss_moves_something():
    callback = TestTimeAdaptation(Wrong({}, lambda loss: (loss, {"loss": loss.detach()})), "fusion.*.attn")
    model = make_toy()
    message = "Expected `collect` to give the parameters that move, .* but got none"
    with pytest.raises(ValueError, match=message), callback.attach(model), torch.no_grad():
        model(*batches(1)[0])


def test_a_method_is_an_instance_with_a_name():
    for method in (Wrong, Method(), "tent"):
        with pytest.raises(ValueError, match="Expected `method` to be an instance of a Method with a `name`"):
            TestTimeAdaptation(method, "fusion.*.attn")


@pytest.mark.parametrize("copy", [deepcopy, pickle.dumps])
@pytest.mark.parametrize("target", [None, "inner"])
def test_a_model_is_not_copied_while_it_adapts(copy, target):
    model = nn.Sequential(OrderedDict(inner=make_toy())).eval()
    model.forward = model.inner.forward
    with abpem(fusion="inner.fusion.*.attn", target=target).attach(model) as adaptation:
        model.inner(*batches(1)[0]) if target else model(*batches(1)[0])
        with pytest.raises(TypeError, match="A model cannot be copied or pickled while it adapts"):
            copy(model)
        assert adaptation.updates == 1
