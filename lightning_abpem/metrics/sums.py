"""The base of all metrics here: states are sums and counts, which add up over batches and processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_abpem.functional import widen

__all__ = ["Sums"]


class Sums(Metric):
    """A metric of sums, which are float32 at least, also in a module that is cast to half precision.

    torchmetrics casts states by `module.to(torch.float16)`, as Lightning's "16-true" does. Sums would lose all digits.

    Args:
        kwargs: torchmetrics' own options, such as `sync_on_compute`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._widen()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value, or values one after the other, as torchmetrics does; the present one by default."""
        return self._plot(val, ax)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._widen()
        return self

    def _widen(self) -> None:
        for name, state in self.metric_state.items():
            assert isinstance(state, Tensor)
            setattr(self, name, widen(state))
