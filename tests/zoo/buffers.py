"""Buffers that a forward moves, and batch normalisation in either mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.nets import WIDTH, Encoder, Net, Refusal, entry


@entry("a buffer that another tensor replaces")
class BufferReassigned(Encoder):
    mean: Tensor

    def build(self):
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        x = super().forward(x)
        self.mean = 0.5 * self.mean + x.mean((0, 1))
        return x - self.mean


@entry("a buffer edited in place, not saved with the model")
class BufferInPlace(Encoder):
    mean: Tensor

    def build(self):
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, x):
        x = super().forward(x)
        self.mean.lerp_(x.mean((0, 1)), 0.5)
        return x - self.mean


@entry("a buffer edited by way of .data, which torch's version does not tell")
class BufferData(Encoder):
    mean: Tensor

    def build(self):
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        x = super().forward(x)
        self.mean.data.lerp_(x.mean((0, 1)), 0.5)
        return x - self.mean


@entry("a tensor edited by way of NumPy, which torch's version does not tell")
class StateThroughNumpy(Encoder):
    def build(self):
        self.count = torch.zeros(1, dtype=torch.double)
        self.array = self.count.numpy()

    def forward(self, x):
        self.array += 1
        return super().forward(x) * self.count


@entry("a buffer that is registered in the first call")
class LazyBuffer(Encoder):
    def forward(self, x):
        x = super().forward(x)
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.new_zeros(WIDTH))
        self.mean += x.mean((0, 1))
        return x - self.mean


@entry("a buffer that is registered anew in each call, saved with the model in every second one")
class RegistersAnew(Encoder):
    def forward(self, x):
        x = super().forward(x)
        is_saved, count = "mean" in self.state_dict(), len(self.state_dict())
        if hasattr(self, "mean"):
            del self.mean
        self.register_buffer("mean", x.mean((0, 1)) * count, persistent=not is_saved)
        return x + self.mean


@entry("a buffer that takes another shape, as a cache of keys", memory="")
class GrowingBuffer(Encoder):
    keys: Tensor

    def build(self):
        self.register_buffer("keys", torch.zeros(3, 0, WIDTH))

    def forward(self, x):
        x = super().forward(x)
        self.keys = torch.cat((self.keys, x), 1)
        return x + self.keys.mean(1, keepdim=True)


@entry("batch normalisation in eval mode: its statistics stay")
class BatchNormEval(Encoder):
    def build(self):
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.bn(super().forward(x).mT).mT


@entry("batch normalisation set to train in the step: torch's version of its statistics stays the same")
class BatchNormTrain(Net):
    def build(self):
        self.bn = nn.BatchNorm1d(WIDTH)

    def encode(self, audio, video):
        return self.bn(super().encode(audio, video).mT).mT

    def step(self, call):
        self.bn.train()
        return super().step(call)


@entry(
    "a running scale behind the fusion, edited in place: gradients need what the pass made of it",
    memory_refused="bypasses",
)
class ScaleBehind(Net):
    scale: Tensor

    def build(self):
        self.register_buffer("scale", torch.ones(1))

    def classify(self, x):
        x = self.fusion(x)
        with torch.no_grad():
            self.scale.mul_(0.5).add_(2)
        return 3 * self.head(x.mean(1)) * self.scale


@entry(
    "views of a ring buffer, of which one gets values with a history",
    refused=Refusal("call", "no values with a history into attribute 'rows' of module 'RingOfViews', 0", steps=(1,)),
    memory="it has rows",
)
class RingOfViews(Net):
    def build(self):
        self.ring = torch.zeros(4, WIDTH, dtype=torch.double)
        self.rows, self.count = [self.ring[i] for i in range(4)], 0

    def classify(self, x):
        x = self.fusion(x).mean(1)
        self.rows[self.count % 4].copy_(x.mean(0))
        self.count += 1
        return 3 * self.head(x + self.ring.sum(0))


@entry("the same, into the buffer itself; its windows overlap", memory_refused="bypasses")
class RingItself(Net):
    def build(self):
        self.ring, self.count = torch.zeros(4, WIDTH, dtype=torch.double), 0
        self.windows = torch.zeros(8).unfold(0, 4, 1)

    def classify(self, x):
        x = self.fusion(x).mean(1)
        self.windows[2].add_(1)
        self.ring[self.count % 4] = x.mean(0)
        self.count += 1
        return 3 * self.head(x + self.ring.sum(0)) * (1 + self.windows.sum())
