"""Forwards of another shape: recursion, checkpointing, compiled parts, several calls, outputs, hooks, randomness."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.zoo.nets import WIDTH, Call, Encoder, Net, Refusal, entry, tensors

TWICE = "called once in a forward"


@entry("calls itself for the sequence turned round", memory_refused=TWICE)
class CallsItself(Net):
    def forward(self, audio, video, turned=False):
        logits = super().forward(audio, video)
        return logits if turned else logits + self(audio.flip(1), video, turned=True)


@entry(
    "calls itself for halves of the batch",
    memory="the fusion is called twice",
    refused=Refusal("call", "samples", is_needed=False),
)
class Halves(Net):
    def forward(self, audio, video):
        if len(audio) > 2:
            return torch.cat([self(*half) for half in zip(audio.tensor_split(2), video.tensor_split(2), strict=True)])
        return super().forward(audio, video)


@entry(
    "the target is a part, which the forward of the whole calls twice",
    options={"target": "core"},
    core="core",
    twin="each call of the target adapts: not a step for each batch",
)
class TargetTwice(Net):
    def build(self):
        self.core = Net()
        del self.audio, self.video, self.fusion, self.head

    def forward(self, audio, video):
        return self.core(audio, video) + self.core(audio.flip(1), video)


@entry("the target is a part; what the step makes of its output is the step's", options={"target": "core"}, core="core")
class TargetIsPart(Net):
    def build(self):
        self.core, self.seen = Net(), []
        del self.audio, self.video, self.fusion, self.head

    def forward(self, audio, video):
        self.seen.append(audio.mean())
        return self.core(audio + 1, video=video).softmax(-1) * len(self.seen)


@entry("non-reentrant checkpointing in an encoder")
class CheckpointedEncoder(Encoder):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@entry("non-reentrant checkpointing around the fusion", memory_refused="checkpoint")
class CheckpointedFusion(Net):
    def classify(self, x):
        return 3 * self.head(checkpoint(self.fusion, x, use_reentrant=False).mean(1))


@entry("checkpointing around a part with a state: the backward pass runs it again", memory="its state has rows")
class CheckpointedState(Net):
    def build(self):
        self.count = 0

    def part(self, x):
        self.count += 1
        return self.fusion(x)

    def classify(self, x):
        x = checkpoint(self.part, x, use_reentrant=False, preserve_rng_state=False)
        return self.head(x.mean(1)) * (1 + self.count)


@entry("a compiled encoder", memory="")
def compiled_encoder() -> Net:
    net = Net()
    net.audio.compile(backend="eager")
    return net


@entry("a compiled encoder and a forward that calls itself", memory_refused=TWICE)
class CompiledCallsItself(CallsItself):
    def build(self):
        self.video.compile(backend="eager")


@entry("a scripted encoder")
def scripted_encoder() -> Net:
    net = Net()
    net.video = torch.jit.trace(net.video, torch.zeros(3, 4, 3), check_trace=False)
    return net


@entry("leaves early behind the fusion in some batches, as no memory can know", memory_refused="bypasses")
class ExitBehind(Net):
    def build(self):
        self.more = nn.Linear(5, 5)

    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, stop=index % 2 == 0)

    def forward(self, audio, video, stop):
        logits = super().forward(audio, video)
        return logits if stop else self.more(logits)


@entry("leaves early ahead of the fusion in one batch", refused=Refusal("call", r"fusion\.0", batch=2))
class ExitAhead(Net):
    def build(self):
        self.early = nn.Linear(WIDTH, 5)

    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, stop=index == 2)

    def forward(self, audio, video, stop):
        x = self.encode(audio, video)
        return self.early(x.mean(1)) if stop else self.classify(x)


@entry("one encoder for both modalities")
class SharedEncoder(Net):
    def build(self):
        self.video = self.audio


@entry("the fusion twice in a row", memory_refused=TWICE)
class FusionTwice(Net):
    def classify(self, x):
        return 3 * self.head(self.fusion(self.fusion(x)).mean(1))


@entry("an encoder for each frame: many calls, and their number differs from batch to batch")
class CallPerFrame(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, frames=(4, 2, 4, 3)[index])

    def forward(self, audio, video, frames):
        seen = [self.video(video[:, i % frames]) for i in range(4)]
        return self.classify(torch.cat((self.audio(audio), torch.stack(seen, 1)), 1))


@entry("batches of different sizes")
class DifferentSizes(Net):
    @classmethod
    def calls(cls):
        return [Call(audio[:n], video[:n]) for n, (audio, video) in zip((3, 2, 3, 2), tensors(), strict=True)]


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@dataclass
class DataOutput:
    logits: Tensor
    hidden: Any = None


def output(kind: Any) -> Any:
    class Gives(Net):
        def forward(self, audio, video):
            x = self.encode(audio, video)
            return kind(self.classify(x), x)

    return Gives


_GivesTupleOutput: Any = output(lambda logits, x: (logits, {"tokens": x}))


@entry("a tuple as output")
class TupleOutput(_GivesTupleOutput):
    pass


_GivesDictOutput: Any = output(lambda logits, x: {"tokens": x, "logits": logits})


@entry("a dict as output")
class DictOutput(_GivesDictOutput):
    pass


_GivesDataclassOutput: Any = output(DataOutput)


@entry("a dataclass as output")
class DataclassOutput(_GivesDataclassOutput):
    pass


_GivesHuggingFaceOutput: Any = output(lambda logits, x: SequenceClassifierOutput(logits=logits, hidden_states=(x,)))


@entry("Hugging Face's output, and logits found by a function", options={"logits": lambda output: output["logits"]})
class HuggingFaceOutput(_GivesHuggingFaceOutput):
    pass


@entry("a hook on the target changes the arguments")
def hook_changes_arguments() -> Net:
    net = Net()
    net.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1, args[1]), kwargs), with_kwargs=True)
    return net


@entry("a hook on the target changes the output, by what no softmax sees: whether the loss sees it is left open")
def hook_changes_output() -> Net:
    net = Net()
    net.register_forward_hook(lambda module, args, output: output + 1)
    return net


@entry("draws from torch's global generator in eval mode")
class DrawsTorch(Encoder):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


@entry("draws from Python's and NumPy's global generators, behind the encoders")
class DrawsOthers(Net):
    def encode(self, audio, video):
        return super().encode(audio, video) * (1 + random.random()) + np.random.rand()


@entry("draws in some batches only")
class DrawsSometimes(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, noise=index % 2)

    def forward(self, audio, video, noise):
        return super().forward(audio + torch.rand(1, dtype=audio.dtype) if noise else audio, video)


@entry("an encoder under vmap: its tensors are torch's batched ones")
class Vmapped(Net):
    def encode(self, audio, video):
        return torch.cat((torch.vmap(self.audio)(audio), self.video(video)), 1)


@entry("an encoder by functional_call, with weights of the moment")
class FunctionalCall(Net):
    def encode(self, audio, video):
        doubled = {name: 2 * p for name, p in self.audio.named_parameters()}
        return torch.cat((torch.func.functional_call(self.audio, doubled, (audio,)), self.video(video)), 1)


class Fails(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            raise ValueError("too loud")
        return super().forward(x)


@entry("an encoder that fails in some batches, and a forward that goes on without it")
class Recovers(Net):
    def build(self):
        self.audio, self.failed = Fails(), []

    def encode(self, audio, video):
        try:
            x = self.audio(audio)
        except ValueError as error:
            self.failed.append(str(error))
            x = self.audio.embed(audio)
        return torch.cat((x, self.video(video)), 1)


@entry("the user's own function in the place of forward, on the target and on an encoder")
def replaced_forward() -> Net:
    net, calls = Net(), Encoder()
    forward, encode = net.forward, net.audio.forward
    net.other = calls

    def doubled(audio: Tensor, video: Tensor) -> Tensor:
        return 2 * forward(audio, video)

    net.forward = doubled
    net.audio.forward = lambda x: encode(x) + net.other(x)
    return net


@entry("edits its encoder's output in place, and later its input, under replay")
class EditsOutputs(Net):
    def encode(self, audio, video):
        x, y = self.audio(audio), self.video(video)
        x[:, 0] = 0
        y += x.mean(1, keepdim=True)
        audio.zero_()
        return torch.cat((x, y), 1)


@entry("an encoder leaves a tensor on itself, which the head reads past the fusion", memory_refused="bypasses")
class LeavesATensor(Net):
    def build(self):
        self.left = None

    def forward(self, audio, video):
        x = self.encode(audio, video)
        self.left = x.mean((0, 1), keepdim=True)[0, :, :5]
        return self.classify(x) + self.left
