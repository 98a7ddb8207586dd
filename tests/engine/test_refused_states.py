"""States that do not fit or are damaged: refused by what is wrong, before anything changes."""

import copy
import re
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.engine.checkpoint import FORMAT
from lightning_abpem.methods import READ
from tests.engine.resumed import made, predict
from tests.reference import same_state
from tests.toy import MODALITIES, FusedAttention, batches, make_toy


def test_what_is_no_state():
    first = made("abpem")
    with pytest.raises(ValueError, match=r"as `state_dict` makes it, but got \['state_dict'\]"):
        first.load_state_dict({"state_dict": {}})
    with pytest.raises(ValueError, match="but got list"):
        first.load_state_dict([1])


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = FusedAttention()
        self.attn.qkv = nn.Linear(12, 48)


def other_weights():
    torch.manual_seed(5)
    return type(make_toy())().eval()


BAD: dict[str, Any] = {
    "method": (lambda: READ("fusion.*.attn"), make_toy, "Expected a state of READ, but got one of ABPEM"),
    "pattern": (
        lambda: ABPEM("fusion.1.attn", MODALITIES),
        partial(make_toy, depth=2),
        r"fusion\.0\.attn\.qkv\.weight float32 \(36, 12\) instead of nothing",
    ),
    "model": (
        lambda: ABPEM("fusion.*.attn", MODALITIES),
        partial(make_toy, depth=2),
        r"fusion\.1\.attn\.qkv\.weight missing instead of float32 \(36, 12\)",
    ),
    "source": (lambda: ABPEM("fusion.*.attn", MODALITIES), other_weights, "began with this model's weights"),
    "optimizer": (
        lambda: ABPEM("fusion.*.attn", MODALITIES, optimizer=partial(torch.optim.SGD, lr=1e-2)),
        make_toy,
        "Expected a state of SGD, but got one of Adam",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_state_that_does_not_fit(bad):
    make, model, message = BAD[bad]
    first = made("abpem")
    predict(first, make_toy(), batches(2))
    second, model = make(), model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def go_on():
        second.load_state_dict(first.state_dict())
        predict(second, model, batches(1))

    with pytest.raises(ValueError, match=message):
        go_on()
    assert same_state(before, model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=message):  # nor is it forgotten, so that a run would begin at the source
        predict(second, model, batches(1)) if bad != "method" else go_on()
    predict(make(), model, batches(1))


def test_a_state_that_does_not_fit_changes_nothing_of_an_open_adaptation():
    first = made("abpem")
    predict(first, make_toy(), batches(2))
    state = first.state_dict()
    state["weights"]["optimizer"]["param_groups"] = []
    whole = predict(made("abpem"), make_toy(), batches(4))
    model = make_toy()
    with torch.no_grad(), made("abpem").attach(model) as adaptation:
        start = [model(*batch) for batch in batches(4)[:2]]
        with pytest.raises(ValueError, match="optimizer does not fit"):
            adaptation.load_state_dict(state)
        rest = [model(*batch) for batch in batches(4)[2:]]
    assert all(torch.equal(a, b) for a, b in zip(whole, start + rest, strict=True))


def same(a, b):
    """Equal to the last bit, whatever it is made of."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def leaves(value, path=()):
    """Yield the path of every value that is neither a dict nor a list."""
    if isinstance(value, dict | list | tuple):
        for key, own in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(own, (*path, key))
    else:
        yield path


def put(state, path, value):
    """A copy with another leaf."""
    if not path:
        return value
    state = list(state) if isinstance(state, tuple) else copy.copy(state)
    state[path[0]] = put(state[path[0]], path[1:], value) if path[1:] else value
    return state


@contextmanager
def opened(callback, model=None):
    """An adaptation that has seen one batch."""
    model = make_toy() if model is None else model
    with torch.no_grad(), callback.attach(model) as adaptation:
        model(*batches(1)[0])
        yield adaptation


def at(state, *path):
    for key in path:
        state = state[key]
    return state


QKV = ("weights", "params", "fusion.0.attn.qkv.weight")


MOMENT = ("weights", "optimizer", "state", 0, "exp_avg_sq")


WIDE = torch.zeros(1).expand(10**9, 10, 12)  # 480 GB, of one stored value


DAMAGES = {
    "params of text": (QKV, "x", "`weights.params` .* tensors by name"),
    "params of NaN": (
        QKV,
        torch.full((36, 12), torch.nan),
        r"`weights.params.fusion.0.attn.qkv.weight` .* 432 values are",
    ),
    "params of infinity": (QKV, torch.full((36, 12), torch.inf), "`weights.params.fusion.0.attn.qkv.weight` .* finite"),
    "params of another shape": (QKV, torch.zeros(1), r"float32 \(1,\) instead of float32 \(36, 12\)"),
    "params of another dtype": (QKV, torch.zeros(36, 12).double(), r"float64 \(36, 12\) instead of float32"),
    "params of one value": (QKV, torch.zeros(1).expand(36, 12), "store its values, one each"),
    "sparse params": (QKV, torch.zeros(36, 12).to_sparse(), "store its values, one each"),
    "params of nothing": (QKV, torch.zeros(36, 12, device="meta"), "store its values, one each"),
    "a source of text": (("weights", "source"), "0", "began with this model's weights"),
    "a source of numbers": (("weights", "source"), [1, 2], "`weights.source` .* a digest, but got"),
    "moments of another shape": (MOMENT, torch.zeros(1), r"`exp_avg_sq` of parameter 0 .*float32 \(36, 12\)"),
    "moments of a scalar": (MOMENT, torch.tensor(0.0), "`exp_avg_sq` of parameter 0"),
    "moments of another dtype": (MOMENT, torch.zeros(36, 12).half(), "`exp_avg_sq` of parameter 0 .*float16"),
    "moments of NaN": (MOMENT, torch.full((36, 12), torch.nan), "`weights.optimizer.state.0.exp_avg_sq` .* finite"),
    "moments of a number": (MOMENT, 1.0, "`exp_avg_sq` of parameter 0"),
    "a step back": ((*MOMENT[:-1], "step"), torch.tensor(-5.0), "`step` of parameter 0"),
    "moments without one": (MOMENT[:-1], {"step": torch.tensor(1.0)}, "`exp_avg` of parameter 0 .* but got None"),
    "moments of nobody": (MOMENT[:3], {7: {}}, "its parameters are others"),
    "moments of a list": (MOMENT[:3], [1], "does not fit this one"),
    "no groups": (("weights", "optimizer", "param_groups"), [], "does not fit this one"),
    "another order": (("weights", "optimizer", "param_groups", 0, "params"), [1, 0], "its parameters are others"),
    "a rate of text": (("weights", "optimizer", "param_groups", 0, "lr"), "x", "does not fit this one"),
    "a rate of NaN": (("weights", "optimizer", "param_groups", 0, "lr"), torch.nan, "param_groups.0.lr` .* got nan"),
    "a class of numbers": (("weights", "optimizer_class"), 3, "`weights.optimizer_class`"),
    "one count": (("weights", "counts"), [1], "`weights.counts` .* got \\[1\\]"),
    "counts of text": (("weights", "counts"), ["a", "b"], "`weights.counts`"),
    "counts below zero": (("weights", "counts"), [3, -1], "`weights.counts`"),
    "more since a reset than at all": (("weights", "counts"), [3, 4], "`weights.counts`"),
    "counts of bools": (("weights", "counts"), [True, False], "`weights.counts`"),
    "a reason without a count": (("weights", "skipped_for"), {"not finite": None}, "`weights.skipped_for`"),
    "reasons by number": (("weights", "skipped_for"), {3: 1}, "`weights.skipped_for`"),
    "no process": (("process",), None, "`process`"),
    "a process too many": (("process",), [2, 2], "`process`"),
    "a scale of 0": (("scale", "value"), torch.tensor(0.0), "`scale.value` .* at least 1, but got 0.0"),
    "a scale of infinity": (("scale", "value"), torch.tensor(torch.inf), "`scale.value` .* finite"),
    "a scale of many": (("scale", "value"), torch.ones(3), "`scale.value`"),
    "a streak of minus one": (("scale", "streak"), torch.tensor(-1), "`scale.streak`"),
    "random of another size": (("random", "cpu"), torch.zeros(3, dtype=torch.uint8), "`random`"),
    "one flag": (("proven",), [True], "`proven`"),
    "a flag that is a number": (("proven",), [1, 0], "`proven`"),
    "fewer than no batches": (("monitored",), -1, "`monitored`"),
    "random of zeros": (("random", "cpu"), torch.zeros(5056, dtype=torch.uint8), "`random`"),
    "random of floats": (("random", "cpu"), torch.zeros(5056), "`random`"),
    "random of nobody": (("random",), {}, "`random`"),
    "memory of text": (("memory",), "x", "`memory`"),
    "memory without places": (("memory",), [{"tensors": {}}], "`memory` .* `places`"),
    "memory of places alone": (("memory", 0, "tensors"), {}, "`memory`"),
    "memory at other places": (("memory", 0, "places"), [7], "`memory`"),
    "memory of 480 GB": (("memory", 0, "tensors", 0), WIDE, "`memory.0.tensors.0` .* store its values"),
    "memory of NaN": (
        ("memory", 1, "tensors", 0),
        torch.full((4, 10, 12), torch.nan),
        "`memory.1.tensors.0` .* finite",
    ),
    "memory of infinity": (("memory", 1, "tensors", 0), torch.full((4, 10, 12), torch.inf), "`memory.1.tensors.0`"),
    "memory of a scalar": (("memory", 0, "tensors", 0), torch.tensor(1.0), "`memory`"),
    "memory of other rows": (
        ("memory", 0),
        {"places": [0, 1], "tensors": {0: torch.zeros(4, 2), 1: torch.zeros(3, 2)}, "masks": {}, "others": []},
        "`memory` .* as many rows",
    ),
    "masks of other rows": (("memory", 0, "masks"), {"audio": torch.ones(3, 6, dtype=torch.bool)}, "`memory`"),
    "arguments of sets": (("memory", 0, "others"), [[{1}]], "`memory.0.others.0.0` .* but got a set"),
    "arguments that are bare": (("memory", 0, "others"), [3], "`memory`"),
    "masks of floats": (("memory", 0, "masks"), {"audio": torch.ones(4, 6)}, "`memory`"),
    "a method's state of text": (("state",), "x", "`state`"),
    "a method's state of NaN": (("state", "stream"), torch.tensor([torch.nan]), "`state.stream` .* finite"),
    "a method's state of another shape": (("state", QKV[-1]), torch.zeros(3), r"method keeps for 'fusion.* \(36, 12\)"),
    "a method's state of a set": (("state", "seen"), {1}, "`state.seen` .* but got a set"),
    "a method's state of numbers": (("state", 1.5), 1, "keys of a state's `state`"),
    "measured of text": (("measured",), "x", "`measured`"),
    "a rate of 2": (("weights", "rate"), 2.0, "`weights.rate` .* but got 2.0"),
    "sums of text": (("watch",), "x", "`watch` .* running sums"),
    "sums of an even number": (("watch",), torch.ones(4), "`watch` .* running sums"),
    "sums of no samples": (("watch",), torch.zeros(5), "`watch` .* running sums"),
    "copies of another shape": (("guard", "good"), [[torch.zeros(3)]], "guard's copies .* but got"),
    "copies of NaN": (("guard", "good"), [[torch.tensor(torch.nan)]], "`guard.good.0.0` .* finite"),
    "an event of numbers": (
        ("guard", "events"),
        [{"batch": 1, "update": 1, "action": 1, "cause": 1}],
        "`guard.events`",
    ),
    "two flags": (("guard", "flags"), [True, False], "`guard.flags`"),
    "a number for a bool": (("resets_next",), 1, "`resets_next` .* a bool, but got 1"),
    "another format": (("format",), torch.ones(2), f"of form {FORMAT}"),
}


@pytest.fixture(scope="module")
def state():
    first = made("abpem")
    predict(first, make_toy(), batches(3))
    return first.state_dict()


def refused(state, message):
    """An adaptation that is open refuses a state, and goes on as if it had not seen it."""
    whole, model = predict(made("abpem"), make_toy(), batches(4)), make_toy()
    with torch.no_grad(), made("abpem").attach(model) as adaptation:
        start = [model(*batch) for batch in batches(4)[:2]]
        before, weights = adaptation.state_dict(), {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            adaptation.load_state_dict(state)
        assert same(adaptation.state_dict(), before)
        assert same_state(model.state_dict(), weights)
        rest = [model(*batch) for batch in batches(4)[2:]]
    assert all(torch.equal(a, b) for a, b in zip(whole, start + rest, strict=True))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_changes_nothing(state, damage):
    path, value, message = DAMAGES[damage]
    refused(put(state, path, value), message)


JUNK: dict[str, Any] = {
    **{"text": "x", "None": None, "-1": -1, "list": [], "dict": {}},
    **{"tensor": torch.zeros(3, 7), "NaN": torch.tensor(torch.nan)},
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_each_leaf_of_a_state_is_looked_at(state, junk):
    """Whatever stands there instead: it is refused with nothing changed, or it is a value that may stand there."""
    may_be = {"weights.optimizer.param_groups", "state", "memory", "weights.optimizer.state", "watch", "rates.sums"}
    for path in leaves({key: own for key, own in state.items() if key != "over"}):
        with opened(made("abpem")) as adaptation:
            before = adaptation.state_dict()
            refused = False
            try:
                adaptation.load_state_dict(put(state, path, junk))
            except ValueError:
                refused = True
            name = ".".join(map(str, path))
            assert refused or any(name.startswith(own) for own in may_be), path
            assert same(adaptation.state_dict(), before) == refused, path


def test_an_optimizer_that_is_made_at_random_leaves_random_numbers_alone(state):
    def random_rate(params):
        return torch.optim.Adam(params, lr=torch.rand(()).item())

    with opened(ABPEM("fusion.*.attn", MODALITIES, optimizer=random_rate)) as adaptation:
        before = torch.get_rng_state()
        with pytest.raises(ValueError, match="exp_avg_sq"):
            adaptation.load_state_dict(put(state, MOMENT, torch.zeros(1)))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "path"), [("eata", ("measured", "fisher")), ("mm-tta", ("state", "slow"))])
def test_what_a_method_keeps_for_a_parameter_has_its_shape(name, path):
    first = made(name)
    predict(first, make_toy(), batches(2))
    state = first.state_dict()
    key = next(iter(at(state, *path)))
    with opened(made(name)) as adaptation:
        adaptation.load_state_dict(state)
        with pytest.raises(ValueError, match=f"Expected what the method keeps for '{re.escape(key)}'"):
            adaptation.load_state_dict(put(state, (*path, key), torch.zeros(3)))


def test_masks_to_be_added_in_memory_may_be_minus_infinity(state):
    """As they enter a block beside its tokens."""
    mask = torch.zeros(4, 1, 10, 10).index_fill(3, torch.tensor([9]), -torch.inf)
    batch = {"places": [0, 1], "tensors": {0: torch.zeros(4, 10, 12), 1: mask}, "masks": {}, "others": []}
    made("abpem").load_state_dict({**state, "memory": [batch]})


def test_the_source_is_known_by_each_of_its_bits(state):
    model = make_toy()
    with torch.no_grad():
        bits = model.fusion[0].attn.qkv.bias.view(torch.int32)
        bits[7] ^= 1
    with opened(made("abpem"), model) as adaptation, pytest.raises(ValueError, match="began with this model's weights"):
        adaptation.load_state_dict(state)


@pytest.mark.parametrize("part", ["scale.value", "weights.counts", "random", "memory", "measured"])
def test_a_state_with_something_missing(part):
    first = made("abpem")
    predict(first, make_toy(), batches(1))
    state = first.state_dict()
    *outer, key = part.split(".")
    del (state[outer[0]] if outer else state)[key]
    with pytest.raises(ValueError, match=f"it has no `{part}`"):
        first.load_state_dict(state)


def test_of_another_version():
    first = made("abpem")
    predict(first, make_toy(), batches(1))
    with pytest.raises(ValueError, match=f"of form {FORMAT}, but got {FORMAT + 1}"):
        first.load_state_dict({**first.state_dict(), "format": FORMAT + 1})
