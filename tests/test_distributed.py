"""Several processes, real ones: the same steps as one process with the whole batch, whatever their streams are like."""

from functools import partial

import pytest
import torch

from lightning_abpem import ABPEM
from lightning_abpem.methods import EATA, READ, SAR, Tent
from tests.ranks import WORLD, in_two_processes
from tests.toy import AUDIO, MODALITIES, PAPER, VIDEO, batches, make_toy

STEPS = 10
ADAM = partial(torch.optim.Adam, lr=1e-2)
MASKS = {
    "audio": lambda audio, video: (torch.arange(AUDIO + VIDEO) < AUDIO) & (audio[:, :1, 0] > -9),
    "video": lambda audio, video: torch.arange(AUDIO + VIDEO) >= AUDIO + (video[:, :1, 0] > 0),
}


def stream(sizes, seed=10):
    """Batches of these sizes, in float64."""
    return [
        tuple(x.double() for x in batches(1, size, seed=seed + i)[0]) if size else None for i, size in enumerate(sizes)
    ]


METHODS = {
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
    "abpem published": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3, **PAPER),
    "abpem masked": partial(ABPEM, "fusion.*.attn", MASKS),
    "abpem, two steps": partial(ABPEM, "fusion.*.attn", MODALITIES, steps=2),
    "abpem, reset": partial(ABPEM, "fusion.*.attn", MODALITIES, reset=3),
    "tent": Tent,
    "eata": partial(EATA, redundancy=1.0, entropy_margin=1.0),
    "eata, fisher": partial(
        EATA, redundancy=1.0, entropy_margin=1.0, fisher_weight=5.0, fisher_batches=stream([4, 3], seed=50)
    ),
    "sar": partial(SAR, entropy_margin=1.0),
    "read": partial(READ, "fusion.*.attn"),
}


def adapt(method, own, **changes):
    """Logits of each batch, the record of each step and the final weights of a toy that adapts to `own` batches."""
    model, records, logits = make_toy().double(), [], []
    abpem = METHODS[method](optimizer=ADAM, **changes)
    with torch.no_grad(), abpem.attach(model) as adaptation:
        adaptation.on_step = lambda record, samples: records.append({**record, "samples": torch.tensor(samples)})
        for batch in own:
            if batch is not None:
                logits.append(model(*batch))
        adaptation.drain(is_last=True)
        weights = {name: p.detach().clone() for name, p in adaptation.params.items()}
        counts = adaptation.updates, adaptation.skipped
    return logits, records, weights, counts


def split(batch, sizes):
    return [tuple(x[a:b] for x in batch) for a, b in ((0, sizes[0]), (sizes[0], sum(sizes)))]


SIZES = [(3, 2), (2, 2), (1, 4), (4, 1), (2, 3), (2, 2), (3, 3), (2, 1), (1, 1), (5, 2)]


def halves(rank, names):
    """Each global batch cut in two, unevenly; every method one after the other in the same two processes."""
    whole = stream([sum(sizes) for sizes in SIZES])
    own = [split(batch, sizes)[rank] for batch, sizes in zip(whole, SIZES, strict=True)]
    return {name: adapt(name, own) for name in names}


def test_two_processes_take_the_steps_of_one():
    """Logits, records and weights of ten steps, for every method; memory, masks, resets and several steps too."""
    results = in_two_processes(halves, list(METHODS))
    assert not any(isinstance(result, Exception) for result in results), results
    whole = stream([sum(sizes) for sizes in SIZES])
    for name in METHODS:
        logits, records, weights, counts = adapt(name, whole)
        source = adapt(name, whole, steps=0)[0]
        assert max((a - b).abs().max() for a, b in zip(logits, source, strict=True)) > 1e-3
        for rank, result in enumerate(results):
            own_logits, own_records, own_weights, own_counts = result[name]
            assert own_counts == counts
            for i, (own, expected) in enumerate(zip(own_logits, logits, strict=True)):
                expected = split((expected,), SIZES[i])[rank][0]
                torch.testing.assert_close(own, expected, rtol=0, atol=1e-9, msg=f"{name}, batch {i}, rank {rank}")
            for own, expected in zip(own_records, records, strict=True):
                assert own.keys() == expected.keys()
                for figure, value in expected.items():
                    torch.testing.assert_close(own[figure], value, rtol=0, atol=1e-9, equal_nan=True)
            for parameter, value in weights.items():
                torch.testing.assert_close(own_weights[parameter], value, rtol=0, atol=1e-9)
        first, second = (result[name][2] for result in results)
        assert all(torch.equal(first[parameter], second[parameter]) for parameter in first)


def uneven(rank, lengths):
    return adapt("abpem published", stream([2 + rank] * lengths[rank]), memory_batches=1)


@pytest.mark.parametrize("lengths", [(5, 2), (0, 3)])
def test_a_process_whose_stream_is_over_goes_on_with_the_others(lengths):
    """One process has the batches of both while both have some, and then those of the one that is left."""
    first, second = in_two_processes(uneven, lengths)
    ours, theirs = (stream([2 + rank] * lengths[rank]) for rank in range(WORLD))
    whole = []
    for i in range(max(lengths)):
        parts = [own[i] for own in (ours, theirs) if i < len(own)]
        whole.append(tuple(torch.cat(columns) for columns in zip(*parts, strict=True)))
    _, records, weights, counts = adapt("abpem published", whole, memory_batches=1)
    assert (len(first[0]), len(second[0])) == lengths
    for result in (first, second):
        assert result[3] == counts == (max(lengths), 0)
        assert [record["samples"] for record in result[1]] == [record["samples"] for record in records]
        for parameter, value in weights.items():
            torch.testing.assert_close(result[2][parameter], value, rtol=0, atol=1e-9)


def failing(rank):
    own = stream([2] * 4)
    if rank == 1:
        own[2] = (own[2][0][:, :, :2], own[2][1])  # a batch that the model cannot take
    return adapt("abpem", own)


def test_a_process_that_fails_stops_the_others():
    other, failed = in_two_processes(failing)
    assert "Process 1 stopped with an error" in str(other)
    assert 'sync="local"' in str(other)
    assert "mat1 and mat2" in str(failed)


def poisoned(rank):
    own = stream([2] * 4)
    if rank == 1:
        own[1][0][:] = torch.nan
    return adapt("abpem", own)


def test_a_step_is_skipped_by_all_or_none():
    first, second = in_two_processes(poisoned)
    assert first[3] == second[3] == (3, 1)
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert all(value.isfinite().all() for value in first[2].values())


def alone(rank):
    return adapt("abpem", stream([2 + rank] * 3), sync="local")


def test_with_sync_local_each_adapts_on_its_own_stream():
    for rank, result in enumerate(in_two_processes(alone)):
        expected = adapt("abpem", stream([2 + rank] * 3))
        assert all(torch.equal(a, b) for a, b in zip(result[0], expected[0], strict=True))
        assert all(torch.equal(result[2][name], value) for name, value in expected[2].items())
