"""Forwards that give a module another class, or another forward, in a call."""

from __future__ import annotations

from tests.zoo.nets import Encoder, Net, Refusal, entry

ANEW = {"memory_refused": "bypasses"}  # from call to call the same tokens give other logits


class _Later(Encoder):
    def forward(self, x):
        return super().forward(2 * x)


@entry("an encoder takes another class in its first call")
class SwapsClass(Encoder):
    def forward(self, x):
        self.__class__ = _Later  # type: ignore[assignment]
        return Encoder.forward(self, x)


class _Turned(Net):
    def forward(self, audio, video):
        self.__class__ = SwapsOwnClass  # type: ignore[assignment]
        return 2 * Net.forward(self, audio, video)


@entry("the model takes another class in each call", **ANEW)
class SwapsOwnClass(Net):
    def forward(self, audio, video):
        self.__class__ = _Turned  # type: ignore[assignment]
        return Net.forward(self, audio, video)


@entry("an encoder puts another forward in the place of its own, which is there after the run")
class SwapsForward(Encoder):
    def forward(self, x):
        self.forward = self.later
        return super().forward(x)

    def later(self, x):
        return super().forward(3 * x)


@entry("the model puts another forward in the place of its own, which is there after the run")
class SwapsOwnForward(Net):
    def forward(self, audio, video):
        self.forward = self.later
        return super().forward(audio, video)

    def later(self, audio, video):
        return super().forward(2 * audio, video)


@entry("the model puts another forward in the place of its own, and takes it away in the next call")
class TurnsOwnForward(SwapsOwnForward):
    def later(self, audio, video):
        del self.forward
        return super().later(audio, video)


@entry("forward is a property", refused=Refusal("opening", "forward of ForwardIsAProperty to be a method"))
class ForwardIsAProperty(Net):
    forward = property(lambda self: self.run)

    def run(self, audio, video):
        return self.classify(self.encode(audio, video))


@entry("an encoder's forward is a property, which chooses by how often it was asked")
class EncoderIsAProperty(Encoder):
    def build(self):
        self.calls = 0

    @property
    def forward(self):
        self.calls += 1
        return self.even if self.calls % 2 else self.odd

    def even(self, x):
        return Encoder.forward(self, x)

    def odd(self, x):
        return Encoder.forward(self, -x)
