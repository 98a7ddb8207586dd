"""A stream that is cut and goes on elsewhere predicts, to the last bit, what it would have uncut."""

import copy
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_abpem import ABPEM
from lightning_abpem.methods import EATA, MMTTA, READ, SAR, Tent
from tests.ranks import in_two_processes
from tests.reference import same_state
from tests.toy import MODALITIES, FusedAttention, batches, loader, make_toy
from tests.trainer.test_callback import trainer

ADAM = partial(torch.optim.Adam, lr=1e-2)
CUT, LENGTH = 3, 6
METHODS = {
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
    "abpem, momentum": partial(
        ABPEM, "fusion.*.attn", MODALITIES, optimizer=partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
    ),
    "abpem, reset": partial(ABPEM, "fusion.*.attn", MODALITIES, reset=4),
    "abpem, reset by samples": partial(ABPEM, "fusion.*.attn", MODALITIES, reset="7 samples"),
    "tent": Tent,
    "eata": partial(EATA, redundancy=1.0, entropy_margin=1.0, fisher_batches=batches(2, seed=7)),
    "sar": partial(SAR, entropy_margin=1.0),
    "mm-tta": partial(MMTTA, {"audio": 0, "video": 1}),
    "read": partial(READ, "fusion.*.attn"),
}


def predict(callback, model, stream):
    with torch.no_grad(), callback.attach(model):
        return [model(*batch) for batch in stream]


def made(name):
    return METHODS[name](**({"optimizer": ADAM} if "momentum" not in name else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_stream_that_is_cut_goes_on(tmp_path, name, dtype):
    stream = [tuple(x.to(dtype) for x in batch) for batch in batches(LENGTH)]
    model = make_toy().to(dtype)
    if name == "eata" and dtype != torch.float32:
        pytest.skip("its Fisher batches are float32")
    whole = predict(made(name), model, stream)
    first, second = made(name), made(name)
    start = predict(first, model, stream[:CUT])
    path = first.save(tmp_path / "state.pt")
    torch.manual_seed(99)
    second.load(path)
    rest = predict(second, make_toy().to(dtype), stream[CUT:])
    assert all(torch.equal(a, b) for a, b in zip(whole, start + rest, strict=True))
    anew = predict(made(name), model, stream[CUT:])
    assert not all(torch.equal(a, b) for a, b in zip(rest, anew, strict=True))


def test_batches_with_gaps_in_memory():
    """Of which every other row is a sample: the first batch after the cut is rounded as in the middle of a stream."""
    stream = [tuple(x[::2] for x in batch) for batch in batches(LENGTH)]
    whole, first, second = predict(made("abpem"), make_toy(), stream), made("abpem"), made("abpem")
    predict(first, make_toy(), stream[:CUT])
    second.load_state_dict(first.state_dict())
    rest = predict(second, make_toy(), stream[CUT:])
    assert all(torch.equal(a, b) for a, b in zip(whole[CUT:], rest, strict=True))


def test_through_a_trainer_and_its_checkpoint(tmp_path):
    whole, rest = make_toy(), make_toy()
    trainer(made("abpem")).test(whole, loader(LENGTH), verbose=False)
    first = made("abpem")
    trainer(first, limit_test_batches=CUT).test(make_toy(), loader(LENGTH), verbose=False)
    assert first.updates == CUT
    first.save(tmp_path / "state.pt")
    second = made("abpem")
    second.load(tmp_path / "state.pt")
    data = loader(LENGTH).dataset
    later = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(4 * CUT, 4 * LENGTH)), batch_size=4)
    trainer(second).test(rest, later, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[CUT:], rest.seen, strict=True))
    assert second.updates == LENGTH
    assert same_state(rest.state_dict(), make_toy().state_dict())

    runner = trainer(first, limit_test_batches=CUT)
    runner.test(make_toy(), loader(LENGTH), verbose=False)
    path = tmp_path / "model.ckpt"
    runner.save_checkpoint(path)
    third, again = made("abpem"), make_toy()
    third.load_state_dict(torch.load(path, weights_only=True)["callbacks"][third.state_key])
    trainer(third).test(again, later, ckpt_path=path, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(rest.seen, again.seen, strict=True))


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_the_checkpoint_of_a_run_that_is_over_says_nothing_of_the_next(tmp_path, stage, caplog):
    def run(callback, model, **options):
        runner, data = trainer(callback), loader(LENGTH)
        runner.test(model, data, verbose=False, **options) if stage == "test" else runner.predict(
            model, data, **options
        )
        return runner

    first, second, model, again = made("abpem"), made("abpem"), make_toy(), make_toy()
    run(first, model).save_checkpoint(tmp_path / "model.ckpt")
    assert first.state_dict()["over"] is True
    caplog.clear()
    run(second, again, ckpt_path=tmp_path / "model.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(model.seen, again.seen, strict=True))
    assert second.updates == LENGTH
    assert caplog.text.count("To go on from it, give its state to `load_state_dict` before the run: torch.load") == 1


def test_the_checkpoint_of_a_run_that_broke_off_goes_on(tmp_path):
    class Breaks(Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == CUT:
                raise OSError("the sensor is gone")

    first, second = made("abpem"), made("abpem")
    runner = trainer(first, Breaks())
    with pytest.raises(OSError, match="sensor"):
        runner.test(make_toy(), loader(LENGTH), verbose=False)
    assert first.state_dict()["over"] is False
    runner.save_checkpoint(tmp_path / "model.ckpt")
    trainer(second).test(make_toy(), loader(1), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert second.updates == CUT + 1


def test_a_stream_is_over_where_attach_came_to_its_end():
    first = made("abpem")
    predict(first, make_toy(), batches(1))
    assert first.state_dict()["over"] is True
    with pytest.raises(OSError, match="gone"), first.attach(make_toy()) as adaptation:
        adaptation.model(*batches(1)[0])
        raise OSError("gone")
    assert not first.state_dict().get("over")


def test_a_checkpoint_of_adapted_weights_is_no_source(tmp_path):
    """Written in the middle of a run it has the adapted weights for the model's own."""

    class Writes(Callback):
        def on_test_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "model.ckpt")

    trainer(made("abpem"), Writes()).test(make_toy(), loader(2), verbose=False)
    with pytest.raises(ValueError, match="Load the source model's checkpoint, not one that was written while"):
        trainer(made("abpem")).test(make_toy(), loader(2), ckpt_path=tmp_path / "model.ckpt", verbose=False)


def test_a_run_that_crashed_can_be_saved(tmp_path):
    """The state is that of the last step that was taken."""

    class Breaks(type(make_toy())):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == CUT:
                raise OSError("the sensor is gone")
            super().test_step(batch, batch_idx, dataloader_idx)

    model, first = Breaks().eval(), made("abpem")
    model.load_state_dict(make_toy().state_dict())
    with pytest.raises(OSError, match="sensor"):
        trainer(first).test(model, loader(LENGTH), verbose=False)
    first.save(tmp_path / "state.pt")
    second = made("abpem")
    second.load(tmp_path / "state.pt")
    rest = predict(second, make_toy(), batches(LENGTH)[CUT:])
    whole = predict(made("abpem"), make_toy(), batches(LENGTH))
    assert all(torch.equal(a, b) for a, b in zip(whole[CUT:], rest, strict=True))


def test_only_what_adapts_is_saved():
    first = made("abpem")
    predict(first, make_toy(), batches(2))
    state = first.state_dict()
    assert list(state["weights"]["params"]) == ["fusion.0.attn.qkv.weight", "fusion.0.attn.qkv.bias"]
    assert len(state["memory"]) == 2
    assert first.state_dict(memory=False)["memory"] == []


def test_a_state_is_used_once():
    first = made("abpem")
    source = predict(made("abpem"), make_toy(), batches(2))
    predict(first, make_toy(), batches(2))
    first.load_state_dict(first.state_dict())
    assert not torch.equal(predict(first, make_toy(), batches(2))[0], source[0])
    assert torch.equal(predict(first, make_toy(), batches(2))[0], source[0])


def test_a_loaded_state_stays_as_it_is():
    first = made("abpem")
    predict(first, make_toy(), batches(2))
    state, rest = first.state_dict(), []
    for _ in range(2):
        second = made("abpem")
        second.load_state_dict(state)
        rest.append(torch.stack(predict(second, make_toy(), batches(3, seed=5))))
    assert torch.equal(*rest)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="nothing has been adapted yet"):
        made("abpem").save(tmp_path / "state.pt")
    assert made("abpem").state_dict() == {}


def test_what_is_no_state():
    first = made("abpem")
    with pytest.raises(ValueError, match=r"as `state_dict` makes it, but got \['state_dict'\]"):
        first.load_state_dict({"state_dict": {}})
    with pytest.raises(ValueError, match="but got list"):
        first.load_state_dict([1])


class Trained(type(make_toy())):
    def training_step(self, batch, batch_idx):
        return self(*batch[:2]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = FusedAttention()
        self.attn.qkv = nn.Linear(12, 48)


def other_weights():
    torch.manual_seed(5)
    return type(make_toy())().eval()


BAD = {
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


# ------------------------------------------------------------------------------- all is checked before anything changes


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
    """Where all that is neither a dict nor a list lies."""
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
        {"places": [0, 1], "tensors": {0: torch.zeros(4, 2), 1: torch.zeros(3, 2)}, "masks": {}},
        "`memory` .* as many rows",
    ),
    "masks of other rows": (("memory", 0, "masks"), {"audio": torch.ones(3, 6, dtype=torch.bool)}, "`memory`"),
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
    "another format": (("format",), torch.ones(2), "of form 5"),
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


JUNK = {
    **{"text": "x", "None": None, "-1": -1, "list": [], "dict": {}},
    **{"tensor": torch.zeros(3, 7), "NaN": torch.tensor(torch.nan)},
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_each_leaf_of_a_state_is_looked_at(state, junk):
    """Whatever stands there instead: it is refused with nothing changed, or it is a value that may stand there."""
    may_be = {"weights.optimizer.param_groups", "state", "memory", "weights.optimizer.state", "watch"}
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


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=1e-2),
        partial(torch.optim.AdamW, lr=1e-2, amsgrad=True, foreach=True),
        partial(torch.optim.Adam, lr=1e-2, fused=True),
        partial(torch.optim.Adam, lr=torch.tensor(1e-2)),
        *(partial(getattr(torch.optim, name), lr=1e-2) for name in ("Adamax", "NAdam", "RAdam", "Rprop", "ASGD")),
        *(partial(getattr(torch.optim, name), lr=1e-2) for name in ("Adagrad", "Adadelta", "Adafactor")),
        partial(torch.optim.RMSprop, lr=1e-2, centered=True, momentum=0.9),
        lambda params: torch.optim.Adam([{"params": params[:1], "lr": 1e-2}, {"params": params[1:]}], lr=1e-3),
    ],
)
def test_any_optimizer_goes_on(optimizer):
    def new():
        return ABPEM("fusion.*.attn", MODALITIES, optimizer=optimizer)

    stream = batches(LENGTH)
    whole, first, second = predict(new(), make_toy(), stream), new(), new()
    predict(first, make_toy(), stream[:CUT])
    second.load_state_dict(first.state_dict())
    rest = predict(second, make_toy(), stream[CUT:])
    assert all(torch.equal(a, b) for a, b in zip(whole[CUT:], rest, strict=True))


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
    batch = {"places": [0, 1], "tensors": {0: torch.zeros(4, 10, 12), 1: mask}, "masks": {}}
    made("abpem").load_state_dict({**state, "memory": [batch]})


def test_the_source_is_known_by_each_of_its_bits(state):
    model = make_toy()
    with torch.no_grad():
        bits = model.fusion[0].attn.qkv.bias.view(torch.int32)
        bits[7] ^= 1
    with opened(made("abpem"), model) as adaptation, pytest.raises(ValueError, match="began with this model's weights"):
        adaptation.load_state_dict(state)


class TakeAtDataloader(Callback):
    """Takes the state before the first batch of the second dataloader."""

    def __init__(self, callback):
        self.callback, self.state, self.logits = callback, None, []

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if (dataloader_idx, batch_idx) == (1, 0):
            self.state = self.callback.state_dict()
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def test_a_stream_is_cut_between_dataloaders():
    """With reset="dataloader" the source is back when the hooks of its first batch run, and in a state taken there."""
    first = ABPEM("fusion.*.attn", MODALITIES, optimizer=ADAM, reset="dataloader")
    taken, model = TakeAtDataloader(first), make_toy()
    trainer(first, taken).test(model, [loader(2), loader(3, seed=5)], verbose=False)
    assert same_state(taken.weights, dict(make_toy().named_parameters()))
    second, again = ABPEM("fusion.*.attn", MODALITIES, optimizer=ADAM, reset="dataloader"), make_toy()
    second.load_state_dict(taken.state)
    trainer(second).test(again, loader(3, seed=5), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(model.seen[2:], again.seen, strict=True))


def test_a_loaded_state_is_not_reset_by_a_dataloader_without_batches():
    options = {"optimizer": ADAM, "reset": "dataloader"}
    first = ABPEM("fusion.*.attn", MODALITIES, **options)
    trainer(first).test(make_toy(), loader(2), verbose=False)
    seen = []
    for loaders in ([loader(2, seed=5)], [DataLoader([], batch_size=4), loader(2, seed=5)]):
        second, model = ABPEM("fusion.*.attn", MODALITIES, **options), make_toy()
        second.load_state_dict(first.state_dict())
        trainer(second).test(model, loaders, verbose=False)
        seen.append(torch.cat(model.seen))
    assert torch.equal(*seen)


@pytest.mark.parametrize("part", ["scale.value", "weights.counts", "random", "memory", "measured"])
def test_a_state_with_something_missing(part):
    first = made("abpem")
    predict(first, make_toy(), batches(1))
    state = first.state_dict()
    *outer, key = part.split(".")
    del (state[outer[0]] if outer else state)[key]
    with pytest.raises(ValueError, match=f"it has no `{part}`"):
        first.load_state_dict(state)


def test_a_fit_begins_anew(tmp_path):
    """Checkpoints that `fit` writes hold nothing of an earlier run, whose source they are not."""
    first, model = made("abpem"), Trained()
    trainer(first).test(model, loader(2), verbose=False)
    assert first.state_dict()
    runner = trainer(first, max_epochs=1)
    runner.fit(model, loader(2))
    assert first.state_dict() == {}
    runner.save_checkpoint(tmp_path / "model.ckpt")
    trainer(first).test(Trained(), loader(2), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert first.updates == 2


def test_a_checkpoint_that_training_goes_on_from_says_nothing_of_the_next_run(tmp_path):
    """Its state is of the weights that it was tested with, and training moves them."""
    first, model = made("abpem"), Trained()
    runner = trainer(first, max_epochs=1)
    runner.fit(model, loader(2))
    runner.test(model, loader(2), verbose=False)
    runner.save_checkpoint(tmp_path / "model.ckpt")
    second, model = made("abpem"), Trained()
    runner = trainer(second, max_epochs=2)
    runner.fit(model, loader(2), ckpt_path=tmp_path / "model.ckpt")
    runner.test(model, loader(2), verbose=False)
    assert second.updates == 2


def test_of_another_version():
    first = made("abpem")
    predict(first, make_toy(), batches(1))
    with pytest.raises(ValueError, match="of form 5, but got 7"):
        first.load_state_dict({**first.state_dict(), "format": 7})


# --------------------------------------------------------------------------------------------------- several processes


def cut_in_two(rank, folder):
    """The stream uncut, and cut, saved, loaded."""
    stream = [tuple(x[rank::2] for x in batch) for batch in batches(LENGTH)]
    whole = predict(made("abpem"), make_toy(), stream)
    first, second = made("abpem"), made("abpem")
    start = predict(first, make_toy(), stream[:CUT])
    written = first.save(folder / "state.pt")
    torch.distributed.barrier()
    second.load(folder / "state.pt")
    rest = predict(second, make_toy(), stream[CUT:])
    return written.name, whole, start + rest


def test_two_processes_go_on(tmp_path):
    results = in_two_processes(cut_in_two, tmp_path)
    for rank, (name, whole, parts) in enumerate(results):
        assert name == f"state-{rank}-of-2.pt"
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    alone = made("abpem")
    alone.load(tmp_path / "state.pt")  # which is there, but not for one process
    with pytest.raises(FileNotFoundError, match=r"no '.*state\.pt'"):
        predict(alone, make_toy(), batches(1))


def test_the_memory_of_another_process_is_left_out(caplog):
    first = made("abpem")
    predict(first, make_toy(), batches(2))
    first.load_state_dict({**first.state_dict(), "process": [1, 2]})
    predict(first, make_toy(), batches(1))
    assert "memory of the loaded state is another process's" in caplog.text
