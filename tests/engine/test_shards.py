"""Models that FSDP2 cuts into shards, in two real processes: the steps of one process with the whole model."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.methods import EATA, READ, SAR, Tent
from lightning_abpem.trainer.strategies import check_strategy
from tests.ranks import WORLD, in_two_processes
from tests.toy import MODALITIES, PAPER, Toy, batches, loader, make_toy

ADAM = partial(torch.optim.Adam, lr=1e-2)
METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
    "abpem published": partial(ABPEM, "fusion.*.attn", MODALITIES, reset=3, **PAPER),
    "read": partial(READ, "fusion.*.attn"),
    "tent": Tent,
}
CUTS = {
    "encoders": ["audio", "video"],
    "blocks": ["audio", "video", "fusion.0", "head"],
    "attention and root": ["fusion.0.attn", ""],
    "root alone": [""],
}


def stream(count=5):
    return [tuple(x.double() for x in batch) for batch in batches(count)]


def cut(model, names):
    from torch.distributed.fsdp import fully_shard

    for name in names:
        fully_shard(model.get_submodule(name))
    return model


def whole_state(model):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.state_dict().items()
    }


def adapt(callback, model, own):
    """Logits, adapted values and whether the source is back, with each batch's predictions."""
    before = whole_state(model)
    model(*own[0])  # after which FSDP2 keeps some of the weights whole
    with torch.no_grad(), callback.attach(model) as adaptation:
        logits = [model(*batch) for batch in own]
        values = adaptation.state_dict()["weights"]["params"]
    after = whole_state(model)
    return logits, values, all(torch.equal(before[name], after[name]) for name in before)


def every_cut(rank):
    own = [tuple(x[2 * rank : 2 * rank + 2] for x in batch) for batch in stream()]
    return {
        (cuts, name): adapt(METHODS[name](optimizer=ADAM), cut(make_toy().double(), CUTS[cuts]), own)
        for cuts in CUTS
        for name in METHODS
    }


def test_sharded_models_take_the_steps_of_whole_ones():
    """Whatever is cut: encoders, fusion, head or all of it; and the shards return to the source bit by bit."""
    results = in_two_processes(every_cut)
    assert not any(isinstance(result, Exception) for result in results), results
    for name in METHODS:
        logits, values, _ = adapt(METHODS[name](optimizer=ADAM), make_toy().double(), stream())
        source = [make_toy().double()(*batch) for batch in stream()]
        assert max((a - b).abs().max() for a, b in zip(logits, source, strict=True)) > 1e-3
        for cuts in CUTS:
            for rank, result in enumerate(results):
                own, own_values, is_restored = result[cuts, name]
                assert is_restored
                for a, b in zip(own, logits, strict=True):
                    torch.testing.assert_close(a, b[2 * rank : 2 * rank + 2], rtol=0, atol=1e-9)
                for parameter, value in values.items():
                    torch.testing.assert_close(own_values[parameter], value, rtol=0, atol=1e-9)


def refused(rank):
    """The messages of what cannot work with shards."""
    messages = []
    for callback in (SAR(), EATA(), METHODS["abpem"](sync="local"), ABPEM("fusion.*.attn")):
        try:
            adapt(callback, cut(make_toy().double(), ["fusion.0.norm", "fusion.0.attn"]), stream(1))
        except ValueError as error:
            messages.append(str(error))
    try:
        adapt(METHODS["abpem"](), cut(make_toy().double(), CUTS["blocks"]), stream(3 - rank))
    except RuntimeError as error:
        messages.append(str(error))
    model, (first, second) = cut(make_toy().double(), CUTS["blocks"]), stream(2)
    try:
        with torch.no_grad(), METHODS["abpem"]().attach(model):
            model(*first)
            if rank == 1:
                raise ValueError("a sample that cannot be read")
            model(*second)
    except (RuntimeError, ValueError) as error:
        messages.append(str(error))
    return messages


def test_what_shards_do_not_allow():
    results = in_two_processes(refused)
    assert not any(isinstance(result, Exception) for result in results), results
    for messages in results:
        assert [message.split(":")[0][:40] for message in messages[:2]] == [
            "SAR looks at the values of what adapts, ",
            "EATA looks at the values of what adapts,",
        ]
        assert 'Expected sync="global", for the model is cut into shards' in messages[2]
        assert 'also the one that "auto" reads them off' in messages[3]
        assert "Process [1] had no batch, or failed, while others had one" in messages[4]
    assert "Process [1] had no batch, or failed, while others had one" in results[0][5]
    assert results[1][5] == "a sample that cannot be read"


def monitored(rank):
    """Records, logits and what is left of runs that are compared with the source: whole and in shards."""

    def run(cuts, **options):
        callback = METHODS["abpem"](optimizer=ADAM, **options)
        model, records = cut(make_toy().double(), cuts), []
        own = [tuple(x[rank::WORLD] for x in batch) for batch in stream()]
        with torch.no_grad(), callback.attach(model) as adaptation:
            adaptation.on_step = lambda record, samples: records.append(record)
            logits = [model(*batch) for batch in own]
        return records, logits, whole_state(model), callback.events

    watched = {"monitor": "source", "guard": "warn"}
    return run([], **watched), {name: (run(cuts, **watched), run(cuts)) for name, cuts in CUTS.items()}


def test_a_comparison_with_the_source():
    """The figures are those of whole models in two processes, and predictions those without a comparison."""
    results = in_two_processes(monitored)
    assert not any(isinstance(result, Exception) for result in results), results
    for (records, logits, state, events), in_shards in results:
        assert min(record["drift"] for record in records[1:]) > 1e-3
        assert max(abs(record["entropy"] - record["source_entropy"]) for record in records) > 1e-4
        for name, (own, plain) in in_shards.items():
            for a, b in zip(own[0], records, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)
            for a, b, c in zip(own[1], logits, plain[1], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
                assert torch.equal(a, c)
            assert own[3] == events
            assert all(torch.equal(value, state[key]) for key, value in own[2].items())


def with_a_broken_sample(rank):
    own = [tuple(x[rank::WORLD].clone() for x in batch) for batch in stream()]
    if rank == 1:
        own[2][0][0, 0, 0] = torch.nan
    callback, model = METHODS["abpem"](optimizer=ADAM), cut(make_toy().double(), CUTS["blocks"])
    with torch.no_grad(), callback.attach(model):
        logits = [model(*batch) for batch in own]
    return callback.updates, callback.skipped_for, callback.left_out, torch.cat(logits).isnan().any(1).sum()


def test_a_broken_sample_costs_the_step_in_all_processes():
    for rank, result in enumerate(in_two_processes(with_a_broken_sample)):
        assert result == (len(stream()) - 1, {"not finite": 1}, 0, rank)


class Sharding(Toy):
    """Cuts itself as Lightning's ModelParallelStrategy asks for."""

    def configure_model(self):
        cut(self, CUTS["blocks"])


def in_a_trainer(rank, folder):
    os.environ.update(TORCHELASTIC_RUN_ID="1", LOCAL_RANK=str(rank), GROUP_RANK="0", LOCAL_WORLD_SIZE=str(WORLD))
    torch.manual_seed(0)
    model, callback = Sharding(), METHODS["abpem"](optimizer=ADAM)
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1),
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.test(model, loader(), verbose=False)
    return model.seen, callback.updates, callback.averages[0], whole_state(model)


def test_through_model_parallel_strategy(tmp_path):
    """The sampler deals samples in turn: process 0 has the even ones, process 1 the odd ones."""
    results = in_two_processes(in_a_trainer, tmp_path)
    assert not any(isinstance(result, Exception) for result in results), results
    data = DataLoader(loader().dataset, batch_size=2 * 4)
    order = [torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])] * len(data)
    own = [tuple(x[i] for x in batch[:2]) for batch, i in zip(data, order, strict=True)]
    logits, _, _ = adapt(METHODS["abpem"](optimizer=ADAM), make_toy(), own)
    for rank, (seen, updates, averages, state) in enumerate(results):
        assert updates == len(data)
        assert averages["entropy"] == results[0][2]["entropy"]
        for a, b in zip(seen, logits, strict=True):
            torch.testing.assert_close(a, b[4 * rank : 4 * rank + 4], rtol=0, atol=1e-5)
        assert all(torch.equal(value, make_toy().state_dict()[name]) for name, value in state.items())


def test_tensor_parallel_is_refused():
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size"):
        check_strategy(ModelParallelStrategy(tensor_parallel_size=2))
