"""ABPEM: attention bootstrapping with principal entropy minimisation (Zhao et al., AAAI 2025, arXiv 2503.02221)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_abpem.callback import Options, TestTimeAdaptation
from lightning_abpem.fusion import FusionPatterns
from lightning_abpem.method import Method, Record, Step
from lightning_abpem.objective import Balance, Objective
from lightning_abpem.spans import Modalities

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ABPEM", "Bootstrapping"]


@dataclass(frozen=True)
class Bootstrapping(Method):
    """The fusion attention's q, k and v move by `objective`; predictions come after the update."""

    objective: Objective
    name: ClassVar[str] = "ABPEM"
    needs_attention: ClassVar[bool] = True

    def loss(self, step: Step) -> tuple[Tensor, Record]:
        return self.objective(step.logits, step.attention)


class ABPEM(TestTimeAdaptation):
    """Adapts a multi-modal model to each test batch without labels, before the model predicts on it.

    Attention Bootstrapping with Principal Entropy Minimization (Zhao et al., AAAI 2025, arXiv 2503.02221). In `test`
    and `predict` the model's own step sees logits from the adapted weights; nothing in the LightningModule changes, and
    the source weights return after the run, also after a crash. Only the q, k and v projections of the fusion attention
    move.

    Args:
        fusion: name pattern(s) of the fusion attention module(s), relative to the LightningModule. `*` stands for one
            part of a dotted name, `**` for any number, `NAME[i]` for call i of a module that is called several times in
            a forward. Where self- and cross-attention are modules of their own, a mapping from ordered pairs of
            modalities, ("video", "audio") or "video->audio" with the queries first, to patterns, self pairs included;
            or a rule for all pairs of `modalities`, {"self": ..., "cross": ...}, its patterns with {query} and {key}.
        modalities: the modalities' tokens in the joint sequence: lengths in order, which have to cover it; ranges
            (start, stop), which may leave tokens out; or functions from the target's arguments to (B, N) bool masks.
            "auto" reads them off the concatenation of the encoders' outputs. Where `fusion` is a mapping, the tokens in
            the modality's own sequence, or the names alone: "auto" takes all tokens. Padded tokens never count.
        k: number of most probable classes whose entropy is minimised, in [1, C].
        attention_weight: weight of the attention bootstrapping, >= 0.
        balance_weight: weight of the balance term, >= 0.
        balance: "marginal", the entropy of the batch-mean prediction (the paper), or "read" (READ's variant).
        entropy_weight: weight of the principal entropy, >= 0.
        memory_batches: batches that the loss sees, the current one included; 1 is no memory.
        memory_at: the module whose input tokens are remembered. Default: the parent of the first fusion attention.
        options: those that all methods share: `steps`, `optimizer`, `target`, `logits`, `reset`, `restore`, `stages`,
            `replay`, `predicts`; `TestTimeAdaptation` documents them.

    Attributes:
        updates: steps taken in the last run.
        skipped: steps not taken in the last run, because the loss or a gradient was not finite.
        averages: per dataloader, the last run's figures averaged over samples.

    Raises:
        ValueError: an argument is out of its range, or does not fit the model (before any weight moves).
        MisconfigurationException: the Trainer is used in a way that cannot work.

    Example:
        ``abpem = ABPEM(fusion="model.fusion.*.attn", modalities={"audio": 512, "video": 196}, k=7)``, then
        ``Trainer(callbacks=[abpem]).test(model, data)``; or, without a Trainer,
        ``with abpem.attach(model): logits = model(audio, video)``.
    """

    def __init__(
        self,
        fusion: FusionPatterns,
        modalities: Modalities | Sequence[str] = "auto",
        *,
        k: int,
        attention_weight: float = 1.0,
        balance_weight: float = 1.0,
        balance: Balance = "marginal",
        entropy_weight: float = 1.0,
        memory_batches: int = 1,
        memory_at: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        method = Bootstrapping(Objective(k, attention_weight, balance_weight, balance, entropy_weight))
        super().__init__(method, fusion, modalities, memory_batches=memory_batches, memory_at=memory_at, **options)
