"""Runs put together at random: a small model, batches, options of a method; and what has to hold of each."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.methods import ABPEM, EATA, MMTTA, READ, SAR, Source, SuMi, Tent
from tests.attention.variants import VARIANTS
from tests.toy import HEADS, WIDTH, Block, HiddenKernel, Toy, heads_first
from tests.zoo.harness import fingerprint, random_state, set_random_state

SECONDS = 60  # for one case, which takes some milliseconds
METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "ABPEM": ABPEM,
    "READ": lambda fusion, modalities, **options: READ(fusion, **options),
    "Tent": lambda fusion, modalities, **options: Tent(**options),
    "EATA": lambda fusion, modalities, **options: EATA(**options),
    "SAR": lambda fusion, modalities, **options: SAR(**options),
    "MM-TTA": lambda fusion, modalities, **options: MMTTA({"audio": 0, "video": 1}, **options),
    "SuMi": lambda fusion, modalities, **options: SuMi(
        {"audio": 0, "video": 1}, {"audio": "audio", "video": "video"}, **options
    ),
    "Source": lambda fusion, modalities, **options: Source(**options),
}
ATTENTIONS: dict[str, Callable[[], nn.Module]] = {name: own.make for name, own in VARIANTS.items()}
ATTENTIONS["hidden kernel"] = HiddenKernel


class CrossAttention(nn.Module):
    """Queries of one modality, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = heads_first(self.query(x)), heads_first(self.key(y)), heads_first(self.value(y))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Separate(nn.Module):
    """Fusion by a module for each ordered pair of modalities; self-attention first."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.own = nn.ModuleDict({name: CrossAttention() for name in ("audio", "video")})
        self.cross = nn.ModuleDict({name: CrossAttention() for name in ("audio", "video")})

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        audio, video = self.own["audio"](audio, audio), self.own["video"](video, video)
        return torch.cat((self.cross["audio"](audio, video), self.cross["video"](video, audio)), 1)


class Model(Toy):
    """The toy with any number of classes, and an output of several forms."""

    def __init__(self, case: Case) -> None:
        super().__init__(depth=case.depth)
        self.separate = Separate() if case.attention == "separate" else None
        if self.separate is None:
            self.fusion = nn.Sequential(*(Block(ATTENTIONS[case.attention]()) for _ in range(case.depth)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, case.classes))
        self.form = case.output

    def forward(self, audio: Tensor, video: Tensor) -> Any:
        audio, video = self.audio(audio), self.video(video)
        joint = self.fusion(torch.cat((audio, video), 1)) if self.separate is None else self.separate(audio, video)
        logits = self.head(joint.mean(1))
        if self.form == "dict":
            return {"logits": logits, "tokens": joint}
        if self.form == "tuple":
            return joint, logits
        if self.form == "softmax":
            return logits.softmax(-1)
        if self.form == "hidden class":
            return torch.cat((logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)), 1)
        return logits if self.form == "logits" else self.head(joint)


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        method: by its name.
        attention: one of `ATTENTIONS`, or "separate".
        depth: layers of fusion.
        classes: of the head.
        output: what the forward puts out.
        dtype: of model and inputs.
        tokens: of audio and video, by batch.
        sizes: samples, by batch.
        content: of the inputs, by batch.
        around: the caller's mode.
        modalities: as given; None for lengths that fit the first batch.
        fusion: as given; None for what fits.
        options: of the callback.
        frozen: every which parameter the user has frozen; 0 for none.
    """

    method: str
    attention: str
    depth: int
    classes: int
    output: str
    dtype: torch.dtype
    tokens: list[tuple[int, int]]
    sizes: list[int]
    content: list[str]
    around: str
    modalities: Any = None
    fusion: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    frozen: int = 0

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for size, tokens, content in zip(self.sizes, self.tokens, self.content, strict=True):
            parts = [torch.randn(size, n, 3, generator=generator) for n in tokens]
            if content == "zeros":
                parts[1].zero_()
            elif content == "alike":
                parts = [part[:1, :1].expand(part.shape).clone() if size else part for part in parts]
            elif content == "huge":
                parts[0] *= 1e30
            elif content != "normal" and size:
                parts[0][0] = float(content)
            audio, video = (part.to(self.dtype) for part in parts)
            batches.append((audio, video))
        return batches

    def model(self) -> Model:
        torch.manual_seed(0)
        model = Model(self).eval().to(self.dtype)
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(not self.frozen or i % self.frozen > 0)
            p.grad = torch.ones_like(p) if i % 5 == 0 else None
        return model

    def callback(self) -> TestTimeAdaptation:
        fusion = self.fusion
        if fusion is None:
            fusion = "fusion.*.attn"
            if self.attention == "separate":
                fusion = {"self": "separate.own.{query}", "cross": "separate.cross.{query}"}
        modalities = self.modalities
        if modalities is None:
            modalities = dict(zip(("audio", "video"), self.tokens[0], strict=True))
            if self.attention == "separate":
                modalities = list(modalities)
        return METHODS[self.method](fusion, modalities, **{"on_error": "raise", **self.options})


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output[1] if isinstance(output, tuple) else output


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise in the main thread if a case hangs."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def caller(around: str) -> ExitStack:
    """The mode in which the user calls the model."""
    stack = ExitStack()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": nullcontext}
    stack.enter_context(modes.get(around, torch.no_grad)())
    if around in ("bfloat16", "float16"):
        stack.enter_context(torch.autocast("cpu", getattr(torch, around)))
    return stack


def modes() -> tuple[Any, ...]:
    """Return the process's modes, which a run has to leave as they were."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        len(_get_current_function_mode_stack()),
    )


NOT_CALLED = "not called"


def plain(case: Case) -> list[Tensor]:
    model = case.model()
    with caller(case.around):
        return [logits_of(model(*batch)).clone() for batch in case.batches()]


def try_case(case: Case) -> str:
    """Run a case; return "adapted", "skipped", "observed" or the error's message. Raise if a promise is broken."""
    expected = plain(case)
    model, state = case.model(), random_state()
    before, around = fingerprint(model), modes()
    given: list[Tensor] = []
    try:
        with limited_time(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            callback = case.callback()
            with caller(case.around), callback.attach(model) as adaptation:
                for batch in case.batches():
                    given.append(logits_of(model(*batch)).detach().clone())
                result = check_counts(case, adaptation)
        is_warned = any("without a call of the target" in str(own.message) for own in said)
        assert is_warned == (result == NOT_CALLED)
    except (ValueError, MisconfigurationException) as error:
        result = check_message(error)
    assert modes() == around
    assert fingerprint(model) == before, "the model is not as it was"
    if case.options.get("steps") == 0 or case.method == "Source":
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(given, expected, strict=False))
    for i, (own, wanted) in enumerate(zip(given, expected, strict=False)):
        assert own.shape == wanted.shape
        assert torch.equal(own.isnan().any(-1), wanted.isnan().any(-1)), f"other samples of batch {i} are NaN"
        assert own.isposinf().any() <= wanted.isposinf().any(), f"batch {i} is infinite"
    set_random_state(state)
    with caller(case.around):
        after = [logits_of(model(*batch)) for batch in case.batches()]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, expected, strict=True))
    return result


def check_counts(case: Case, adaptation: Any) -> str:
    """Every step of a batch that has samples is taken or counted as skipped; a target may be called by nobody."""
    if case.options.get("target") and not adaptation.calls:
        return NOT_CALLED
    assert adaptation.calls == len(case.sizes)
    steps = case.options.get("steps", 1) * sum(size > 0 for size in case.sizes)
    if case.method == "Source" or steps == 0:
        assert adaptation.updates == 0
        assert set(adaptation.skipped_for) <= {"does not fit"}  # not even to be observed
        return "observed"
    assert set(adaptation.skipped_for) <= {"does not fit", "not finite", "not fit"}, adaptation.skipped_for
    taken = adaptation.updates + adaptation.skipped
    assert taken <= steps if case.options.get("guard") == "freeze" else taken == steps, (taken, steps)
    return "adapted" if adaptation.updates else "skipped"


def check_message(error: Exception) -> str:
    """The house's grammar: a whole sentence that says what was expected, and what was seen."""
    message = str(error)
    assert message[-1] in ".)", message
    assert "Expected " in message or " needs " in message or "was called, but" in message, message
    assert len(message.split()) > 6, message
    return message


def sgd(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=lr)
