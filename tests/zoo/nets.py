"""Parts of the zoo's models, and an entry with the facts of each model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

WIDTH, HEADS, CLASSES = 12, 3, 5
AUDIO, VIDEO = 6, 4
SPANS = (slice(0, AUDIO), slice(AUDIO, AUDIO + VIDEO))
BATCHES, SIZE = 4, 3


class Call:
    """One call's arguments, as a loader hands them on untouched: no container that it knows."""

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def tensors(count: int = BATCHES, size: int = SIZE) -> list[tuple[Tensor, Tensor]]:
    """Batches of (audio, video), float64, the same every time."""
    generator = torch.Generator().manual_seed(1)

    def draw(tokens: int) -> Tensor:
        return torch.randn(size, tokens, 3, generator=generator, dtype=torch.double)

    return [(draw(AUDIO), draw(VIDEO)) for _ in range(count)]


class Encoder(nn.Module):
    """(B, N, 3) -> (B, N, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH)
        self.build()

    def build(self) -> None:
        """Add the subclass's own parts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x).tanh())


class Attention(nn.Module):
    """Linear layers for q, k and v, which a twin can take by hand."""

    num_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Net(LightningModule):
    """Two encoders, one fusion block, a head; `core` names the module that holds them."""

    def __init__(self, audio: nn.Module | None = None) -> None:
        super().__init__()
        # Any: the models of single entries put parts of many kinds there.
        self.audio: Any = audio or Encoder()
        self.video: Any = Encoder()
        self.fusion: Any = nn.Sequential(Block())
        self.head: Any = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))
        self.build()

    def build(self) -> None:
        """Add the subclass's own parts."""

    @classmethod
    def call(cls, index: int, audio: Tensor, video: Tensor) -> Call:
        """The arguments of one batch."""
        return Call(audio, video)

    @classmethod
    def calls(cls) -> list[Call]:
        """The arguments of all batches, new ones every time."""
        return [cls.call(i, *pair) for i, pair in enumerate(tensors())]

    def encode(self, audio: Tensor, video: Tensor) -> Tensor:
        return torch.cat((self.audio(audio), self.video(video)), dim=1)

    def classify(self, x: Tensor) -> Tensor:
        return 3 * self.head(self.fusion(x).mean(1))

    def forward(self, audio: Tensor, video: Tensor) -> Any:
        return self.classify(self.encode(audio, video))

    def step(self, call: Call) -> Any:
        return self(*call.args, **call.kwargs)

    def predict_step(self, call: Call, batch_idx: int) -> Any:
        return self.step(call)


class Refusal(NamedTuple):
    """An error that names the thing: when it comes, and what it says."""

    at: Literal["opening", "call"]
    message: str
    batch: int = 0  # of the call that raises
    is_needed: bool = True  # False: the thing may as well be kept, to the last bit
    steps: tuple[int, ...] = (0, 1)  # with which it is refused
    moved: str = ""  # parameters that the forward itself has edited by then, by the beginning of their names


@dataclass(frozen=True)
class Entry:
    """A model of the zoo and what is expected of it.

    Args:
        name: of the entry.
        why: what is different about it.
        make: the model, seeded, in eval mode, float64.
        calls: the arguments of all batches, new ones every time.
        options: ABPEM's, beyond those of all.
        refused: how it is refused; None if it is kept.
        memory: why it is not run with a memory, if so.
        memory_refused: what the refusal with a memory says, if it is refused with one alone.
        only: ("attach" or "Trainer", why not the other).
        around: the mode that the caller has, in `attach`.
        tolerance: between adapted predictions and the twin's.
        twin: why no twin by hand is compared, if so.
        core: name of the module that has the fusion block.
    """

    name: str
    why: str
    make: Callable[[], Net]
    calls: Callable[[], list[Call]]
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: Refusal | None = None
    memory: str = ""
    memory_refused: str = ""
    only: tuple[str, str] | None = None
    around: Literal["no_grad", "inference_mode", "grad", "autocast"] = "no_grad"
    tolerance: float = 1e-10
    twin: str = ""
    core: str = ""


ENTRIES: dict[str, Entry] = {}


def entry(why: str, **known: Any) -> Callable[[Any], Any]:
    """Put a Net, an Encoder (as the audio encoder of one) or a function that gives a Net into the zoo."""

    def register(made: Any) -> Any:
        name = re.sub(r"(?<!^)(?=[A-Z])|_", "-", made.__name__).lower()
        assert name not in ENTRIES, name
        is_net = isinstance(made, type) and issubclass(made, Net)
        calls = made.calls if is_net else known.pop("calls", Net.calls)

        def make() -> Net:
            torch.manual_seed(0)
            is_encoder = isinstance(made, type) and issubclass(made, Encoder)
            net = Net(made()) if is_encoder else made()
            return net.double().eval() if known.get("around") != "autocast" else net.eval()

        ENTRIES[name] = Entry(name, why, make, calls, **known)
        return made

    return register
