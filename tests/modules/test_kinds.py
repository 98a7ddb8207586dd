"""State of each kind is put back after a pass that edits it, as a read of it says."""

import asyncio
import configparser
import contextlib
import functools
import importlib
import io
import sys
from abc import ABC
from collections import namedtuple
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_abpem.modules.state import Snapshot


class Kind(NamedTuple):
    make: Any
    edit: Any
    read: Any


class Slotted(Tensor):
    __slots__ = ("count",)
    count: int
    calls = 0


def slotted():
    x = torch.zeros(2).as_subclass(Slotted)
    x.count = Slotted.calls = 0
    return x


def count_tensor(x):
    x.count += 1
    type(x).calls += 1


class Pair(namedtuple("Pair", "audio video")):
    seen = 0


def pair():
    Pair.seen = 0
    return Pair(torch.zeros(1), torch.zeros(1))


@dataclass(frozen=True)
class Key:
    hits: int = field(default=0, compare=False)


def hit(table):
    key = next(iter(table))
    table[replace(key, hits=key.hits + 1)] = table.pop(key)


def sobol():
    return torch.quasirandom.SobolEngine(3, scramble=True, seed=0)


class Counted(Dataset):
    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.reads += 1
        return self.reads


def loader():
    return DataLoader(Counted(), shuffle=True, generator=torch.Generator().manual_seed(0))


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def scheduler():
    return torch.optim.lr_scheduler.ExponentialLR(sgd(), 0.5)


def take_step(x):
    x.optimizer.step()
    x.step()


def config():
    parser = configparser.ConfigParser()
    parser["run"] = {"n": "0"}
    return parser


def queue():
    own: asyncio.Queue[int] = asyncio.Queue()
    own.put_nowait(1)
    own.put_nowait(2)
    return own


def empty_cell():
    def count():
        nonlocal calls  # type: ignore[misc]
        try:
            calls += 1  # type: ignore[has-type]
        except NameError:
            calls = 1

    if not callable(count):
        calls = 0
    return count


def default():
    def own(n=0, *, more=1):
        return n, more

    return own


def move_defaults(own):
    own.__defaults__, own.__kwdefaults__ = (5,), {"more": 6}


def table():
    own = functools.cache(lambda n: torch.zeros(1))
    own(1)
    return own


def fill(own):
    own(1).add_(1)
    own(2).add_(1)


def stream(kind, content):
    own = kind(content)
    own.seek(2)
    return own


def read_stream(own):
    return own.closed or (own.tell(), own.getvalue())


def holder():
    own = np.zeros(2, dtype=[("o", object), ("n", "f8")])
    own["o"] = [[], []]
    return own


def fill_holder(own):
    own["o"][0].append(1)
    own["n"] += 1


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.seen = 0


def trainer():
    own = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    own.datamodule = Data()  # type: ignore[attr-defined]
    return own


CLIP = torch.zeros(1)


class Graph(ABC):  # noqa: B024
    """The base of data objects whose class is made at run time, as that of PyTorch Geometric's batches."""

    def __init__(self):
        self.x = torch.zeros(1)


def made():
    kind = type("GraphBatch", (Graph,), {})
    assert kind.__module__ == "abc"
    return kind()


def made_without_a_base():
    kind = make_dataclass("Settings", ["n"], bases=(ABC,))
    assert kind.__module__ in ("abc", "types")
    return kind(0)


class Counting(nn.Linear):
    calls = 0


def parametrized():
    Counting.calls = 0
    return parametrizations.weight_norm(Counting(1, 1))


def vectorized():
    return np.vectorize(abs, otypes=[float])


KINDS = {
    "an object of a class made by a call": Kind(made, lambda x: setattr(x, "x", x.x + 1), lambda x: x.x.item()),
    "one without a class of the user's": Kind(made_without_a_base, lambda x: setattr(x, "n", 1), lambda x: x.n),
    "a class below torch's own": Kind(parametrized, lambda x: setattr(Counting, "calls", 1), lambda x: x.calls),
    "a polynomial": Kind(
        lambda: np.polynomial.Polynomial([1.0, 2.0]), lambda x: x.coef.__imul__(2), lambda x: x.coef.tolist()
    ),
    "an old polynomial": Kind(lambda: np.poly1d([1.0, 2.0]), lambda x: x.coeffs.__imul__(2), lambda x: x.c.tolist()),
    "a vectorized function": Kind(vectorized, lambda x: setattr(x, "otypes", "i"), lambda x: x.otypes),
    "a tensor's slot and class": Kind(slotted, count_tensor, lambda x: (x.count, type(x).calls)),
    "a tuple's class": Kind(pair, lambda x: setattr(type(x), "seen", 1), lambda x: x.seen),
    "a key that equals another": Kind(lambda: {Key(): 1}, hit, lambda x: [key.hits for key in x]),
    "a Sobol engine": Kind(sobol, lambda x: x.draw(2), lambda x: (x.num_generated, x.quasi.tolist())),
    "a loader": Kind(loader, lambda x: list(x), lambda x: (x.generator.get_state().tolist(), x.dataset.reads)),
    "an optimizer": Kind(sgd, lambda x: x.param_groups[0].update(lr=3.0), lambda x: x.param_groups[0]["lr"]),
    "a scheduler": Kind(scheduler, take_step, lambda x: (x.last_epoch, x.optimizer.param_groups[0]["lr"])),
    "a config": Kind(config, lambda x: x.set("run", "n", "2"), lambda x: x["run"]["n"]),
    "a queue of asyncio": Kind(queue, lambda x: x.get_nowait(), lambda x: x.qsize()),
    "notes of an exception": Kind(lambda: ValueError("x"), lambda x: x.__dict__.update(n=1), lambda x: dict(vars(x))),
    "values of a dict": Kind(
        lambda: {1: torch.zeros(1)}.values(), lambda x: next(iter(x)).add_(1), lambda x: float(*x)
    ),
    "an empty cell": Kind(empty_cell, lambda x: x(), lambda x: bool(differs_from_empty(x.__closure__[0]))),
    "rebound defaults": Kind(default, move_defaults, lambda x: x()),
    "a cache of results": Kind(table, fill, lambda x: (x.cache_info().currsize, float(x(1)))),
    "closed bytes": Kind(lambda: stream(io.BytesIO, b"abc"), lambda x: x.close(), read_stream),
    "closed text": Kind(lambda: stream(io.StringIO, "abc"), lambda x: x.close(), read_stream),
    "an array's record": Kind(lambda: holder()[0], lambda x: x.__setitem__("n", 3), lambda x: float(x["n"])),
    "fields of an array": Kind(holder, fill_holder, lambda x: x.tolist()),
    "an array's dtype": Kind(
        lambda: np.zeros((2, 2)), lambda x: setattr(x, "dtype", np.complex128), lambda x: (x.dtype, x.shape)
    ),
    "a stack of contexts": Kind(contextlib.ExitStack, lambda x: x.callback(len), lambda x: len(x._exit_callbacks)),
    "a set of data": Kind(
        lambda: TensorDataset(torch.zeros(2)), lambda x: x.tensors[0].add_(1), lambda x: x.tensors[0].tolist()
    ),
    "a weak dict by tensors": Kind(
        lambda: WeakTensorKeyDictionary({CLIP: 1}), lambda x: x.update({CLIP: 2}), lambda x: list(x.values())
    ),
    "indices of a subset": Kind(lambda: Subset(TensorDataset(CLIP), [0]), lambda x: x.indices.append(1), len),
    "a partial": Kind(
        lambda: functools.partial(max, 1, key=abs),
        lambda x: x.__setstate__((min, (2,), {}, None)),
        lambda x: x.func.__name__,
    ),
    "a data module": Kind(trainer, lambda x: vars(x.datamodule).update(seen=1), lambda x: x.datamodule.seen),
}


def differs_from_empty(cell):
    try:
        return cell.cell_contents
    except ValueError:
        return None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.filterwarnings("ignore")
def test_each_kind_is_put_back(kind):
    model = nn.Linear(1, 1)
    model.own = own = kind.make()
    before = kind.read(own)
    snapshot = Snapshot(model, [own])
    for _ in range(2):
        kind.edit(own)
        assert kind.read(own) != before
        snapshot.restore()
        assert kind.read(own) == before
        assert model.own is own


def test_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    snapshot = Snapshot(nn.Linear(1, 1))
    try:
        torch.set_num_threads(before + 1)
        snapshot.restore()
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_what_is_used_up_has_a_copy_in_a_pass():
    entered, array = [], np.arange(5)

    @contextlib.contextmanager
    def span(name):
        entered.append(name)
        yield name

    context, flat = span("fusion"), array.flat
    assert next(flat) == 0
    snapshot = Snapshot(nn.Linear(1, 1), [context, flat])
    with snapshot.args[0] as name:
        assert name == "fusion"
    assert next(snapshot.args[1]) == 1
    snapshot.args[1][:] = 7
    snapshot.restore()
    with context:
        assert list(flat) == [1, 2, 3, 4]
    assert entered == ["fusion"]  # the pass's was put back


def test_a_context_that_is_entered_is_refused_where_it_is_left():
    context = contextlib.contextmanager(lambda: iter([0]))()
    context.__enter__()
    own = Snapshot(nn.Linear(1, 1), [context]).args[0]
    with pytest.raises(ValueError, match="argument 0 is a _GeneratorContextManager"), own:
        pass
    with pytest.raises(ValueError, match="argument 0 is a _GeneratorContextManager"):
        own.__exit__(None, None, None)


def test_a_data_module_is_not_copied():
    model, own = nn.Linear(1, 1), trainer()
    model.own, own.datamodule.images = own, torch.zeros(4)
    snapshot = Snapshot(model)
    own.datamodule.images.add_(1)
    snapshot.restore()
    assert own.datamodule.images.all()


@pytest.mark.parametrize("package", ["aim", "wandb", "mlflow"])
def test_a_package_of_the_users_may_be_called_like_a_logger(package, tmp_path, monkeypatch):
    (tmp_path / f"{package}.py").write_text("class Smoother:\n    calls = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    own = importlib.import_module(package).Smoother()
    model = nn.Linear(1, 1)
    model.own = own
    try:
        snapshot = Snapshot(model)
        own.calls = 1
        snapshot.restore()
        assert own.calls == 0
    finally:
        del sys.modules[package]
