"""Where the logits are in a module's output, and whether they are those of one distribution over classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["check_head", "read_logits", "refuse_probabilities"]

_ONE_LABEL = (nn.CrossEntropyLoss, nn.NLLLoss)
_OTHER_HEADS = {
    "several labels at once": (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss),
    "regression": (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss),
}
_ONE_OUTPUT = (
    " One number for a sample is a regression, which ABPEM cannot adapt (it minimises the entropy of a distribution "
    "over classes), or a binary logit z: then `logits` may return torch.stack([torch.zeros_like(z), z], -1)."
)
_PROBLEM_TYPES = {"multi_label_classification": "several labels at once", "regression": "regression"}


def check_head(model: nn.Module) -> None:
    """Hold a model against the method: principal entropy is that of one distribution over the classes.

    What tells are the losses and metrics among its modules, and the `problem_type` of a Hugging Face configuration.

    Raises:
        ValueError: if the model is made for several labels at once or for regression.
    """
    modules = list(model.modules())
    if any(isinstance(module, _ONE_LABEL) or type(module).__name__.startswith("Multiclass") for module in modules):
        return
    for module in modules:
        name = type(module).__name__
        problem = getattr(getattr(module, "config", None), "problem_type", None)
        kind = _PROBLEM_TYPES.get(problem) if isinstance(problem, str) else None
        sign = f"problem_type={problem!r}" if kind else name
        kind = kind or next((kind for kind, losses in _OTHER_HEADS.items() if isinstance(module, losses)), None)
        kind = kind or ("several labels at once" if name.startswith("Multilabel") else None)
        if kind:
            raise ValueError(
                f"Expected a model that gives each sample one of several classes, but its {sign} is for {kind}: ABPEM "
                "minimises the entropy of one distribution over classes, and sigmoid outputs or real numbers are "
                "none. If the logits are those of a softmax all the same, pass `logits`, a function to them."
            )


def refuse_probabilities(logits: Tensor) -> None:
    """Hold the first logits against probabilities, whose softmax would be nearly even.

    Raises:
        ValueError: if every row is non-negative and adds up to one.
    """
    rows = logits.detach().float()
    if bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "Expected logits, but every row of the output is non-negative and adds up to 1: these are probabilities. "
            "Pass `logits`, a function to what enters the softmax, or lambda output: output.log()."
        )


def read_logits(output: Any, how: Callable[..., Any] | None = None) -> Tensor:
    """The (B, C) logits in an output: itself, `.logits`, `["logits"]`, a tuple's (B, C), or `how(output)`.

    Raises:
        ValueError: if there are none, or they are not two-dimensional floats of two classes or more.
    """
    logits = output
    if how is not None:
        logits = how(output)
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        candidates = [item for item in output if _may_be_logits(item)]
        if len(candidates) > 1:
            raise ValueError(
                f"Expected one (batch, classes) tensor in the target's output, but got {len(candidates)} that could "
                f"be: {[tuple(item.shape) for item in candidates]}. Pass `logits`, a function to the right one."
            )
        logits = next(iter(candidates), None)
    if how is not None and not isinstance(logits, Tensor):
        raise ValueError(f"Expected `logits` to return a (batch, classes) tensor, but got a {type(logits).__name__}.")
    if not isinstance(logits, Tensor):
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ValueError(
            f"Expected logits in the target's output, but found none in a {type(output).__name__}{keys}. Pass "
            "`logits`, a function from that output to a (batch, classes) tensor."
        )
    one = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"Expected logits of shape (batch, classes) with at least two classes, but got {tuple(logits.shape)} "
            f"{logits.dtype}. Pass `logits`, a function from the target's output to them.{_ONE_OUTPUT * one}"
        )
    return logits


def _may_be_logits(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() == 2 and item.is_floating_point()
