"""A forward that edits parameters in place is refused by name, also where the edit counts no version up."""

import pytest
import torch
from torch import Tensor, nn

from lightning_abpem import ABPEM
from tests.engine.attached import abpem
from tests.toy import MODALITIES, WIDTH, Toy, batches, make_toy


class Teacher(Toy):
    """A momentum teacher, which moves from the second batch on."""

    def __init__(self):
        super().__init__()
        self.slow, self.count = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, *inputs):
        self.count += 1
        if self.count > 1:
            for slow, p in zip(self.slow.parameters(), self.fusion[0].attn.proj.parameters(), strict=True):
                slow.data.mul_(0.9).add_(0.1 * p.data)
        return super().forward(*inputs)


class Bank(Toy):
    """A bank of values whose order changes."""

    def __init__(self):
        super().__init__()
        self.bank = nn.Parameter(torch.arange(4096.0).view(64, 64))

    def forward(self, *inputs):
        self.bank.data = self.bank.data.clone()
        self.bank.data[:] = self.bank.data.roll(1, 0)
        return super().forward(*inputs)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(self.scale)
        return x * self.scale


class Scripted(Toy):
    def __init__(self):
        super().__init__()
        self.part = torch.jit.script(Scale())

    def forward(self, *inputs):
        return self.part(super().forward(*inputs))


class Halving(Toy):
    """Halves a parameter in each call, or in those without gradients alone."""

    def __init__(self, always):
        super().__init__()
        self.slow, self.always = nn.Parameter(torch.ones(4), requires_grad=False), always

    def forward(self, *inputs):
        if self.always or not torch.is_grad_enabled():
            self.slow.data.mul_(0.5)
        return super().forward(*inputs)


def adapt_to_two(model, adaptation):
    for batch in batches(2):
        model(*batch)


def score(model, adaptation):
    model(*batches(1)[0])
    adaptation.score_blocks(batches(1)[0], {}, 2)


@pytest.mark.parametrize(
    ("always", "run", "options", "left"),
    [
        pytest.param(True, adapt_to_two, {"modalities": "auto"}, 0.5, id="the pass that reads spans"),
        pytest.param(False, adapt_to_two, {"monitor": "source"}, 0.25, id="a prediction, then the source's"),
        pytest.param(False, score, {}, 0.25, id="a prediction, then scores for a report"),
    ],
)
def test_it_is_named_by_every_kind_of_pass_after_one_edit(always, run, options, left):
    model, callback = Halving(always).eval(), ABPEM("fusion.*.attn", **({"modalities": MODALITIES, "k": 2} | options))
    with torch.no_grad(), callback.attach(model) as adaptation, pytest.raises(ValueError, match="edited 'slow' in"):
        run(model, adaptation)
    assert torch.equal(model.slow, torch.full((4,), left))


class Clamped(Toy):
    """Bounds a temperature in each call, as CLIP's loss does, and a matrix; neither is over the bounds."""

    def __init__(self, size=1):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((size,), 2.0), requires_grad=False)

    def forward(self, *inputs):
        return super().forward(*inputs) * self.temperature.clamp_(0.0, 4.6).mean()


@pytest.mark.parametrize("steps", [0, 1])
def test_an_edit_that_changes_no_bit_of_a_small_parameter_is_none(steps):
    model, callback = Clamped().eval(), ABPEM("fusion.*.attn", MODALITIES, k=2, steps=steps)
    with torch.no_grad():
        plain = [model(*batch) for batch in batches()]
        with callback.attach(model):
            adapted = [model(*batch) for batch in batches()]
    assert callback.skipped == 0
    assert all(map(torch.equal, adapted, plain)) is (steps == 0)
    assert model.temperature == 2


def test_it_is_said_that_an_edit_of_a_large_parameter_may_change_nothing():
    model, callback = Clamped(4096).eval(), ABPEM("fusion.*.attn", MODALITIES, k=2, steps=0)
    refusal = "edited 'temperature' in place.* counted an edit.*values are compared .* up to 1,024"
    with torch.no_grad(), callback.attach(model), pytest.raises(ValueError, match=refusal):
        model(*batches(1)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize(("kind", "name"), [(Teacher, "slow.weight"), (Bank, "bank"), (Scripted, "part.scale")])
def test_it_is_named(kind, name):
    model = kind().eval()
    callback, refusal = ABPEM("fusion.*.attn", MODALITIES, k=2, steps=0), f"edited '{name}' in place"
    with torch.no_grad(), callback.attach(model), pytest.raises(ValueError, match=refusal):
        for batch in batches():
            model(*batch)


def load_another_checkpoint(model, i):
    if i == 3:
        torch.manual_seed(7)
        model.load_state_dict(Toy().state_dict())


def swap_average_in(model, i):
    for p in model.parameters():
        p.data.copy_(p.data * 1.01)


def train_on(model, i):
    if i == 1:
        with torch.no_grad():
            model.fusion[0].attn.qkv.bias.add_(0.1)


WRITERS = [load_another_checkpoint, swap_average_in, train_on]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", WRITERS)
def test_weights_that_are_written_between_calls_are_named(write, precision):
    model = make_toy().to(precision)
    before = [p.clone() for p in model.fusion[0].attn.parameters()]
    refusal = r"'fusion\.0\.attn\.qkv\.(weight|bias)' was written between two calls.* in a run of its own"
    with pytest.raises(ValueError, match=refusal), torch.no_grad(), abpem().attach(model):
        for i, (audio, video) in enumerate(batches(6)):
            write(model, i)
            model(audio.to(precision), video.to(precision))
    assert all(torch.equal(p, x) for p, x in zip(list(model.fusion[0].attn.parameters())[:2], before[:2], strict=True))


@pytest.mark.parametrize("reset", ["never", "4 samples"])
@pytest.mark.parametrize("write", WRITERS)
def test_who_only_observes_sees_weights_that_are_written_between_calls(write, reset):
    seen, weights = [], []
    for attach in (False, True):
        model = make_toy()
        with torch.no_grad(), abpem(steps=0, reset=reset).attach(model) if attach else torch.no_grad():
            for i, batch in enumerate(batches(6)):
                write(model, i)
                seen.append(model(*batch))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(torch.stack(seen[:6]), torch.stack(seen[6:]))
    assert torch.equal(*weights)
