"""The twin: one step of SGD for each batch, then its prediction, written by hand.

It copies nothing. For each adapting pass a new model lives through the past again, batch by batch, with the weights
that the predictions had; the pass is the last thing it does. So state of any kind is where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.zoo.forwards import ENTRIES
from tests.zoo.harness import LR, MODES, K, Outcome, random_state, seed, set_random_state, take
from tests.zoo.nets import HEADS, SPANS, Call, Entry, Net
from tests.zoo.pictures import Album, Picture


def twin(entry: Entry, memory: int = 1) -> Outcome:
    """One step of SGD for each batch, then its prediction, by hand."""
    model, calls, album = entry.make(), entry.calls(), Album()
    album.picture((model, calls))
    params = projections(model, entry)
    nn.Module.train(model, False)
    source = history = [{name: p.detach().clone() for name, p in params.items()}]
    tokens: list[Tensor] = []
    given: list[Picture] = []
    outputs: list[Any] = []
    seed()
    for i, call in enumerate(calls):
        state = random_state()
        gradients, entered = adapting_pass(entry, history, i, tokens[max(0, len(tokens) + 1 - memory) :], memory > 1)
        set_random_state(state)
        tokens.append(entered)
        history = [*history, {name: value - LR * gradients[name] for name, value in history[-1].items()}]
        set_values(params, history[-1])
        with MODES[entry.around]():
            take(model.step(call), given, outputs)
    set_values(params, source[0])
    state = random_state()
    after = album.picture({"outputs": outputs, "model": model, "calls": calls})
    return Outcome(given, after, state, model, len(calls), 0)


def adapting_pass(
    entry: Entry, history: list[dict[str, Tensor]], batch: int, stored: list[Tensor], has_memory: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients for a batch, and its tokens as they entered the block, by a model that lives for it alone."""
    model, calls = entry.make(), entry.calls()
    params = projections(model, entry)
    nn.Module.train(model, False)
    seed()
    for j in range(batch):
        set_values(params, history[j + 1])
        with MODES[entry.around](), torch.inference_mode(False), torch.no_grad():  # the last one counts
            model.step(normal(calls[j], entry))
    set_values(params, history[batch])
    model.requires_grad_(False)
    for p in params.values():
        p.requires_grad_(True)
    core: Any = model.get_submodule(entry.core)
    entered = joins(core.fusion[0], stored) if has_memory else []
    pairs = seen_projections(core.fusion[0].attn)
    target = model.get_submodule(entry.options.get("target") or "")
    logits = run_for_logits(entry, model, target, calls[batch])
    gradients = torch.autograd.grad(loss_of(logits, pairs), list(params.values()))
    return dict(zip(params, gradients, strict=True)), entered[0] if entered else logits.detach()


class _StopError(Exception):
    """The target has given its output: nothing else is wanted of this model."""


def run_for_logits(entry: Entry, model: Net, target: nn.Module, call: Call) -> Tensor:
    """Return the logits of the target's own forward, with gradients."""
    forward, depth = target.forward, 0

    def outermost(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth:
            return forward(*args, **kwargs)
        depth += 1
        with torch.inference_mode(False), torch.enable_grad():
            own = normal(Call(*args, **kwargs), entry)
            raise _StopError(forward(*own.args, **own.kwargs))

    target.forward = outermost
    try:
        with MODES[entry.around](), torch.no_grad():
            model.step(call)
    except _StopError as stop:
        output = stop.args[0]
    read = entry.options.get("logits", lambda output: getattr(output, "logits", output))
    logits = read(output)
    return logits["logits"] if isinstance(logits, Mapping) else logits[0] if isinstance(logits, tuple) else logits


def normal(call: Call, entry: Entry) -> Call:
    """The arguments as autograd takes them, of an entry whose tensors are made in inference mode."""
    if entry.around != "inference_mode":
        return call
    args, kwargs = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, (call.args, call.kwargs))
    return Call(*args, **kwargs)


def joins(block: nn.Module, stored: list[Tensor]) -> list[Tensor]:
    """Let the block run over the stored tokens too, before the batch's own, which are put into the list."""
    forward, entered = block.forward, []

    def over_all(x: Tensor, **words: float) -> Tensor:
        entered.append(x.detach().clone())
        return forward(torch.cat([*stored, x]), **words)

    block.forward = over_all
    return entered


def seen_projections(attention: Any) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every call, once they are there."""
    pairs: list[tuple[Tensor, Tensor]] = []
    queries: list[Tensor] = []
    attention.q.register_forward_hook(lambda _, args, output: queries.append(output))
    attention.k.register_forward_hook(lambda _, args, output: pairs.append((queries[-1], output)))
    return pairs


def projections(model: Net, entry: Entry) -> dict[str, nn.Parameter]:
    core: Any = model.get_submodule(entry.core)
    attention = core.fusion[0].attn
    return {name: p for name, p in attention.named_parameters() if name.split(".")[0] in "qkv"}


def set_values(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(values[name])


def loss_of(logits: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The paper's loss as it is written: one score map per head, loops over modalities."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    p = logits.softmax(-1)
    top = p.topk(K, dim=-1).values
    principal = -(top * (top + 1e-6).log()).sum(-1).mean()
    balance = -(p.mean(0) * p.mean(0).log()).sum()
    return principal - balance + sum(bootstrapping(q, k) for q, k in list(pairs)) / len(pairs)


def bootstrapping(q: Tensor, k: Tensor) -> Tensor:
    """KL of each cross block's scores from those of its key modality, a constant."""
    q, k = (x.float() if x.dtype == torch.bfloat16 else x for x in (q, k))
    width = q.shape[-1] // HEADS
    maps = [x @ y.mT / width**0.5 for x, y in zip(q.split(width, -1), k.split(width, -1), strict=True)]
    scores, total = sum(maps) / HEADS, torch.zeros(())
    for rows in SPANS:
        for columns in SPANS:
            if rows is not columns:
                cross, own = (scores[:, r, columns].flatten(1) for r in (rows, columns))
                (s, a), (t, b) = torch.std_mean(cross, 1), torch.std_mean(own.detach(), 1)
                total = total + ((t / s).log() + (s**2 + (a - b) ** 2) / (2 * t**2) - 0.5).mean()
    return total


@cache
def twin_run(name: str, memory: int) -> Outcome:
    return twin(ENTRIES[name], memory)
