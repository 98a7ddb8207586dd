"""The logits in a module's output, which have to be those of one distribution over classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from lightning_abpem.functional import widen

__all__ = ["broken_rows", "check_head", "has_broken_rows", "read_from_outside", "read_logits", "refuse_probabilities"]

_ONE_LABEL = (nn.CrossEntropyLoss, nn.NLLLoss)
_OTHER_HEADS = {
    "several labels at once": (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss),
    "regression": (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.GaussianNLLLoss),
}
_ONE_OUTPUT = (
    " One number for a sample is a regression, which ABPEM cannot adapt (it minimises the entropy of a distribution "
    "over classes), or a binary logit z: then `logits` may return torch.stack([torch.zeros_like(z), z], -1)."
)
_SEVERAL_PREDICTIONS = (
    " One prediction for each sample adapts: pass `logits`, a function to it. Of logits (batch, tokens, classes) it "
    "may be one token's, lambda output: output[:, 0], or the tokens' mean, output.mean(1). Of (batch, classes, ...), "
    "as a segmentation has, output.flatten(2).mean(2). Of (tokens, batch, classes), output[0]."
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

    Logits of -inf, of classes that cannot be, are none.

    Raises:
        ValueError: if every row is non-negative and adds up to one.
    """
    rows = logits.detach().float()
    if bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "Expected logits, but every row of the output is non-negative and adds up to 1: these are probabilities. "
            "Pass `logits`, a function to what enters the softmax, or lambda output: output.log()."
        )


def broken_rows(logits: Tensor) -> Tensor:
    """Return the samples of (B, C) logits that have no prediction: a NaN, an infinite logit, or -inf alone. (B,) bool.

    Logits of -inf beside finite ones are those of classes that cannot be.
    """
    return ~widen(logits).logsumexp(1).isfinite()


def has_broken_rows(logits: Tensor) -> bool:
    """Return True if any sample of (B, C) logits has no prediction; this waits for the device."""
    if math.isfinite(logits.sum().item()):
        return False  # as every logit is then
    return bool(broken_rows(logits).any())


def read_logits(output: object, how: Callable[..., object] | None = None) -> Tensor:
    """Find the (B, C) logits in an output: itself, `.logits`, `["logits"]`, a tuple's (B, C), or `how(output)`.

    `how` gets copies of the output's containers, so that it may take them apart: the caller gets the output whole.

    Raises:
        ValueError: if there are none, or they are not two-dimensional floats of two classes or more.
    """
    logits = _find_logits(output) if how is None else how(tree_map(lambda leaf: leaf, output))
    if how is not None and not isinstance(logits, Tensor):
        raise ValueError(f"Expected `logits` to return a (batch, classes) tensor, but got a {type(logits).__name__}.")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"Expected logits in the target's output, but found none in {_described(output)}. Pass `logits`, a "
            "function from that output to a (batch, classes) tensor."
        )
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        expected = "logits" if how is None else "`logits` to return logits"
        raise ValueError(
            f"Expected {expected} of shape (batch, classes) with at least two classes, but got {tuple(logits.shape)} "
            f"{logits.dtype}.{_way_out(logits)}"
        )
    return logits


def read_from_outside(output: object, how: Callable[..., object] | None) -> Tensor:
    """Find the logits, without a graph, in an output that the caller gets, whose tensors `how` may edit in place."""
    if how is not None:
        output = tree_map_only(Tensor, lambda x: x.detach().clone(), output)
    return read_logits(output, how).detach()


def _find_logits(output: object) -> Any:
    """Return what stands where logits usually do; None if nothing does.

    Raises:
        ValueError: if several tensors of a tuple could be the logits.
    """
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        return output.get("logits")
    if not isinstance(output, tuple | list):
        return output
    candidates = [item for item in output if _may_be_logits(item)]
    if len(candidates) > 1:
        raise ValueError(
            f"Expected one (batch, classes) tensor in the target's output, but got {len(candidates)} that could "
            f"be: {[tuple(item.shape) for item in candidates]}. Pass `logits`, a function to the right one."
        )
    return next(iter(candidates), None)


def _may_be_logits(item: object) -> bool:
    return isinstance(item, Tensor) and item.dim() == 2 and item.is_floating_point()


def _described(output: object) -> str:
    """Return an output's type and, of a container, what it holds by shape and dtype."""
    kind = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        return f"{kind} with keys {sorted(map(str, output))}"
    if isinstance(output, tuple | list):
        return f"{kind} of {[_shape_of(item) for item in output]}"
    return kind


def _shape_of(item: object) -> str:
    return f"{tuple(item.shape)} {item.dtype}" if isinstance(item, Tensor) else type(item).__name__


def _way_out(logits: Tensor) -> str:
    """Return what to pass as `logits` for an output of this shape."""
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        return f" Pass `logits`, a function from the target's output to them.{_ONE_OUTPUT}"
    if logits.dim() > 2:
        return _SEVERAL_PREDICTIONS
    return " Pass `logits`, a function from the target's output to them."
