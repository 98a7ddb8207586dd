"""The engine and torch.compile: what each way of compiling gives, and that nothing is compiled anew for each batch."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_abpem import ABPEM
from lightning_abpem.methods import Tent
from lightning_abpem.modules.compiled import compiled_around, compiled_entry, eagerly, inside_compiled, is_compiled
from lightning_abpem.modules.patches import Changes
from tests.covering import covering
from tests.reference import same_state
from tests.toy import MODALITIES, WIDTH, batches, loader, make_toy

ADAM = partial(torch.optim.Adam, lr=1e-2)
STREAM = batches(5)


class Graphs:
    """A backend of torch.compile that runs the graphs as they are; counts them and their runs."""

    def __init__(self):
        self.count = self.runs = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        self.count += 1
        return run


class Encoder(nn.Module):
    """The toy's, without the attribute that counts runs, at every change of which torch would compile anew."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(self.embed(x).tanh())


def toy():
    model: Any = make_toy()
    torch.manual_seed(1)
    model.audio, model.video = Encoder(), Encoder()
    return model.eval()


def whole(model, **options):
    return torch.compile(model, **options)


def whole_in_place(model, **options):
    model.compile(**options)
    return model


def whole_forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


def encoders(model, **options):
    model.audio, model.video = torch.compile(model.audio, **options), torch.compile(model.video, **options)
    return model


def encoders_in_place(model, **options):
    model.audio.compile(**options)
    model.video.compile(**options)
    return model


def all_but_the_fusion(model, **options):
    model.head = torch.compile(model.head, **options)
    return encoders(model, **options)


def fusion(model, **options):
    model.fusion = torch.compile(model.fusion, **options)
    return model


def fusion_in_place(model, **options):
    model.fusion.compile(**options)
    return model


def attention(model, **options):
    model.fusion[0].attn = torch.compile(model.fusion[0].attn, **options)
    return model


def attention_in_place(model, **options):
    model.fusion[0].attn.compile(**options)
    return model


WAYS = {f.__name__: f for f in (whole, whole_in_place, whole_forward, encoders, encoders_in_place)}
WAYS |= {f.__name__: f for f in (all_but_the_fusion, fusion, fusion_in_place, attention, attention_in_place)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def abpem(**changes):
    options: dict[str, Any] = {"fusion": "fusion.*.attn", "modalities": MODALITIES, "k": 2, "optimizer": ADAM}
    return ABPEM(**(options | changes))


def adapted(model, **changes):
    with torch.no_grad(), abpem(**changes).attach(model) as adaptation:
        predictions = torch.stack([model(*args) for args in STREAM])
    assert adaptation.updates == len(STREAM)
    return predictions


@pytest.mark.parametrize(("way", "warm", "memory"), covering(list(WAYS), [False, True], [1, 3]))
@pytest.mark.filterwarnings("error:A frozen module gave another output")
def test_it_is_the_adaptation_of_the_plain_model(way, warm, memory):
    expected = adapted(toy(), memory_batches=memory)
    backend = Graphs()
    model = WAYS[way](toy(), backend=backend)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if warm:
        with torch.no_grad():
            model(*STREAM[0])
    torch.testing.assert_close(adapted(model, memory_batches=memory), expected, rtol=0, atol=1e-6)
    assert same_state(before, model.state_dict())
    assert backend.count >= 1
    with torch.no_grad():
        torch.testing.assert_close(model(*STREAM[0]), toy()(*STREAM[0]))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_later_batches_compile_nothing(way):
    backend = Graphs()
    model = way(toy(), backend=backend)
    with torch.no_grad(), abpem().attach(model):
        counts = []
        for args in batches(6):
            model(*args)
            counts.append(backend.count)
    assert counts[1:] == [counts[1]] * 5  # the first two batches are audited
    assert counts[-1] <= 6  # with gradients and without


@pytest.mark.parametrize("way", [encoders, encoders_in_place])
def test_compiled_encoders_run_once_for_a_batch(way):
    backend = Graphs()
    model = way(toy(), backend=backend)
    with torch.no_grad(), abpem().attach(model):
        for args in batches(5):
            model(*args)
    assert backend.runs == 2 * (5 + 2)  # two encoders, two audits


def test_everything_compiled_by_the_trainer():
    expected = toy()
    run = partial(Trainer, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    run(enable_model_summary=False, callbacks=[abpem()]).test(expected, loader(), verbose=False)
    compiled: Any = torch.compile(toy(), backend="eager")
    run(enable_model_summary=False, callbacks=[abpem()]).test(compiled, loader(), verbose=False)
    torch.testing.assert_close(torch.cat(compiled._orig_mod.seen), torch.cat(expected.seen), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", [whole, fusion, attention])
def test_a_compiled_weight_is_not_called_a_tie_of_itself(way):
    model = way(toy(), backend="eager")
    for callback in (abpem(), Tent()):
        with callback.attach(model) as adaptation, torch.no_grad():
            assert "is the same tensor" not in adaptation.describe()
            model(*STREAM[0])


def test_a_target_inside_compiled_code():
    model = nn.Sequential(toy())
    model.compile(backend="eager")
    message = "`target` to be called from Python, but '0' runs inside compiled code. Name the module that torch.compile"
    with pytest.raises(ValueError, match=message), abpem(fusion="0.fusion.*.attn", target="0").attach(model):
        pass


def test_a_compiled_target():
    model: Any = nn.Module()
    model.net = torch.compile(toy(), backend="eager")
    model.eval()
    with torch.no_grad(), abpem(fusion="net.fusion.*.attn", target="net").attach(model):
        predictions = torch.stack([model.net(*args) for args in STREAM])
    torch.testing.assert_close(predictions, adapted(toy()), rtol=0, atol=1e-6)


def test_entries():
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert not is_compiled(model)
    model[0].compile(backend="eager")
    assert compiled_entry(model[0]) == "_compiled_call_impl"
    inner = model[1][0]
    model[1] = torch.compile(model[1], backend="eager")
    assert compiled_entry(model[1]) == "forward"
    assert is_compiled(model)
    assert inner in inside_compiled(model)
    assert model[1] not in inside_compiled(model)
    assert compiled_entry(model[2]) is None


def test_going_around():
    model, backend = nn.Sequential(nn.Linear(3, 3)), Graphs()
    compiled: Any = torch.compile(model, backend=backend)
    before = dict(compiled.__dict__)
    with Changes() as changes:
        eagerly(changes, compiled_around(compiled, [model[0]]))
        compiled(torch.zeros(1, 3))
        assert backend.count == 0
    assert compiled.__dict__ == before
    with Changes() as changes:
        eagerly(changes, compiled_around(compiled, [nn.Linear(3, 3)]))
        compiled(torch.zeros(1, 3))
        assert backend.count == 1
