"""Copies that stand in for tensors which an earlier run in inference mode left in a model: autograd refuses those."""

from __future__ import annotations

from contextlib import suppress
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_abpem.modules.containers import Saved, SavedAttributes, SavedDict, SavedSet
from lightning_abpem.modules.patches import Changes
from lightning_abpem.modules.refusals import add_note
from lightning_abpem.modules.tensors import normal_tensor, same_bits
from lightning_abpem.modules.walk import Walk

__all__ = ["explain_gradients", "explain_inference", "without_inference_tensors"]

_WITHOUT_GRADIENTS = (
    "on Tensor that requires grad",  # .numpy()
    "support the deepcopy protocol",
    "out=... arguments don't support automatic differentiation",
    "is a view and is being modified inplace",
)
_OUT_OF_REACH = (
    "An earlier run under torch.inference_mode(), such as a Trainer's, has left a tensor where ABPEM cannot reach it: "
    "in a functools.lru_cache with a maxsize, a variable of a Python module, or an object in C. Empty it before you "
    "adapt (cache_clear()), or make that run with Trainer(inference_mode=False)."
)


class _StandIn(NamedTuple):
    """A copy in the place of a tensor of inference mode, or of a tuple that holds some.

    Args:
        before: the tensor or the tuple.
        own: its copy.
        memories: the addresses of the tensors' memory.
        version: of a tensor's copy, as it was made.
    """

    before: Any
    own: Any
    memories: set[int]
    version: int | None = None

    @property
    def is_written(self) -> bool:
        """True if the run wrote something newer into the copy; not every edit counts the version up."""
        own, before = self.own, self.before
        if self.version is None:
            return False
        if own._version != self.version or own.shape != before.shape or own.stride() != before.stride():
            return True
        return own.layout == torch.strided and not own.is_nested and not same_bits(own.detach(), before)


class _StandIns:
    """The copies, and the containers that they were put into."""

    def __init__(self) -> None:
        self.by_id: dict[int, _StandIn] = {}
        self.containers: list[Saved] = []

    def put_back(self) -> None:
        """Put back what was there before, unless the run wrote into it or into what shares memory with it."""
        written = set[int]().union(*(x.memories for x in self.by_id.values() if x.is_written))
        known = -1
        while known < len(written):  # a tuple ties those in it together
            known = len(written)
            written.update(*(x.memories for x in self.by_id.values() if not x.memories.isdisjoint(written)))
        before = {key: x.before for key, x in self.by_id.items() if x.memories.isdisjoint(written)}
        for saved in self.containers:
            saved.exchange(before)


class _Search(Walk):
    """Puts copies in the places of tensors of inference mode, wherever it can reach them."""

    def __init__(self, model: nn.Module, stand_ins: _StandIns) -> None:
        super().__init__(model, is_sharded=False)
        self._stand_ins = stand_ins
        self._memories: dict[int, Any] = {}  # copies by the address of the memory

    def run(self) -> None:
        """Search from the model on."""
        self._find(self._target, None, "the model")
        self._save_all()
        for saved in self._stand_ins.containers:
            saved.items = saved.given = {}  # which the run is not to keep alive

    def _replace(self, saved: Saved, stand_ins: dict[Any, Any]) -> None:
        if not isinstance(saved, SavedSet):  # a snapshot names it
            self._stand_ins.containers.append(saved)
            saved.exchange({id(saved.items[key]): own for key, own in stand_ins.items()})

    def _tensor(self, x: Tensor) -> Tensor:
        self._save(SavedAttributes(x))
        if type(x) is not Tensor:
            self._save_kind(x)
        if not x.is_inference():
            return x
        own = _copy(x, self._memories)
        own.__dict__.update(x.__dict__)
        self._stand_ins.by_id[id(own)] = _StandIn(x, own, {_memory(x)}, own._version)
        return own

    def _parameter(self, x: nn.Parameter) -> Any:
        return self._tensor(x)

    def _tuple(self, x: tuple[Any, ...]) -> Any:
        own, known = Walk._tuple(self, x), self._stand_ins.by_id
        if own is not x:
            within = [known[id(item)].memories for item in tuple.__iter__(own) if id(item) in known]
            known[id(own)] = _StandIn(x, own, set[int]().union(*within))
        return own

    def _method(self, x: MethodType) -> MethodType:
        self._todo.append((Walk._save_method, x))
        return x

    def _save_module(self, x: nn.Module) -> None:
        self._save(SavedDict(x, x.__dict__))  # parameters, buffers and modules are in tables there
        self._save_kind(x)

    def _pass_over(self, x: Any) -> Any:
        """Leave out what holds no tensors, and may be large."""
        return x

    _iterator = _save_values = _save_array = _save_map = _save_stream = _save_generator = _pass_over


def without_inference_tensors(changes: Changes, model: nn.Module) -> None:
    """Stand in normal copies for parameters, buffers, and all other tensors that can be reached from a model.

    Tensors that share memory have copies that share theirs. They come back together, unless the run wrote into one.
    """
    stand_ins = _StandIns()
    changes.note(stand_ins.put_back)
    with suppress(RecursionError):  # the first snapshot says what is too deep
        _Search(model, stand_ins).run()


def _copy(x: Tensor, memories: dict[int, Any]) -> Tensor:
    """Return a copy of a tensor of inference mode, in a copy of its memory that others share."""
    is_plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    if is_plain and not (x.is_quantized or x.is_nested or x.is_meta or x.is_conj() or x.is_neg()):
        if _memory(x) not in memories:
            memories[_memory(x)] = x.untyped_storage().clone()
        own = torch.empty(0, dtype=x.dtype, device=x.device)
        own.set_(memories[_memory(x)], x.storage_offset(), x.shape, x.stride())
    else:
        own = normal_tensor(x)
    return nn.Parameter(own, x.requires_grad) if isinstance(x, nn.Parameter) else own


def _memory(x: Tensor) -> int:
    """Return the address of a tensor's memory; its id if it has none of one piece."""
    return (x.untyped_storage().data_ptr() or id(x)) if x.layout == torch.strided and not x.is_nested else id(x)


def explain_inference(error: Exception) -> None:
    """Add a note to torch's error about a tensor of inference mode, once."""
    seen = getattr(error, "__notes__", ())
    if "nference tensor" in str(error) and _OUT_OF_REACH not in seen:
        add_note(error, _OUT_OF_REACH)


def explain_gradients(error: Exception) -> None:
    """Add a note to torch's error about what a forward cannot do where gradients are on, as in a pass."""
    explain_inference(error)
    if any(known in str(error) for known in _WITHOUT_GRADIENTS):
        add_note(
            error,
            "ABPEM's pass over a batch has gradients on, where a prediction may have none. Detach the tensor first "
            "(x.detach().cpu().numpy()), make a new one instead of an edit in place (x = x * 2), or leave this out "
            "while torch.is_grad_enabled().",
        )
