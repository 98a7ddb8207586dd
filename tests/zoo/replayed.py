"""Encoders whose output is not that of their arguments and the flags of a pass alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.nets import WIDTH, Block, Call, Encoder, Net, entry

OTHER_WEIGHTS = {"memory_refused": "bypasses"}  # the same tokens give other logits after a step


def transposed_later(index, audio, video):
    """In float32, where a linear layer rounds a transposed input by its weight's flag; not in the audited batches."""
    audio, video = audio.float(), video.float()
    return Call(audio.mT.contiguous().mT if index > 1 else audio, video)


class Float(Net):
    call = staticmethod(transposed_later)

    def double(self):
        return self


@entry("the usual LightningModule, with its model in a module", core="model", tolerance=1e-4)
class BackboneInside(Float):
    def build(self):
        self.model = Net()
        del self.audio, self.video, self.fusion, self.head

    def forward(self, audio, video):
        return self.model(audio, video)


@entry(
    "an encoder behind one fusion block and ahead of another",
    options={"fusion": ["fusion.0.attn", "second.attn"]},
    memory="its blocks have no module around them",
    twin="it has one block",
)
class EncoderBetween(Float):
    def build(self):
        self.second, self.third = Block(), Encoder()

    def forward(self, audio, video):
        x = self.fusion(self.encode(audio, video))
        x = torch.cat((x[:, :6] + self.third(audio), x[:, 6:]), 1)
        return 3 * self.head(self.second(x).mean(1))


class Borrows(Encoder):
    """Uses a weight of the fusion, of which it knows by a function."""

    weight: Callable[[], Tensor]

    def forward(self, x, on=True):
        x = super().forward(x)
        return x @ self.weight().mT if on else x


@entry("an encoder borrows a weight that adapts, by a function that gives it", **OTHER_WEIGHTS)
def borrowed_weight() -> Net:
    net = Net(Borrows())
    weight = net.double().fusion[0].attn.q.weight
    net.audio.weight = lambda: weight
    return net


class _FromTheThird(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, index > 1)

    def forward(self, audio, video, on):
        return self.classify(torch.cat((self.audio(audio, on), self.video(video)), 1))


@entry("an encoder borrows a constant of what adapts, from the third batch on", calls=_FromTheThird.calls)
def borrowed_later() -> Net:
    net = _FromTheThird(Borrows())
    attention = net.fusion[0].attn
    net.audio.weight = lambda: attention.q.weight.detach()
    return net


@entry("an ensemble by torch.func, as torch's recipe has it")
class Ensemble(Net):
    def build(self):
        self.members = nn.ModuleList(Encoder() for _ in range(3))

    def encode(self, audio, video):
        weights, buffers = torch.func.stack_module_state(list(self.members))

        def member(weights, buffers):
            return torch.func.functional_call(self.members[0], (weights, buffers), (audio,))

        return torch.cat((torch.vmap(member)(weights, buffers).mean(0), self.video(video)), 1)


@entry("an output of an encoder is edited through .data, not in the audited batches")
class EditedByData(_FromTheThird):
    def forward(self, audio, video, on):
        x = self.audio(audio)
        if on:
            x.data.mul_(0.5)
        return self.classify(torch.cat((x, self.video(video)), 1))


class Gain(Encoder):
    gain = 1.0

    def forward(self, x):
        return super().forward(x) * self.gain


@entry("a shallow and a deep copy of an encoder, made in the call, have settings of their own")
class Copies(Net):
    def build(self):
        self.audio = Gain()

    def encode(self, audio, video):
        loud, deep = copy.copy(self.audio), copy.deepcopy(self.audio)
        loud.gain, deep.gain = 3.0, -2.0
        assert not any("forward" in vars(own) for own in (loud, *deep.modules()))
        x = self.audio(audio) + loud(audio) + deep(audio)
        return torch.cat((x, self.video(video)), 1)


@entry("an encoder is copied in the third call, and the copy goes on in its place")
class CopiedLater(_FromTheThird):
    def build(self):
        self.teacher = None

    def forward(self, audio, video, on):
        if on and self.teacher is None:
            self.teacher = copy.deepcopy(self.audio)
        return self.classify(torch.cat(((self.teacher or self.audio)(audio), self.video(video)), 1))


class Settings:
    level: float | None = None


class Reads(Encoder):
    settings: Settings

    def forward(self, x):
        level = self.settings.level
        return super().forward(x) if level is None else super().forward(x) * level


@entry("an encoder behind the fusion reads a setting that the call makes and takes back", memory="it has rows")
class SettingOfTheMoment(Net):
    def build(self):
        self.third = Reads()
        self.third.settings = self.settings = Settings()
        self.requires_grad_(False)

    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, index > 1)

    def forward(self, audio, video, on):
        x = self.fusion(self.encode(audio, video))
        self.settings.level = x.detach().mean((0, 1)) if on else None
        try:
            return 3 * self.head(x.mean(1) + self.third(video).mean(1))
        finally:
            self.settings.level = None


# ------------------------------------------------------------- what an encoder leaves for the head, which takes it back


class Router(Encoder):
    """Appends its load-balancing loss to a list that the model has given it."""

    def build(self):
        self.router = nn.Linear(WIDTH, 3)
        self.losses: Any = None

    def forward(self, x):
        x = super().forward(x)
        gates = self.router(x).softmax(-1)
        self.losses.append(gates.mean((0, 1)).square().sum())
        return x * gates.amax(-1, keepdim=True)


@entry("routers append their losses to the model's list, which the forward sums and clears")
class BalancedRouters(Net):
    def build(self):
        self.losses: list[Any] = []
        self.audio, self.video = Router(), Router()
        self.audio.losses = self.video.losses = self.losses

    def forward(self, audio, video):
        output = super().forward(audio, video)
        balance = torch.stack(self.losses).sum() if self.losses else torch.zeros(())
        self.losses.clear()
        return {"logits": output, "balance": balance}


class Stash(Encoder):
    """Puts its features into a dict that the model has given it."""

    def build(self):
        self.stash: Any = None

    def forward(self, x):
        x = super().forward(x)
        self.stash["skip"] = x.mean(1)
        return x


@entry("the head takes an encoder's features out of a dict", memory="it has rows")
class SkipConnection(Net):
    def build(self):
        self.stash: dict[str, Any] = {}
        self.audio = Stash()
        self.audio.stash = self.stash

    def forward(self, audio, video):
        x, skip = self.fusion(self.encode(audio, video)).mean(1), self.stash.pop("skip", None)
        return 3 * self.head(x if skip is None else x + skip)


class KeepsLoss(Encoder):
    """Keeps a loss as an attribute."""

    def build(self):
        self.l_aux: Any = None

    def forward(self, x):
        x = super().forward(x)
        self.l_aux = x.square().mean()
        return x


@entry("the forward reads an encoder's loss and sets it to None")
class AuxiliaryLoss(Net):
    def build(self):
        self.audio = KeepsLoss()

    def forward(self, audio, video):
        output = super().forward(audio, video)
        balance, self.audio.l_aux = self.audio.l_aux, None
        return {"logits": output, "balance": balance}


class Noisy(Encoder):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x[..., :1])


@entry("an encoder and the head draw from a fork of the generator with a fixed seed", memory="its head draws by rows")
class ForkedGenerator(Net):
    def build(self):
        self.audio = Noisy()

    def forward(self, audio, video):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            x = self.encode(audio, video)
            return self.classify(x + torch.randn_like(x))
