"""The engine through `attach`: the authors' numbers, the same result in any way, restoration."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem.attention.calls import FusedCall
from lightning_abpem.attention.fusion import JointFusion
from lightning_abpem.attention.spans import Tokens
from tests.covering import covering
from tests.engine.attached import ADAM, abpem, as_on_a_gpu, fingerprint, predictions
from tests.golden_runs import BOUNDS, RUNS, Golden
from tests.reference import same_state
from tests.toy import (
    HEADS,
    SPANS,
    WIDTH,
    EagerSplitAttention,
    FusedAttention,
    TorchAttention,
    batches,
    make_toy,
)

# ------------------------------------------------------------------------------------------------ the authors' numbers


@pytest.mark.parametrize(
    ("name", "dtype", "how"), covering(RUNS, list(BOUNDS), [(1, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 1)])
)
def test_golden(name, dtype, how, monkeypatch):
    golden, bound, (replay, fused, late) = Golden(name, dtype), BOUNDS[dtype], how
    optimizer = partial(torch.optim.Adam, lr=golden.config["lr"], fused=bool(fused))
    if late:
        as_on_a_gpu(monkeypatch)
    model: Any = golden.model()
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
        for step in range(len(golden)):
            inputs, _ = golden[step]
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


# --------------------------------------------------------------------------------------------------------- the target


def test_target_and_logits():
    expected = predictions(make_toy(), batches())
    outer = nn.Module().eval()
    outer.model = make_toy()
    with torch.no_grad(), abpem(fusion="model.fusion.*.attn", target="model").attach(outer):
        got = [outer.model(*args) for args in batches()]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
