"""The weights that move: their source values, their optimizer, a step that is taken back if it ruins them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lightning_abpem.engine.checkpoint import check_weights, digest, to_cpu
from lightning_abpem.engine.faults import NOT_FINITE, NOT_FIT, Skips
from lightning_abpem.engine.flags import DeviceFlags
from lightning_abpem.engine.limits import Limits, way
from lightning_abpem.engine.options import OptimizerFactory
from lightning_abpem.engine.shards import assign, full_tensor, is_sharded
from lightning_abpem.modules.parameters import WrittenParameters
from lightning_abpem.modules.refusals import ModelError
from lightning_abpem.modules.tensors import reading_waits, same_bits

__all__ = ["AdaptedWeights", "all_finite"]

log = logging.getLogger(__name__)

_SAID = {
    NOT_FINITE: "The loss, a gradient or the step is not finite.",
    NOT_FIT: "No sample of the batch is fit for a step, by the method's own filters.",
}


class AdaptedWeights:
    """Parameters with an optimizer of their own and the way back to where they came from.

    Parameters narrower than float32 move by way of float32 masters. Adam at 1e-4 would not move a bfloat16 weight of 1,
    and its epsilon is 0 in float16. Those cut into shards move by way of whole ones, the same in every process.

    Args:
        params: what moves, by name; their present values are the source.
        optimizer: from parameters to a torch optimizer.
        before_writing: called before values are written to them.
        learning_rate: of the optimizer, in place of its own; None keeps that.
        limits: what a step, and the way from the source, is held to.

    Attributes:
        updates: steps taken.
        skips: steps not taken.
        written: what the steps wrote, and whether others did.
        updates_since_reset: steps taken since the last reset.

    Raises:
        ValueError: if the factory makes no optimizer, or one that needs a closure.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        optimizer: OptimizerFactory,
        before_writing: Callable[[], None] | None = None,
        learning_rate: float | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._names, self._params = list(params), list(params.values())
        self._factory, self._before_writing = optimizer, before_writing
        self._learning_rate, self._limits = learning_rate, limits or Limits()
        self._source = [p.detach().clone() for p in self._params]
        self._whole_source = [full_tensor(x) for x in self._source]
        self._digest = digest(self._whole_source)
        self._fate: Callable[[], Sequence[bool]] | None = None  # whether gradients and then weights were finite
        self._hidden: list[tuple[nn.Parameter, Tensor | None]] = []
        self.updates = self.updates_since_reset = 0
        self.skips = Skips()
        self._rate = 1.0
        self._away: list[Tensor] | None = None  # the values, while those of another course are in the model
        self.written = WrittenParameters(params)
        self._start()

    def refuse_others(self) -> None:
        """Raise if somebody else has written the weights since they were noted.

        Raises:
            ValueError: naming one of them.
        """
        if (name := self.written.written()) is not None:
            raise ModelError(
                f"Expected weights that only the steps move, but '{name}' was written between two calls. Resets and "
                "the end of the run go back to the values that it had at the start. Adapt each checkpoint in a run of "
                "its own. Swap averaged (EMA) weights in before the run, and back after it."
            )

    def restore(self) -> None:
        """Put the source values back, bit by bit. Where nothing moved nothing is written, for graphs that are kept."""
        pairs = zip(self._params, self._source, strict=True)
        if not all(not is_sharded(p) and same_bits(p.detach(), value) for p, value in pairs):
            self._set(self._source)

    @torch.no_grad()
    def leave(self) -> None:
        """Make room in the model for the weights of another course; nothing but `enter` and `state_dict` comes next."""
        if self._away is None:  # else an interrupt kept it from coming back whole
            self._away = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def enter(self) -> None:
        """Come back into the model; nothing if that is so already."""
        if self._away is not None:
            for master, value in zip(self._masters, self._away, strict=True):
                master.copy_(value)
            self._set(self._masters)
            self._away = None

    def reset(self) -> None:
        """Put the source values back, with a fresh optimizer."""
        self._rate = 1.0
        self.go_back(None)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], loss: Tensor) -> Tensor:
        """Take one step of the optimizer if the loss and its gradients are finite, and the weights stay so.

        Nothing here waits for the device if the optimizer can skip a step by itself, as torch's do with fused=True.

        Returns:
            a bool scalar: True if the step was taken. `settle` tells the host.
        """
        gradients = self._limits.clipped(gradients)
        for old, master in zip(self._before, self._masters, strict=True):
            old.copy_(master)
        step = self._step_on_device if reading_waits(loss) else self._step_on_host
        self._hidden = [(master, master.grad) for master in self._masters]
        try:
            for master, gradient in zip(self._masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.to(master)
            taken = step(loss, *gradients)
            self._set(self._masters)
        except BaseException:  # an interrupt is one, too
            self._take_back()
            raise
        finally:
            self.show_gradients()
        return taken

    def show_gradients(self) -> None:
        """Put the user's gradients back, which a step hides; it can be called again."""
        for master, gradient in self._hidden:
            master.grad = gradient
        self._hidden = []

    def settle(self) -> bool | None:
        """Return True if the last step was taken; None if that was said before, or there was no step."""
        fate, self._fate = self._fate, None
        if fate is None:
            return None
        finite, taken = fate()
        if taken:
            self.updates += 1
            self.updates_since_reset += 1
            return True
        self._count_skipped(NOT_FINITE)
        if finite:  # the optimizer's moments took the weights out of range
            self._start()
        return False

    def skip(self, loss: Tensor) -> None:
        """Count a step for which the method has no gradients; `loss` is what it recorded."""
        if self._params:  # the source model takes no steps that could be missed
            self._count_skipped(NOT_FIT if math.isfinite(loss.item()) else NOT_FINITE)

    def _count_skipped(self, reason: str) -> None:
        self.skips.count(reason, f"{_SAID[reason]} Such steps are skipped, and counted in `skipped`.")

    @property
    def drift(self) -> Tensor:
        """The length of the weights' way from the source, relative to the source's: a scalar."""
        return way(self._masters, self._whole_source, self._whole_source)

    @property
    def are_source(self) -> bool:
        """True if no step was taken since the source values were there."""
        return self.updates_since_reset == 0

    def copied(self) -> list[Tensor]:
        """Return copies of the weights as they are, for `go_back`."""
        return [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def go_back(self, values: Sequence[Tensor] | None, rate: float = 1) -> None:
        """Put earlier weights back, the source's for None, with a fresh optimizer.

        Args:
            values: what `copied` returned.
            rate: factor of the learning rate from now on, besides earlier ones.
        """
        self._rate *= rate
        self._away = None
        self._set(self._source)
        self._start()
        if values is None:
            self.updates_since_reset = 0
            return
        for master, value in zip(self._masters, values, strict=True):
            master.copy_(value)
        self._set(self._masters)

    @contextmanager
    def at_source(self) -> Iterator[None]:
        """Put the source values into the model while the block lasts."""
        moved = [p.detach().clone() for p in self._params]
        try:
            self._set(self._source)
            yield
        finally:
            self._set(moved)

    def state_dict(self) -> dict[str, Any]:
        """Return the adapted values, the optimizer and the counters; of the source its digest alone."""
        return {
            "params": dict(zip(self._names, self._masters if self._away is None else self._away, strict=True)),
            "source": self._digest,
            "optimizer": {} if self._optimizer is None else self._optimizer.state_dict(),
            "optimizer_class": type(self._optimizer).__name__,
            "counts": [self.updates, self.updates_since_reset],
            "skipped_for": self.skips.counts,
            "rate": self._rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run stopped, if it began with the same source.

        Raises:
            ValueError: if it did not, or if something else does not fit; nothing has changed then.
        """
        self.settle()
        self.check(state)
        self._rate, self._away = state["rate"], None
        masters, optimizer = self._fresh()
        if masters:
            rates = [group["lr"] for group in optimizer.param_groups]  # an option, which may be another by now
            optimizer.load_state_dict(to_cpu(state["optimizer"]))  # a copy: it would step with the state's tensors
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self._use(masters, optimizer)
        with torch.no_grad():
            for name, master in zip(self._names, masters, strict=True):
                master.copy_(state["params"][name])
        self._set(masters)
        self.updates, self.updates_since_reset = state["counts"]
        self.skips.counts = dict(state["skipped_for"])

    def check(self, state: Mapping[str, Any]) -> None:
        """Hold a state against this model.

        Raises:
            ValueError: if it does not fit.
        """
        check_weights(state, self.state_dict(), self._factory)

    @torch.no_grad()  # also if an interrupt kept the optimizer's enable_grad() from its end
    def _take_back(self) -> None:
        """Put the weights back to what they were before a step that failed, with a fresh optimizer."""
        for old, master in zip(self._before, self._masters, strict=True):
            master.copy_(old)
        self._fate = None
        self._start()
        self._set(self._masters)

    def _step_on_host(self, *gradients: Tensor | None) -> Tensor:
        """Step on a device whose values the host can read at no cost."""
        finite = taken = _are_finite(*gradients)
        if finite:
            with torch.enable_grad():
                self._optimizer.step()
            self._limits.hold(self._masters, self._before, self._whole_source)
            taken = _are_finite(*self._masters)
        for old, master in zip(self._before, self._masters, strict=True):
            if taken:
                increment_version(master)  # which fused kernels do not
            else:
                master.copy_(old)
        self._fate = lambda: (finite, taken)
        return torch.tensor(taken)

    def _step_on_device(self, *gradients: Tensor | None) -> Tensor:
        """Step without reading a value on the host, which would wait for the device."""
        optimizer, finite = self._optimizer, all_finite(*gradients)
        with torch.enable_grad():
            # "_step_supports_amp_scaling" is torch's name for what takes `found_inf`.
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
            elif finite:
                optimizer.step()
        self._limits.hold(self._masters, self._before, self._whole_source)
        taken = finite & all_finite(*self._masters)
        for old, master in zip(self._before, self._masters, strict=True):
            master.copy_(master.where(taken, old))
        self._fate = DeviceFlags(finite, taken).read
        return taken

    def _start(self) -> None:
        self._use(*self._fresh())

    def _use(self, masters: list[nn.Parameter], optimizer: Any) -> None:
        self._masters, self._optimizer = masters, optimizer
        self._before = [torch.empty_like(master, requires_grad=False) for master in masters]

    def _fresh(self) -> tuple[list[nn.Parameter], Any]:
        masters = [_master(p) for p in self._params]
        if not masters:  # the source model: nothing moves
            return masters, None
        optimizer = self._factory(masters)
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"Expected `optimizer` to make a torch optimizer that steps without a closure, but got {optimizer!r}."
            )
        for group in optimizer.param_groups:
            own = group["lr"] if self._learning_rate is None else self._learning_rate
            group["lr"] = own if self._rate == 1 else own * self._rate
        return masters, optimizer

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        if self._before_writing is not None:
            self._before_writing()
        for parameter, value in zip(self._params, values, strict=True):
            if value is not parameter:
                assign(parameter, value)
        torch.clear_autocast_cache()  # a surrounding autocast would go on with the casts of the old values
        self.written.note()


def _master(p: nn.Parameter) -> nn.Parameter:
    """Return what the optimizer moves: the parameter itself if it is whole and wide enough."""
    is_narrow = p.dtype in (torch.float16, torch.bfloat16)
    if not is_narrow and not is_sharded(p):
        return p
    value = full_tensor(p.detach())
    return nn.Parameter(value.float() if is_narrow else value.clone())


def all_finite(*tensors: Tensor | None) -> Tensor:
    """Return a bool scalar: True if no tensor holds NaN or infinity. None counts as finite."""
    extremes = _extremes(tensors)
    if not extremes:
        return torch.tensor(True)
    return (torch.stack(extremes) * 0).sum() == 0  # NaN, if one of them is not finite


def _are_finite(*tensors: Tensor | None) -> bool:
    """Return True on the host if no tensor holds NaN or infinity."""
    return all(math.isfinite(extreme.item()) for extreme in _extremes(tensors))


def _extremes(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The least and the largest value of every tensor: NaN passes through them, and nothing of its size is written.

    `aminmax` is several times slower than both alone where a tensor is not contiguous.
    """
    there = [x for x in tensors if x is not None and x.numel()]
    pairs = [x.aminmax() if x.is_contiguous() else (x.amin(), x.amax()) for x in there]
    return [extreme for pair in pairs for extreme in pair]
