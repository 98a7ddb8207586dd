"""Replaying the frozen part: the same bits with fewer runs, and recomputing wherever that might not hold."""

import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput

from lightning_abpem.engine.replay import FrozenReplay
from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.state import Snapshot
from tests.toy import WIDTH, Encoder, batches, make_toy


def passes(model, replay, *args, count=2):
    """Outputs of `count` passes over one batch: those of the engine, which leave no trace, and the prediction."""
    outputs = []
    for _ in range(count - 1):
        replay.start_pass()
        snapshot = Snapshot(model, args)
        outputs.append(model(*snapshot.args))
        replay.forget(snapshot.restore(), snapshot.drew)
    replay.start_pass()
    outputs.append(model(*args))
    replay.end_batch()
    return outputs


@contextmanager
def attached(model, adapted, **options):
    replay = FrozenReplay(model, list(adapted.parameters()), **options)
    with Changes() as changes:
        replay.attach(changes)
        yield replay


def test_frozen_modules_run_once_per_batch():
    model = make_toy()
    with attached(model, model.fusion[0].attn, audited_batches=0) as replay, torch.no_grad():
        for args in batches(3):
            first, second, third = passes(model, replay, *args, count=3)
            assert torch.equal(first, second)
            assert torch.equal(first, third)
    assert model.audio.runs == model.video.runs == 3


def test_the_first_batches_are_audited():
    model = make_toy()
    with attached(model, model.fusion[0].attn, audited_batches=2) as replay, torch.no_grad():
        for args in batches(5):
            passes(model, replay, *args)
    assert model.audio.runs == 5 + 2


class OneOrTwo(nn.Module):
    """Two encoders, of which the second is not always called, and a head behind what adapts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Encoder(), Encoder()
        self.adapted, self.head = nn.Linear(12, 12), nn.Linear(12, 2).requires_grad_(False)
        self.first.requires_grad_(False), self.second.requires_grad_(False)

    def forward(self, x, y=None):
        tokens = self.first(x) if y is None else self.first(x) + self.second(y)
        return self.head(self.adapted(tokens))


def test_a_call_that_comes_late_is_audited_once():
    torch.manual_seed(0)
    model = OneOrTwo().eval()
    with attached(model, model.adapted) as replay:
        for _ in range(2):
            passes(model, replay, torch.randn(2, 6, 3))
        x, y = torch.randn(2, 2, 6, 3)
        first, second = passes(model, replay, x, y)
        assert torch.equal(first, second)
        assert model.second.runs == 2
        passes(model, replay, x, y)
        assert model.second.runs == 3
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_forwards_are_put_back():
    model = make_toy()
    model.audio.forward = own = lambda x: model.audio.norm(model.audio.embed(x))
    with pytest.raises(KeyError), attached(model, model.fusion[0].attn):
        assert model.audio.forward is not own
        raise KeyError
    assert model.audio.forward is own
    assert not any("forward" in m.__dict__ for m in model.modules() if m is not model.audio)


def test_new_inputs_are_computed():
    model = make_toy()
    (audio, video), (other, _) = batches(2)
    with attached(model, model.fusion[0].attn, audited_batches=0) as replay, torch.no_grad():
        replay.start_pass()
        model(audio, video)
        replay.start_pass()
        assert torch.equal(model(other, video), make_toy()(other, video))
        replay.end_batch()
    assert (model.audio.runs, model.video.runs) == (2, 1)


class Using(nn.Module):
    """Does something with what its frozen part gave it, or to it, ahead of its head."""

    def __init__(self, use, encoder=None):
        super().__init__()
        self.encoder, self.head, self.use = encoder or Encoder(), nn.Linear(12, 2), use
        self.encoder.requires_grad_(False)

    def forward(self, x):
        return self.head(self.use(self, x))


def edits_in_place(model, x):
    y = model.encoder(x)
    y += 1
    return y


def edits_by_data(model, x):
    y = model.encoder(x)
    y.data.mul_(0.5)
    return y


def edits_by_numpy(model, x):
    y = model.encoder(x)
    y.detach().numpy()[...] += 1
    return y


def sets_an_attribute(model, x):
    y = model.encoder(x)
    y.looks = getattr(y, "looks", 0) + 1
    return y * y.looks


def has_gradients(model, x):
    y = model.encoder(x)
    with torch.enable_grad():
        y.requires_grad_()
        y.square().sum().backward()
    return y.detach() + y.grad


@pytest.mark.parametrize("use", [edits_in_place, edits_by_data, edits_by_numpy, sets_an_attribute, has_gradients])
def test_nothing_that_is_done_to_an_output_is_on_that_of_another_pass(use):
    torch.manual_seed(0)
    model, x = Using(use).eval(), torch.randn(2, 6, 3)
    with torch.no_grad():
        expected, runs = model(x), model.encoder.runs
        with attached(model, model.head, audited_batches=0) as replay:
            for output in passes(model, replay, x, count=3):
                assert torch.equal(output, expected)
    assert model.encoder.runs == runs + 1


def test_an_input_edited_by_data_before_the_prediction_is_computed_again():
    model = make_toy()
    audio, video = batches(1)[0]
    with attached(model, model.fusion[0].attn, audited_batches=0) as replay, torch.no_grad():
        replay.start_pass()
        model(audio, video)
        audio.data.add_(1)
        replay.start_pass()
        assert torch.equal(model(audio, video), make_toy()(audio, video))
        replay.end_batch()


class Halves(Encoder):
    def forward(self, x):
        x.data.mul_(0.5)
        return super().forward(x)


def test_an_input_that_a_frozen_module_edits_by_data_is_edited_in_every_pass():
    model = Using(lambda model, x: model.encoder(x) + x.mean(), Halves()).eval()
    x = torch.randn(2, 6, 3)
    with torch.no_grad():
        expected = model(x.clone())
        with attached(model, model.head, audited_batches=0) as replay:
            for output in passes(model, replay, x):
                assert torch.equal(output, expected)


class Branches(Encoder):
    """Has one way for each of autograd's modes, such as an exact and a fast kernel."""

    def forward(self, x):
        return super().forward(x) * (2 if torch.is_grad_enabled() else 1)


def test_a_branch_on_the_grad_mode_is_that_of_the_prediction():
    model = Using(lambda model, x: model.encoder(x), Branches()).eval().requires_grad_(False)
    with attached(model, model.head) as replay:
        for batch in range(6):  # a mode that comes later is audited too
            x = torch.randn(2, 6, 3)
            with torch.set_grad_enabled(batch > 3):
                assert torch.equal(passes(model, replay, x)[-1], model(x))


def by_forward_ad(model, x):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(model.encoder(forward_ad.make_dual(x, torch.ones_like(x))))
        return y.primal + y.tangent


def by_vmap(model, x):
    weights = {name: torch.stack([p, 2 * p]) for name, p in model.encoder.named_parameters()}
    return torch.vmap(lambda own: torch.func.functional_call(model.encoder, own, (x,)))(weights).mean(0)


def by_other_weights(model, x):
    scale = model.head.weight.detach().mean()
    weights = {name: p * scale for name, p in model.encoder.named_parameters()}
    return torch.func.functional_call(model.encoder, weights, (x,))


def by_a_trace(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(model.encoder, x)(x)


@pytest.mark.parametrize("use", [by_forward_ad, by_vmap, by_other_weights, by_a_trace])
def test_transforms_and_other_weights_are_computed(use):
    torch.manual_seed(0)
    model, x = Using(use).eval(), torch.randn(2, 6, 3)
    with torch.no_grad(), attached(model, model.head) as replay:
        for _ in range(4):
            assert torch.equal(passes(model, replay, x)[-1], model(x))
            model.head.weight += 1


def test_other_weights_that_move_between_the_passes_are_computed():
    """The very same tensors in both passes, edited in between as by a step."""
    torch.manual_seed(0)
    model = Using(by_other_weights).eval()
    other = {name: p.clone() for name, p in model.encoder.named_parameters()}
    model.use = lambda model, x: torch.func.functional_call(model.encoder, other, (x,))
    x = torch.randn(2, 6, 3)
    with torch.no_grad(), attached(model, model.head, audited_batches=0) as replay:
        replay.start_pass()
        model(x)
        for weight in other.values():
            weight += 1
        replay.start_pass()
        output = model(x)
        replay.end_batch()
        assert torch.equal(output, model(x))


class Gated(Encoder):
    level: Tensor

    def __init__(self):
        super().__init__()
        self.gate = 0
        self.register_buffer("level", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * (1 + self.gate) * self.level


def sets_an_attribute_of_the_encoder(model, x):
    model.encoder.gate = int(model.head.weight[0, 0] > 10)
    return model.encoder(x)


def sets_a_buffer_of_the_encoder(model, x):
    model.encoder.level.fill_(1 + (model.head.weight[0, 0] > 10))
    return model.encoder(x)


@pytest.mark.parametrize("use", [sets_an_attribute_of_the_encoder, sets_a_buffer_of_the_encoder])
def test_a_module_that_the_prediction_sets_otherwise_is_computed_again(use):
    torch.manual_seed(0)
    model, x = Using(use, Gated()).eval(), torch.randn(2, 6, 3)
    with torch.no_grad(), attached(model, model.head, audited_batches=0) as replay:
        replay.start_pass()
        snapshot = Snapshot(model, (x,))
        model(x)
        replay.forget(snapshot.restore(), snapshot.drew)
        model.head.weight += 100  # a step
        replay.start_pass()
        output = model(x)
        replay.end_batch()
        assert torch.equal(output, model(x))


def test_inputs_edited_in_place_are_computed_again():
    model = make_toy()
    audio, video = batches(1)[0]
    with attached(model, model.fusion[0].attn, audited_batches=0) as replay, torch.no_grad():
        replay.start_pass()
        model(audio, video)
        audio += 1
        replay.start_pass()
        assert torch.equal(model(audio, video), make_toy()(audio, video))
        replay.end_batch()


def test_equal_copies_are_replayed():
    model = make_toy()
    audio, video = batches(1)[0]
    with attached(model, model.fusion[0].attn, audited_batches=0) as replay, torch.no_grad():
        replay.start_pass()
        first = model(audio, video)
        replay.start_pass()
        assert torch.equal(model(audio.clone(), video.clone()), first)
        replay.end_batch()
    assert model.audio.runs == 1


def test_a_module_called_twice_is_replayed_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = Encoder(), nn.Linear(12, 2)

        def forward(self, x, y):
            return self.head(self.encoder(x) - self.encoder(y))

    model = Twice().eval()
    with attached(model, model.head, audited_batches=0) as replay, torch.no_grad():
        first, second = passes(model, replay, torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    assert torch.equal(first, second)
    assert model.encoder.runs == 2


class Random(Encoder):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_a_model_random_in_eval_is_refused(caplog):
    model = make_toy()
    model.audio = Random().eval()
    with attached(model, model.fusion[0].attn) as replay, torch.no_grad():
        passes(model, replay, *batches(1)[0])
        assert caplog.text.count("random numbers in eval mode") == 1
        assert not replay.enabled
        runs = model.audio.runs
        first, second = passes(model, replay, *batches(1)[0])
        assert torch.equal(first, second)  # the same random numbers, as if there had been no other pass
        assert model.audio.runs == runs + 2


def test_nan_outputs_pass_the_audit():
    model = make_toy()
    audio, video = batches(1)[0]
    with attached(model, model.fusion[0].attn) as replay, torch.no_grad():
        passes(model, replay, audio * float("nan"), video)
    assert replay.enabled


def test_modules_that_share_adapted_parameters_are_not_frozen():
    model = make_toy()
    model.audio.tied = model.fusion[0].attn.qkv
    with attached(model, model.fusion[0].attn, audited_batches=0) as replay, torch.no_grad():
        passes(model, replay, *batches(1)[0])
    assert (model.audio.runs, model.video.runs) == (2, 1)


class Glued(nn.Module):
    """An encoder whose input is not a module's output, so that its passes have to be compared."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.shift = Encoder(), nn.Linear(WIDTH, 3), 0.0

    def forward(self, x):
        return self.head(self.encoder(x + self.shift).mean(1))


def test_what_moves_is_computed():
    """Each pass compares at once: no output is returned for an input that another pass had."""
    model = Glued().eval()
    with attached(model, model.head) as replay, torch.no_grad():
        for batch in range(6):
            x = torch.randn(2, 5, 3)
            replay.start_pass()
            model(x)
            model.shift += 1.0 * (batch > 3)  # what the audited batches do not show
            replay.start_pass()
            assert torch.equal(model(x), model.head(model.encoder(x + model.shift).mean(1)))
            replay.end_batch()
    assert replay.enabled


class Outputs(NamedTuple):
    tokens: Tensor
    mask: Tensor | None = None


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple of lists": lambda x: ([x], [x + 1]),
    "a named tuple": Outputs,
    "a ModelOutput": lambda x: BaseModelOutput(x, hidden_states=(x + 1,)),
    "an OrderedDict": lambda x: OrderedDict(tokens=x),
    "a defaultdict": lambda x: defaultdict(list, tokens=x),
    "a deque": lambda x: deque([x], maxlen=3),
    "torch's own": lambda x: x.max(1),
}


class Giving(Encoder):
    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return self.kind(super().forward(x))


class GivesKinds(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.encoder, self.adapted = Giving(kind), nn.Linear(WIDTH, 2)
        self.given: list[Any] = []

    def forward(self, x):
        self.given.append(self.encoder(x))
        leaves: Any = tree_leaves(self.given[-1])
        return self.adapted(leaves[0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_containers_that_can_be_made_anew_are_replayed(kind):
    model = GivesKinds(kind).eval()
    with attached(model, model.adapted, audited_batches=0) as replay, torch.no_grad():
        first, second = passes(model, replay, torch.randn(2, 6, 3))
    assert model.encoder.runs == 1
    assert torch.equal(first, second)
    assert type(model.given[0]) is type(kind(torch.ones(2, 6, 3)))


def test_views_of_the_same_memory_are_not_compared(monkeypatch):
    """On a GPU a comparison of values would wait for the device."""
    for module in ("engine.recorded", "modules.tensors"):
        monkeypatch.setattr(f"lightning_abpem.{module}.reading_waits", lambda x: True)
    monkeypatch.setattr("lightning_abpem.engine.recorded.same_bits", None)

    class Sliced(Glued):
        def forward(self, x):
            return self.head(self.encoder(x[:, 1:]).mean(1))

    model = Sliced().eval()
    with attached(model, model.head, audited_batches=0) as replay, torch.no_grad():
        first, second = passes(model, replay, torch.randn(2, 6, 3))
    assert torch.equal(first, second)
    assert model.encoder.runs == 1


class Leaving(nn.Module):
    """An encoder whose call leaves more behind than its output, and a model that uses that."""

    def __init__(self, way):
        super().__init__()
        self.first = Encoder().requires_grad_(False)
        self.encoder: Any = Encoder().requires_grad_(False)
        self.adapted, self.way = nn.Linear(WIDTH, 2), way
        self.features: list[Tensor] = []
        if way == "hook":
            self.encoder.embed.register_forward_hook(lambda module, args, output: self.features.append(output))
        else:
            self.encoder.forward = getattr(self, f"_{way}")

    def forward(self, x):
        self.features.clear()
        given = {"x": x} if self.way == "dict" else x
        self.encoder.kept = []
        y = self.encoder(given, self.features) if self.way == "list" else self.encoder(given)
        extra: Any = {"hook": self.features, "list": self.features, "attribute": self.encoder.kept}.get(self.way)
        extra = [given["tokens"]] if self.way == "dict" else [self.encoder.last] if self.way == "tensor" else extra
        self.encoder.last = torch.zeros(())
        return self.adapted(self.first(x).mean(1) + y.mean(1) + sum(part.mean() for part in extra))

    def _list(self, x, features):
        features.append(self.encoder.embed(x))
        return features[-1]

    def _dict(self, given):
        given["tokens"] = self.encoder.embed(given["x"])
        return given["tokens"]

    def _attribute(self, x):
        self.encoder.kept.append(self.encoder.embed(x))
        return self.encoder.kept[0]

    def _tensor(self, x):
        self.encoder.last = self.encoder.embed(x)
        return self.encoder.last


@pytest.mark.parametrize("way", ["hook", "list", "dict", "attribute", "tensor"])
def test_what_a_call_leaves_behind_is_there_in_every_pass(way):
    torch.manual_seed(0)
    model = Leaving(way).eval()
    with torch.no_grad():
        x = torch.randn(8, 2, 6, 3)
        expected = [model(part) for part in x]
        runs = model.first.runs
        with attached(model, model.adapted) as replay:
            for part, own in zip(x, expected, strict=True):
                for output in passes(model, replay, part):
                    assert torch.equal(output, own)
            assert "forward" in model.encoder.embed.__dict__  # what is inside is replayed
    assert 8 <= model.first.runs - runs < 16  # and so is the rest of the model
