"""Watching one forward: which attention calls it makes, and from which modules' outputs their tokens come.

A sequence starts where a module first puts out (batch, tokens, width). What is made of it later, token by token, keeps
its origin. A concatenation along the tokens keeps those of its pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_abpem.attention.calls import refuse_nested
from lightning_abpem.attention.capture import SOFTMAX
from lightning_abpem.attention.origins import Kind, Segment, TracedCall
from lightning_abpem.attention.projections import find_projections
from lightning_abpem.modules.compiled import compiled_entry, eagerly
from lightning_abpem.modules.names import plain_name
from lightning_abpem.modules.patches import Changes

__all__ = ["trace_attention", "tracing"]

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_TRANSPOSITIONS = (
    *(torch.transpose, torch.swapaxes, torch.swapdims, torch.permute, torch.movedim),
    *(Tensor.transpose, Tensor.swapaxes, Tensor.swapdims, Tensor.permute, Tensor.movedim),
    *(Tensor.mT.__get__, Tensor.T.__get__),  # type: ignore[attr-defined]
)
_REORDERINGS = (
    *(torch.flip, torch.roll, torch.gather, torch.index_select, torch.take_along_dim, torch.sort, torch.rot90),
    *(Tensor.flip, Tensor.roll, Tensor.gather, Tensor.index_select, Tensor.take_along_dim, Tensor.sort, Tensor.rot90),
    *(torch.scatter, Tensor.scatter, Tensor.scatter_, torch.fliplr, torch.flipud, Tensor.fliplr, Tensor.flipud),
)
_SIZES = (2, 3, 5, 7, 11)  # of the dimensions of a probe


@dataclass(frozen=True)
class _Layout:
    """The segments of a tensor's tokens, which lie along `axis`."""

    axis: int
    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(segment.source for segment in self.segments if segment.source is not None))


@dataclass
class _Frame:
    """A module that is running."""

    name: str
    call_index: int
    inputs: list[Tensor]
    owns: bool
    calls: list[TracedCall] = field(default_factory=list)
    eager: list[TracedCall] = field(default_factory=list)


class _Tracer(TorchFunctionMode):
    """Follows the tokens' origins through every function and module of a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[TracedCall] = []
        self.outermost: dict[str, Any] = {}  # the outputs of the modules that no other module of the model called
        self._model = model
        self._layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._call_counts: Counter[str] = Counter()
        self._frames = [_Frame(type(model).__name__, 0, [], owns=False)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            self._attend(func, args, kwargs)
        elif func in SOFTMAX:
            self._softmax(args[0] if args else kwargs["input"])
        for out in tree_leaves(output):
            is_followed = isinstance(out, Tensor) and not out.is_nested and out.dim() > 1
            if is_followed and (layout := self._follow(func, args, kwargs, out)):
                self._layouts[out] = layout
        return output

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Follow every module of the model while the block lasts."""
        with Changes() as changes:
            eagerly(changes, [module for module in self._model.modules() if compiled_entry(module) is not None])
            inner = {plain_name(name): module for name, module in self._model.named_modules()}
            for name, module in inner.items():
                if isinstance(module, torch.jit.ScriptModule) or not name:  # a script takes no hooks from Python
                    continue
                enter, leave = self._hooks(name)
                changes.hook(module, "register_forward_pre_hook", enter, with_kwargs=True)
                changes.hook(module, "register_forward_hook", leave, always_call=True)
            with self:
                yield

    def close(self) -> None:
        """Collect the calls that no module with projections made, once the forward is over."""
        self._close(self._frames[0])

    # ------------------------------------------------------------------------------------------------------- modules

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            projections = find_projections(module)
            widths = {size for p in projections.values() if p.dim() == 2 for size in p.shape}
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_nested and x.dim()]
            inputs = [x for x in inputs if not widths or x.shape[-1] in widths]  # tokens; no mask, no rotation
            self._frames.append(_Frame(name, self._call_counts[name], inputs, bool(projections)))
            self._call_counts[name] += 1

        def leave(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            frame = self._frames.pop()
            self._close(frame)
            if len(self._frames) == 1:
                self.outermost[name] = output
            for x in tree_leaves(output):
                is_sequence = isinstance(x, Tensor) and not x.is_nested and x.dim() == 3 and x.is_floating_point()
                if is_sequence and x not in self._layouts and not isinstance(module, nn.modules.conv._ConvNd):
                    self._layouts[x] = self._kept_by(frame, x) or _Layout(1, (Segment(_label(frame), x.shape[1]),))

        return enter, leave

    def _close(self, frame: _Frame) -> None:
        """Collect the calls of a module as it ends; without projections they count for the module around it."""
        around = self._frames[-1]
        if not frame.owns and around is not self._frames[0]:
            around.calls += frame.calls
            around.eager += frame.eager
            return
        calls = frame.calls or frame.eager
        if frame.owns and not calls:
            calls = [TracedCall(frame.name, frame.call_index, "hidden")]
        self.seen += calls

    def _kept_by(self, frame: _Frame, output: Tensor) -> _Layout | None:
        """The layout of a module's input whose batch and tokens its output has."""
        known = [(x, self._layouts[x]) for x in frame.inputs if x in self._layouts]
        return next((layout for x, layout in known if x.shape[:2] == output.shape[:2] and x.dim() == 3), None)

    # ----------------------------------------------------------------------------------------------------- functions

    def _follow(self, func: object, args: tuple[object, ...], kwargs: dict[str, object], out: Tensor) -> _Layout | None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [(x, self._layouts[x]) for x in tensors if x in self._layouts]
        if not known:
            return None
        if func in _CONCATENATIONS:
            concat = self._concatenated(args, kwargs)
            if concat is not None:
                return concat
        if func in _TRANSPOSITIONS:
            return _transposed(func, args, kwargs, *known[0])
        known.sort(key=lambda item: -len(item[1].sources))
        if len(known[0][1].sources) > 1:
            if func is Tensor.__getitem__:
                return _indexed(known[0][0], known[0][1], args[1], out)
            if func in _REORDERINGS:
                return _unknown(known[0][1], out)
        return next((kept for x, layout in known if (kept := _kept(x, layout, out))), None)

    def _concatenated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Layout | None:
        pieces: Sequence[Tensor] = args[0] if args else kwargs["tensors"]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % pieces[0].dim()
        if pieces[0].dim() != 3 or dim == 2 or any(piece.is_nested for piece in pieces):
            return None
        segments: list[Segment] = []
        for piece in pieces:
            layout = self._layouts.get(piece)
            if layout is not None and layout.axis == dim:
                segments += layout.segments
            else:
                source = layout.sources[0] if layout is not None and len(layout.sources) == 1 else None
                segments.append(Segment(source, piece.shape[dim]))
        concat = _Layout(dim, tuple(segments))
        return concat if dim == 1 or len(concat.sources) > 1 else None

    def _attend(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_nested(self._frame().name, *args, *kwargs.values())
        q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        if func is F.multi_head_attention_forward:
            heads = args[4] if len(args) > 4 else kwargs["num_heads"]
            self._note("torch", q, k, (q.shape[0], k.shape[0], heads))
        else:
            self._note("fused", q, k, (q.shape[-2], k.shape[-2], q.shape[1] if q.dim() == 4 else 1))

    def _softmax(self, scores: Tensor) -> None:
        if scores.dim() == 4 or (scores.dim() == 3 and self._frame().owns):
            heads = scores.shape[1] if scores.dim() == 4 else 1
            self._note("eager", None, None, (scores.shape[-2], scores.shape[-1], heads))

    def _note(self, kind: Kind, q: Tensor | None, k: Tensor | None, sizes: tuple[int, int, int]) -> None:
        frame = self._frame()
        queries, keys, heads = sizes
        call = TracedCall(
            *(frame.name, frame.call_index, kind, queries, keys, heads),
            query_segments=self._segments([q, *frame.inputs], queries),
            key_segments=self._segments([k, *reversed(frame.inputs)], keys),
        )
        (frame.eager if kind == "eager" else frame.calls).append(call)

    def _frame(self) -> _Frame:
        """The innermost running module with projections, or else the innermost."""
        return next((frame for frame in reversed(self._frames) if frame.owns), self._frames[-1])

    def _segments(self, candidates: Sequence[Tensor | None], tokens: int) -> tuple[Segment, ...]:
        layouts = (self._layouts.get(x) for x in candidates if x is not None)
        return next((layout.segments for layout in layouts if layout is not None and layout.tokens == tokens), ())


@contextmanager
def tracing(model: nn.Module) -> Iterator[_Tracer]:
    """Collect the attention calls of what runs inside the block, in the order in which their modules end."""
    tracer = _Tracer(model)
    with tracer.attached():
        yield tracer
        tracer.close()


def trace_attention(model: nn.Module, forward: Callable[[], object]) -> list[TracedCall]:
    """Return every attention call that `forward` makes inside `model`, without gradients."""
    with torch.no_grad(), tracing(model) as trace:
        forward()
    return trace.seen


def _label(frame: _Frame) -> str:
    return f"{frame.name}[{frame.call_index}]" if frame.call_index else frame.name


def _transposed(
    func: Any, args: tuple[object, ...], kwargs: dict[str, object], x: Tensor, layout: _Layout
) -> _Layout | None:
    """The layout after a transposition, found by transposing a probe whose sizes tell its dimensions apart."""
    if x.dim() > len(_SIZES) or not args or args[0] is not x:
        return None
    probe = func(torch.empty(_SIZES[: x.dim()], device="meta"), *args[1:], **kwargs)
    axis = list(probe.shape).index(_SIZES[layout.axis])
    return None if axis == x.dim() - 1 else _Layout(axis, layout.segments)


def _kept(x: Tensor, layout: _Layout, out: Tensor) -> _Layout | None:
    """The layout of `out`, made of `x`, if its tokens can be told."""
    axis = layout.axis
    if out.dim() <= axis + 1:
        return None
    if out.shape[axis] == layout.tokens and (out.dim() == x.dim() or out.shape[: axis + 1] == x.shape[: axis + 1]):
        return layout
    if out.dim() == x.dim() == 3 and len(layout.segments) == 1:  # some of the tokens
        return _Layout(axis, (Segment(layout.segments[0].source, out.shape[axis]),))
    return None


def _indexed(x: Tensor, layout: _Layout, index: Any, out: Tensor) -> _Layout | None:
    """The layout of x[index]: of slices that keep the tokens side by side what they leave, else unknown."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is None or isinstance(part, slice) for part in parts):
        return _unknown(layout, out)
    dims = [i for i, part in enumerate([*parts, *[slice(None)] * x.dim()]) if part is not None]
    axis = dims[layout.axis]
    start, stop, step = (parts[axis] if axis < len(parts) else slice(None)).indices(layout.tokens)
    if step != 1:
        return _unknown(layout, out)
    left, end = [], 0
    for segment in layout.segments:
        begin, end = end, end + segment.tokens
        tokens = min(end, stop) - max(begin, start)
        if tokens > 0:
            left.append(Segment(segment.source, tokens))
    return _Layout(axis, tuple(left))


def _unknown(layout: _Layout, out: Tensor) -> _Layout | None:
    """Return the layout of tokens whose order is not known."""
    return _Layout(layout.axis, (Segment(None, out.shape[layout.axis]),)) if out.dim() > layout.axis else None
