"""ABPEM: attention bootstrapping with principal entropy minimisation (Zhao et al., AAAI 2025, arXiv 2503.02221)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_abpem.attention.fusion import FusionPatterns
from lightning_abpem.attention.spans import Modalities
from lightning_abpem.callback import TestTimeAdaptation
from lightning_abpem.engine.checks import check_integer, shown
from lightning_abpem.engine.method import Gradients, Method, Record, Rerun, Step
from lightning_abpem.functional import widen
from lightning_abpem.methods.objective import Auto, Balance, Objective, Parts, weighted
from lightning_abpem.methods.stream import StreamPredictions, extend_stream
from lightning_abpem.trainer import options
from lightning_abpem.trainer.options import documented, shared

__all__ = ["ABPEM", "GUARDED", "RECIPES", "Bootstrapping", "Recipe"]


_SHARE = 0.3  # of the length of the other parts' gradient, that "auto" gives to the bootstrapping's


class Recipe(NamedTuple):
    """The authors' settings for one benchmark and one modality that fails."""

    k: int
    attention_weight: float
    memory_samples: int
    batch_size: int


RECIPES = {
    "kinetics50-audio": Recipe(7, 5.0, 32, 8),
    "kinetics50-video": Recipe(8, 1.0, 32, 8),
    "vggsound-audio": Recipe(30, 1.0, 64, 32),
    "vggsound-video": Recipe(28, 1.0, 128, 32),
}


GUARDED = {
    "learning_rate": 3e-3,
    "max_step": 0.01,
    "max_drift": 0.15,
    "anchor": 0.01,
    "monitor": "source",
    "guard": "rollback",
}  # chosen on the development split of the digits, with one source model


@dataclass(frozen=True)
class Bootstrapping(Method):
    """The fusion attention's q, k and v move by `objective`; predictions come after the update."""

    objective: Objective
    name: ClassVar[str] = "ABPEM"
    needs_attention: ClassVar[bool] = True

    @property
    def balances_batch(self) -> bool:
        return self.objective.balance != "stream" and self.objective.balance_weight > 0

    @property
    def moves_scores(self) -> bool:
        return self.objective.attention_weight != 0

    def loss(self, step: Step) -> tuple[Tensor, Record]:
        """Return the loss; with attention_weight="auto", which takes gradients, that of the other parts alone."""
        parts, weight = self._parts(step), self.objective.attention_weight
        loss = parts.confidence
        if weight != "auto" and weight:
            loss = loss + weighted(weight, parts.bootstrapping)
        return loss, {"loss": loss.detach(), **parts.record}

    def gradients(self, step: Step, rerun: Rerun) -> tuple[Gradients | None, Record]:
        if self.objective.attention_weight != "auto":
            return super().gradients(step, rerun)
        parts = self._parts(step)
        others, pull = step.gradients_of(parts.confidence, parts.bootstrapping)
        weight = _SHARE * _relative_length(others, pull)
        loss = parts.confidence.detach() + weight * parts.bootstrapping.detach()
        return _sum(others, pull, weight), {"loss": loss, "attention_weight": weight, **parts.record}

    def _parts(self, step: Step) -> Parts:
        """Return the objective's parts. The stream's predictions so far are all that is remembered."""
        known = step.state.get("stream")
        stream = None if known is None else StreamPredictions(*known)  # of a loaded state it is a list
        if self.objective.balance != "stream":
            return self.objective(step.logits, step.attention)
        if step.is_first or stream is None:
            stream = step.state["stream"] = extend_stream(stream, step.logits[-step.samples :])
        return self.objective(step.logits, step.attention, stream)


def _relative_length(others: Gradients, pull: Gradients) -> Tensor:
    """Return |others| / |pull| over the entries where `pull` is not 0: a scalar, 0 if there are none."""
    pairs = [(widen(a), widen(b)) for a, b in zip(others, pull, strict=True) if a is not None and b is not None]
    longer = torch.stack([a.where(b != 0, 0).norm() for a, b in pairs]).norm()
    length = torch.stack([b.norm() for _, b in pairs]).norm()
    return (longer / length.where(length > 0, 1)).where(length > 0, 0)


def _sum(others: Gradients, pull: Gradients, weight: Tensor) -> Gradients:
    return [
        a if b is None else b * weight.to(b) if a is None else a + b * weight.to(b)
        for a, b in zip(others, pull, strict=True)
    ]


@documented
class ABPEM(TestTimeAdaptation):
    """Adapts a multi-modal model to each test batch without labels, before the model predicts on it.

    Attention Bootstrapping with Principal Entropy Minimization (Zhao et al., AAAI 2025, arXiv 2503.02221). In `test`
    and `predict` the model's own step sees logits from the adapted weights. Nothing in the LightningModule changes, and
    the source weights return after the run, also after a crash. Only the q, k and v projections of the fusion attention
    move.

    The options from `steps` on are those of every method: `EngineOptions` and `RunOptions` document them.

    Args:
        fusion: name pattern(s) of the fusion attention module(s), relative to the LightningModule. `*` stands for one
            part of a dotted name, `**` for any number, `NAME[i]` for call i of a module that is called several times in
            a forward. Where self- and cross-attention are modules of their own: a mapping from ordered pairs of
            modalities to patterns, self pairs included. A pair is ("video", "audio") or "video->audio", the queries
            first. Or a rule for all pairs of `modalities`, {"self": ..., "cross": ...}, its patterns with {query} and
            {key}.
        modalities: the modalities' tokens in the joint sequence: lengths in order, ranges (start, stop), or functions
            from the target's arguments to (B, N) bool masks. Lengths have to cover the sequence; ranges may leave
            tokens out. "auto" reads them off the concatenation of the encoders' outputs. Where `fusion` is a mapping,
            the tokens in the modality's own sequence, or the names alone: "auto" takes all tokens. Padded tokens never
            count.
        k: number of most probable classes whose entropy is minimised, in [1, C]; "auto" is the square root of C.
        attention_weight: weight of the attention bootstrapping, >= 0; "auto" makes its gradient, in every step, 0.3
            times as long as that of the other parts.
        balance_weight: weight of the balance term, >= 0.
        balance: "marginal", the entropy of the batch-mean prediction (the paper), "stream", or "read" (READ's variant).
            "stream" is "marginal" as far as consecutive predictions agree no more than any two of the stream. For the
            rest it is the batch against the classes predicted so far, so that labels need not be shuffled.
        entropy_weight: weight of the principal entropy, >= 0.
        memory_batches: batches that the loss sees, the current one included; 1 is no memory.
        memory_at: the module whose input tokens are remembered. Default: the layer around the fusion attention,
            or what calls them, around several.

    Attributes:
        updates: steps taken in the last run.
        skipped: steps not taken in the last run: something was not finite, or the batch could not be adapted.
        skipped_for: the same by reason, as counts.
        left_out: samples left out of steps in the last run, for their logits were not finite.
        events: what the guard did in the last run.
        averages: per dataloader, the last run's figures averaged over samples.

    Raises:
        ValueError: an argument is out of its range, or does not fit the model (before any weight moves).
        MisconfigurationException: the Trainer is used in a way that cannot work.

    No default needs labels; the paper's settings, chosen per data set and per modality that fails, are `published`.
    To leave it on where nobody watches, begin with `guarded`.

    Example:
        ``abpem = ABPEM(fusion="model.fusion.*.attn", modalities={"audio": 512, "video": 196})``, then
        ``Trainer(callbacks=[abpem]).test(model, data)``; or, without a Trainer,
        ``with abpem.attach(model): logits = model(audio, video)``.
    """

    def __init__(
        self,
        fusion: FusionPatterns,
        modalities: Modalities | Sequence[str] = "auto",
        *,
        k: int | Auto = "auto",
        attention_weight: float | Auto = "auto",
        balance_weight: float = 1.0,
        balance: Balance = "stream",
        entropy_weight: float = 1.0,
        memory_batches: int = 1,
        memory_at: str | None = None,
        steps: int = 1,
        optimizer: options.OptimizerFactory | None = None,
        target: str | None = None,
        logits: options.Logits | None = None,
        reset: options.Reset = "never",
        restore: bool = True,
        replay: bool = True,
        predicts: options.Predicts | None = None,
        sync: options.Sync = "global",
        projections: options.Projections | None = None,
        learning_rate: options.LearningRate | None = None,
        clip_gradients: float | None = None,
        anchor: float = 0.0,
        max_step: float | None = None,
        max_drift: float | None = None,
        monitor: options.Monitor = 8,
        guard: options.GuardAction = "warn",
        on_error: options.OnError = "predict",
        stages: Sequence[options.Stage] = ("test", "predict"),
        verbose: options.Verbose = 1,
        figures: options.Chosen = "headline",
        report: options.Page | None = None,
    ) -> None:
        method = Bootstrapping(Objective(k, attention_weight, balance_weight, balance, entropy_weight))
        own = shared(locals())
        super().__init__(method, fusion, modalities, memory_batches=memory_batches, memory_at=memory_at, **own)

    @classmethod
    def published(
        cls,
        fusion: FusionPatterns,
        modalities: Modalities | Sequence[str],
        recipe: str,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> ABPEM:
        """The method as its authors ran it: their k, weight and memory, and the balance over the batch alone.

        Args:
            fusion: as for the class.
            modalities: as for the class.
            recipe: "kinetics50-audio", "kinetics50-video", "vggsound-audio" or "vggsound-video": the data, and the
                modality that fails.
            batch_size: of your batches, if not the authors' (8 and 32): the memory holds as many samples as theirs.
            options: any others of the class, by name.

        Raises:
            ValueError: there is no such recipe, or `batch_size` is no integer >= 1.
        """
        if not isinstance(recipe, str) or recipe not in RECIPES:
            raise ValueError(f"Expected `recipe` to be one of {', '.join(RECIPES)}, but got {shown(recipe)}.")
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        chosen = RECIPES[recipe]
        return cls(
            fusion,
            modalities,
            k=chosen.k,
            attention_weight=chosen.attention_weight,
            balance="marginal",
            memory_batches=max(chosen.memory_samples // (batch_size or chosen.batch_size), 1),
            **options,
        )

    @classmethod
    def guarded(cls, fusion: FusionPatterns, modalities: Modalities | Sequence[str] = "auto", **options: Any) -> ABPEM:
        """The method to leave on: steps and drift are bounded relative to the source, and harm is taken back.

        A step is at most 0.01 of the source's length, and the way from it 0.15. So rates from 3e-3 on do much the same.
        Every batch is compared with the source. docs/reliability has what that saved, and cost, where it was measured.

        Args:
            fusion: as for the class.
            modalities: as for the class.
            options: any others of the class, by name; also in place of learning_rate=3e-3, max_step=0.01,
                max_drift=0.15, anchor=0.01, monitor="source" and guard="rollback".
        """
        return cls(fusion, modalities, **{**GUARDED, **options})
