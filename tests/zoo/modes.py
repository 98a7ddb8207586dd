"""Training flags, grad modes, autocast: what a forward and the user's hooks see, and what they leave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.nets import Net, Refusal, entry


class Dropout(Net):
    def build(self):
        self.drop = nn.Dropout(0.5)

    def encode(self, audio, video):
        return self.drop(super().encode(audio, video))


@entry("dropout, in eval mode by hand")
class DropoutInEval(Dropout):
    pass


@entry(
    "nobody called .eval(), in a loop of one's own",
    only=("attach", "a Trainer does it"),
    refused=Refusal("opening", r"eval"),
)
def left_in_training() -> Net:
    net = Dropout()
    net.eval = lambda: net
    return net


@entry("nobody called .eval(): the Trainer does, and undoes it", only=("Trainer", "refused in a loop of one's own"))
def left_to_the_trainer() -> Net:
    net = Dropout()
    net.eval = lambda: type(net).eval(net) if net._trainer is not None else net
    return net


@entry("dropout set to train in the step, for samples of a prediction: it draws")
class DropoutInStep(Dropout):
    def step(self, call):
        self.drop.train()
        return super().step(call)


@entry("dropout in the fusion set to train in the step: the adapting pass draws too", memory_refused="random|draws")
class DropoutInFusion(Net):
    def build(self):
        self.fusion[0].drop = nn.Dropout(0.3)
        self.fusion[0].norm = nn.Sequential(self.fusion[0].norm, self.fusion[0].drop)

    def step(self, call):
        self.fusion[0].drop.train()
        try:
            return super().step(call)
        finally:
            self.fusion[0].drop.eval()


@entry("a flag that the forward turns round, and leaves so")
class TurnsFlags(Net):
    def forward(self, audio, video):
        self.head.train(not self.head.training)
        return super().forward(audio * (1 + self.head.training), video)


@entry("the step sets the whole model to train and the forward back to eval")
class TrainAndBack(Dropout):
    def step(self, call):
        self.train()
        return super().step(call)

    def forward(self, audio, video):
        self.eval()
        return super().forward(audio, video)


@entry("bfloat16 autocast around the loop", around="autocast", tolerance=2e-2, only=("attach", "an outer mode too"))
class AutocastOutside(Net):
    @classmethod
    def calls(cls):
        return in_float(super().calls())


def in_float(calls: list[Any]) -> list[Any]:
    for call in calls:
        call.args = tuple(x.float() if isinstance(x, Tensor) else x for x in call.args)
    return calls


@entry("bfloat16 autocast that the forward opens around its encoders and fusion", tolerance=2e-2)
class AutocastInside(Net):
    @classmethod
    def calls(cls):
        return in_float(super().calls())

    def double(self):
        return self

    def forward(self, audio, video):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(audio, video)


@entry("encoders under no_grad")
class EncodersWithoutGrad(Net):
    @torch.no_grad()
    def encode(self, audio, video):
        return super().encode(audio, video)


@entry(
    "encoders under inference_mode: autograd cannot keep their tokens",
    refused=Refusal("call", "inference", is_needed=False),
)
class EncodersInInferenceMode(Net):
    def encode(self, audio, video):
        with torch.inference_mode():
            return super().encode(audio, video)


@entry(
    "the whole forward under no_grad", refused=Refusal("call", r"(?i)no_grad|gradient", steps=(1,)), memory="as without"
)
class ForwardWithoutGrad(Net):
    @torch.no_grad()
    def forward(self, audio, video):
        return super().forward(audio, video)


@entry(
    "inference_mode outside, with a state that becomes an inference tensor",
    around="inference_mode",
    only=("attach", "a Trainer's modes are its own"),
)
class StateInInferenceMode(Net):
    def build(self):
        self.state = None

    def forward(self, audio, video):
        x = self.encode(audio, video)
        self.state = x.mean(0, keepdim=True) if self.state is None else self.state + x.mean(0, keepdim=True)
        return self.classify(x + self.state)


@entry("gradients are on outside: the prediction carries them, as it would", around="grad", only=("attach", "a mode"))
class GradientsOutside(Net):
    def forward(self, audio, video):
        return super().forward(audio, video)


@entry("notes in which modes it is called: those of the caller alone", memory="")
class NotesModes(Net):
    def build(self):
        self.notes = []

    def forward(self, audio, video):
        kinds = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self.training, self.audio.training
        self.notes.append(kinds)
        return super().forward(audio * len(self.notes), video)


@entry("gradients of its own inside the forward", only=("attach", "plain inference mode forbids them"))
class OwnGradients(Net):
    def forward(self, audio, video):
        with torch.enable_grad():
            x = audio.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.audio(x).square().sum(), x)
        return super().forward(audio - slope, video)


@entry("some parameters have gradients or want none: the user's business", memory="")
def gradients_of_the_user() -> Net:
    net = Net()
    net.head[1].weight.grad = torch.ones_like(net.head[1].weight, dtype=torch.float)
    net.double()
    net.fusion[0].attn.q.weight.grad = torch.full_like(net.fusion[0].attn.q.weight, 2)
    net.video.requires_grad_(False)
    net.fusion[0].attn.k.bias.requires_grad_(False)
    return net


@entry("freezes an encoder in its first call, for good")
class FreezesAnEncoder(Net):
    def forward(self, audio, video):
        self.audio.requires_grad_(False)
        return super().forward(audio, video)


@entry(
    "freezes itself in every call, so that nothing can adapt",
    refused=Refusal("call", "sets requires_grad", steps=(1,)),
    memory="as without",
)
class FreezesItself(Net):
    def forward(self, audio, video):
        self.requires_grad_(False)
        return super().forward(audio, video)


@entry("turns the flag of a parameter round in each call, and asks for it", memory="no two calls are alike")
class TurnsParameterFlag(Net):
    def forward(self, audio, video):
        p = self.video.embed.weight
        p.requires_grad_(not p.requires_grad)
        return super().forward(audio * (1 + p.requires_grad), video)


ITS_GRADIENTS = {"around": "grad", "only": ("attach", "a mode"), "twin": "its past has no gradients"}


@entry("the step adds to gradients, those of what adapts among them", **ITS_GRADIENTS)
class BackwardInStep(Net):
    def step(self, call):
        logits = super().step(call)
        loss = self.audio(call.args[0]).square().mean() + self.fusion[0].attn.q.weight.sum()
        loss.backward()
        return logits


@entry("the forward adds to gradients that are there", **ITS_GRADIENTS)
class BackwardInForward(Net):
    def forward(self, audio, video):
        if self.audio.embed.weight.requires_grad:  # not in a pass
            self.audio(audio).square().mean().backward()
        self.fusion[0].attn.q.weight.sum().backward()
        return super().forward(audio, video)


@entry(
    "hooks of the LightningModule see the flags that they see without the callback",
    twin="it takes notes of a Trainer's hooks",
    only=("Trainer", "a Trainer's hooks"),
)
class HooksSeeFlags(Dropout):
    def build(self):
        super().build()
        self.notes = []

    def note(self, name: str) -> None:
        flags = [module.training for module in self.modules()]
        self.notes.append((name, flags, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))


for _name in [
    *("on_predict_start", "on_predict_epoch_start", "on_predict_batch_start", "on_predict_batch_end"),
    *("on_predict_epoch_end", "on_predict_end", "on_predict_model_eval"),
]:

    def _hook(self, *_: Any, _name: str = _name) -> None:
        if _name == "on_predict_model_eval":
            self.eval()
        self.note(_name)

    setattr(HooksSeeFlags, _name, _hook)
HooksSeeFlags.eval = lambda self: nn.Module.train(self, self._trainer is None)  # left to the Trainer
