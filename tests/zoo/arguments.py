"""Forwards that edit what they are called with, or are called with what is not easily copied."""

from __future__ import annotations

import torch

from tests.zoo.nets import Call, Net, Refusal, entry, tensors

# ------------------------------------------------------------------------------------------------------------ tensors


@entry("the ordinary case: nothing is edited")
class Plain(Net):
    pass


@entry("keywords alone, in another order, and a default that is left out")
class Keywords(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(video=video, audio=audio)

    def forward(self, *, audio, video, mask=None):
        return super().forward(audio, video)


class Edits(Net):
    """Edits its audio in place in the batches that `edited` names."""

    edited: tuple[int, ...] = ()

    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, edits=index in cls.edited)

    def forward(self, audio, video, edits):
        if edits:
            audio.mul_(2).add_(1)
        return super().forward(audio, video)


@entry("edited in place in the first batch alone: what is learned there says too much")
class EditsFirst(Edits):
    edited = (0,)


@entry("edited in place in a later batch alone: what is learned in the first says too little")
class EditsLater(Edits):
    edited = (2,)


@entry("only some samples are edited, and in the first batch none")
class EditsSomeSamples(Net):
    def forward(self, audio, video):
        audio[audio.sum((1, 2)) > 5] *= 0.5
        video[video.sum((1, 2)) > 2] -= 1
        return super().forward(audio, video)


@entry("views of one storage: an edit of one argument is an edit of the other")
class SharedStorage(Net):
    @classmethod
    def call(cls, index, audio, video):
        both = torch.cat((audio, video), 1)
        return Call(both, both[:, :6], both[:, 4:8])

    def forward(self, both, audio, video):
        both += 1
        audio *= 2
        return super().forward(audio, video)


@entry("the same tensor twice: a copy of each would no longer be one")
class SameTwice(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio, video, audio)

    def forward(self, audio, video, again):
        again.add_(1)
        return super().forward(audio, video)


@entry("expanded: many places of the tensor are one in memory")
class Expanded(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio[:1].expand(3, -1, -1), video, torch.ones(1, 1, 1, dtype=torch.double).expand(3, 4, 3))

    def forward(self, audio, video, shift):
        return super().forward(audio, video.add_(shift))


@entry("transposed and strided: kernels may round other strides otherwise")
class Strided(Net):
    @classmethod
    def call(cls, index, audio, video):
        wide = torch.zeros(3, 4, 6, dtype=torch.double)
        wide[..., ::2] = video
        return Call(audio.mT.contiguous().mT, wide[..., ::2])

    def forward(self, audio, video):
        audio *= 1.5
        return super().forward(audio.sin(), video)


@entry("made in inference mode, where an edit needs inference mode", around="inference_mode", only=("attach", "a mode"))
class MadeInInferenceMode(Net):
    @classmethod
    def calls(cls):
        with torch.inference_mode():
            return [Call(audio + 0, video + 0) for audio, video in tensors()]

    def forward(self, audio, video):
        audio.add_(1)
        return super().forward(audio, video)


@entry("the shape itself is edited in place")
class EditsShape(Net):
    def forward(self, audio, video):
        if audio.dim() == 3:
            audio.unsqueeze_(0)
        video.transpose_(0, 1)
        return super().forward(audio[0], video.mT.mT.transpose(0, 1))


@entry("requires_grad is switched on and stays so")
class TogglesRequiresGrad(Net):
    def forward(self, audio, video):
        audio.requires_grad_(not audio.requires_grad)
        return super().forward(audio, video)


@entry(".data is replaced: torch's version of the tensor stays the same")
class EditsData(Net):
    def forward(self, audio, video):
        audio.data = audio.data * 2
        video.data.add_(1)
        return super().forward(audio, video)


@entry("edited by way of NumPy's view: torch's version of the tensor stays the same")
class EditsThroughNumpy(Net):
    def forward(self, audio, video):
        audio.detach().numpy()[..., 0] += 1
        return super().forward(audio, video)


@entry("a Python attribute of a tensor, which the loader left there and the forward sets")
class TensorAttribute(Net):
    @classmethod
    def call(cls, index, audio, video):
        audio.rate = 1
        return Call(audio, video)

    def forward(self, audio, video):
        audio.rate += 1
        return super().forward(audio * audio.rate, video)


class OfSparse(Net):
    @classmethod
    def call(cls, index, audio, video):
        return Call(audio.relu().to_sparse(), video)

    def forward(self, audio, video):
        return super().forward(audio.to_dense(), video)


@entry("a sparse tensor, left as it is")
class Sparse(OfSparse):
    pass


@entry("a sparse tensor, edited in place", refused=Refusal("call", "(?i)sparse", is_needed=False))
class SparseEdited(OfSparse):
    def forward(self, audio, video):
        return super().forward(audio.mul_(2), video)
