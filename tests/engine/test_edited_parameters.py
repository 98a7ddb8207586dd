"""A forward that edits parameters in place is refused by name, also where the edit counts no version up."""

import pytest
import torch
from torch import Tensor, nn

from lightning_abpem import ABPEM
from tests.toy import MODALITIES, WIDTH, Toy, batches


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize(("kind", "name"), [(Teacher, "slow.weight"), (Bank, "bank"), (Scripted, "part.scale")])
def test_it_is_named(kind, name):
    model = kind().eval()
    callback, refusal = ABPEM("fusion.*.attn", MODALITIES, k=2, steps=0), f"edited '{name}' in place"
    with torch.no_grad(), callback.attach(model), pytest.raises(ValueError, match=refusal):
        for batch in batches():
            model(*batch)
