"""Several processes, real ones: the same steps as one process with the whole batch, whatever their streams are like."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from lightning_abpem import ABPEM, TestTimeAdaptation
from lightning_abpem.engine.method import Step
from lightning_abpem.engine.ranks import Ranks
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


METHODS: dict[str, Callable[..., TestTimeAdaptation]] = {
    "abpem": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3),
    "abpem published": partial(ABPEM, "fusion.*.attn", MODALITIES, memory_batches=3, **PAPER),
    "abpem masked": partial(ABPEM, "fusion.*.attn", MASKS),
    "abpem, two steps": partial(ABPEM, "fusion.*.attn", MODALITIES, steps=2),
    "abpem, reset": partial(ABPEM, "fusion.*.attn", MODALITIES, reset=3),
    "abpem, reset by samples": partial(ABPEM, "fusion.*.attn", MODALITIES, reset="15 samples"),
    "abpem, several rates": partial(
        ABPEM, "fusion.*.attn", MODALITIES, learning_rate=(1e-3, 3e-2, 0.3), memory_batches=2
    ),
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
        source = adapt(name, whole, steps=0, learning_rate=None)[0]
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
            for parameter, value in weights.items() if "rates" not in name else ():  # the end chooses once more
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


# -------------------------------------------------------------------------------------------------------- corner cases

FIRST_EMPTY = [(0, 3), (3, 2), (2, 2), (1, 3)]
FIRST_EMPTY_STREAM = list(zip(stream([sum(sizes) for sizes in FIRST_EMPTY]), FIRST_EMPTY, strict=True))
EMPTY = [(0, 0), (2, 0), (0, 3), (2, 2), (0, 0), (3, 1)]


def with_empty_batches(rank):
    whole = [tuple(x.double() for x in batches(1, sum(sizes), seed=10 + i)[0]) for i, sizes in enumerate(EMPTY)]
    own = [split(batch, sizes)[rank] for batch, sizes in zip(whole, EMPTY, strict=True)]
    remembering = adapt("abpem published", [split(batch, sizes)[rank] for batch, sizes in FIRST_EMPTY_STREAM])
    return adapt("abpem published", own, memory_batches=1), remembering


def resetting(rank):
    """Six updates, of which the last two are of the first process alone."""
    return adapt("abpem, reset", stream([2] * (6 - 2 * rank)))


def resting(rank):
    """The second process has no batch in rounds two to four; weights stand still, so that only the memory counts."""
    own, records = stream([2] * 7, seed=20 + 50 * rank), []
    abpem = ABPEM("fusion.*.attn", MODALITIES, memory_batches=3, optimizer=partial(torch.optim.SGD, lr=0), **PAPER)
    model = make_toy().double()
    with torch.no_grad(), abpem.attach(model) as adaptation:
        adaptation.on_step = lambda record, samples: records.append(record)
        for batch in own[:4] if rank == 0 else own[:1]:
            model(*batch)
        adaptation.drain()
        for batch in own[4:]:
            model(*batch)
    return own, records


def reached(rank):
    """By loss, which parameters the loss of a process reaches: the first here, the second there, the third nowhere."""
    here, there = torch.full((2,), 1.0 + rank), None
    losses: list[list[torch.Tensor | None]]
    losses = [[here, there, None], [here, there, None]] if rank == 0 else [[None, None, None], [None, here, None]]
    return Ranks(torch.device("cpu")).sum(losses, [torch.zeros(2)] * 3)


def saved_apart(rank):
    """A state that is taken when `attach` ends is of all steps; states of different steps are refused."""
    own = stream([2] * (5 - 3 * rank))
    first, second = METHODS["abpem"](optimizer=ADAM), METHODS["abpem"](optimizer=ADAM)
    model = make_toy().double()
    with torch.no_grad(), first.attach(model) as adaptation:
        for batch in own[:2]:
            model(*batch)
        early = adaptation.state_dict()
        for batch in own[2:]:
            model(*batch)
        adaptation.drain(is_last=True)
        model(*own[0])  # of one alone, after all: predicts
    updates = first.state_dict()["weights"]["counts"][0]
    second.load_state_dict(early if rank == 0 else first.state_dict())
    try:
        with torch.no_grad(), second.attach(make_toy().double()) as adaptation:
            adaptation.drain(is_last=True)
    except RuntimeError as error:
        return updates, str(error)


def without_a_batch(rank):
    """Neither has a batch of the first dataloader; the second process has none of the second, either."""
    model = make_toy().double()
    error = None
    with torch.no_grad(), METHODS["abpem"](optimizer=ADAM).attach(model) as adaptation:
        adaptation.drain(is_empty=True)
        try:
            model(*stream([2])[0]) if rank == 0 else adaptation.drain(is_empty=True)
        except RuntimeError as caught:
            error = str(caught)
        updates = adaptation.updates
    return error, updates, weights_of(model)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def corner_cases(rank):
    cases = (with_empty_batches, resetting, resting, reached, saved_apart, without_a_batch)
    return {f.__name__: f(rank) for f in cases}


@pytest.fixture(scope="module")
def corners():
    results = in_two_processes(corner_cases)
    assert not any(isinstance(result, Exception) for result in results), results
    return lambda function: [result[function.__name__] for result in results]


def test_a_process_without_a_batch_of_a_dataloader_stops_all(corners):
    for error, updates, weights in corners(without_a_batch):
        assert "Expected every process to have a batch of a dataloader, but got none in process 1." in error
        assert updates == 0
        assert all(torch.equal(weights[name], p) for name, p in make_toy().double().named_parameters())


def test_empty_batches(corners):
    whole = [tuple(x.double() for x in batches(1, sum(sizes), seed=10 + i)[0]) for i, sizes in enumerate(EMPTY)]
    logits, _, weights, counts = adapt("abpem published", whole, memory_batches=1)
    for rank, ((own_logits, _, own_weights, own_counts), _) in enumerate(corners(with_empty_batches)):
        assert own_counts == counts == (4, 0)
        for own, expected, sizes in zip(own_logits, logits, EMPTY, strict=True):
            torch.testing.assert_close(own, split((expected,), sizes)[rank][0], rtol=0, atol=1e-9)
        for parameter, value in weights.items():
            torch.testing.assert_close(own_weights[parameter], value, rtol=0, atol=1e-9)


def test_a_memory_that_begins_with_an_empty_batch(corners):
    _, _, weights, counts = adapt("abpem published", [batch for batch, _ in FIRST_EMPTY_STREAM])
    for _, (_, _, own_weights, own_counts) in corners(with_empty_batches):
        assert own_counts == counts == (4, 0)
        for parameter, value in weights.items():
            torch.testing.assert_close(own_weights[parameter], value, rtol=0, atol=1e-9)


def test_a_reset_waits_for_the_next_batch(corners):
    """After six updates with reset=3 the weights are still those of the sixth, as in one process."""
    ours, theirs = stream([2] * 6), stream([2] * 4)
    whole = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(ours, theirs, strict=False)] + ours[4:]
    _, _, weights, _ = adapt("abpem, reset", whole)
    source = dict(make_toy().double().named_parameters())
    assert not torch.equal(weights["fusion.0.attn.qkv.weight"], source["fusion.0.attn.qkv.weight"])
    for _, _, own_weights, counts in corners(resetting):
        assert counts == (6, 0)
        for parameter, value in weights.items():
            torch.testing.assert_close(own_weights[parameter], value, rtol=0, atol=1e-9)


def test_a_memory_ages_with_the_batches_of_others(corners):
    (ours, first), (theirs, second) = corners(resting)
    both = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(ours, theirs, strict=True)]
    whole = [*both[:1], *ours[1:4], *both[4:]]
    records = []
    abpem = ABPEM("fusion.*.attn", MODALITIES, memory_batches=3, optimizer=partial(torch.optim.SGD, lr=0), **PAPER)
    model = make_toy().double()
    with torch.no_grad(), abpem.attach(model) as adaptation:
        adaptation.on_step = lambda record, samples: records.append(record)
        for batch in whole:
            model(*batch)
    assert len(first) == len(second) == len(records) == 7
    for i in (0, 4, 5, 6):  # in between the second process's memory is away with it
        for figure, value in records[i].items():
            torch.testing.assert_close(first[i][figure], value, rtol=0, atol=1e-9)
            torch.testing.assert_close(second[i][figure], value, rtol=0, atol=1e-9)


def test_a_parameter_moves_if_any_process_reaches_it(corners):
    for (first, second, third), (again, other, never) in corners(reached):
        assert first.tolist() == again.tolist() == [1, 1]
        assert second is third is never is None
        assert other.tolist() == [2, 2]


def test_states_of_different_steps(corners):
    for updates, message in corners(saved_apart):
        assert updates == 5
        assert "different numbers of steps, [2, 5]" in message


def failing_inside(rank):
    """The second process fails between the exchanges of its second step."""
    gradients_of, steps = Step.gradients_of, []

    def breaks(step, *losses):
        steps.append(step)
        if rank == 1 and len(steps) == 2:
            raise MemoryError("out of memory")
        return gradients_of(step, *losses)

    Step.gradients_of = breaks
    return adapt("abpem", stream([2] * 4))


def test_a_process_that_fails_in_the_middle_of_a_step():
    other, failed = in_two_processes(failing_inside)
    assert "out of memory" in str(failed)
    assert isinstance(other, RuntimeError)


# ------------------------------------------------------------------------------------------------------- a bad batch

BAD = [(3, 2), (2, 3), (4, 3), (2, 2), (3, 3), (2, 4)]


def with_bad_batches(rank, method):
    """In the third round the second process's batch cannot be adapted, in the fifth nobody's can."""

    def adapted(is_bad):
        whole = [tuple(x.double() for x in batches(1, sum(sizes), seed=10 + i)[0]) for i, sizes in enumerate(BAD)]
        own = [split(batch, sizes)[rank] for batch, sizes in zip(whole, BAD, strict=True)]
        for i in (2, 4) if rank == 1 else (4,):
            audio, video = own[i]
            own[i] = (audio, video[:, 1:]) if is_bad else (audio[:0], video[:0])  # a token less, or no samples
        model, records, logits = make_toy().double(), [], []
        abpem = METHODS[method](optimizer=ADAM)
        with torch.no_grad(), abpem.attach(model) as adaptation:
            adaptation.on_step = lambda record, samples: records.append(record)
            logits = [model(*batch) for batch in own]
            weights = {name: p.detach().clone() for name, p in adaptation.params.items()}
        return logits, records, weights, abpem.updates, abpem.skipped_for

    return adapted(True), adapted(False)


@pytest.mark.parametrize("method", ["abpem", "abpem, two steps"])
def test_a_batch_that_cannot_be_adapted_is_left_out_of_the_others_step(method):
    results = in_two_processes(with_bad_batches, method)
    assert not any(isinstance(result, Exception) for result in results), results
    for rank, (got, expected) in enumerate(results):
        assert got[3] == expected[3] == (10 if "two" in method else 5)
        assert got[4] == {"does not fit": 1 + rank}
        assert all(torch.equal(got[2][name], value) for name, value in expected[2].items())
        assert all(torch.equal(got[2][name], value) for name, value in results[0][0][2].items())
        assert len(got[1]) == len(expected[1])
        good = [i for i in range(len(BAD)) if i != 4 and (rank, i) != (1, 2)]
        assert all(torch.equal(got[0][i], expected[0][i]) for i in good)
        assert [len(own) for own in got[0]] == [sizes[rank] for sizes in BAD]


def failing_at_once(rank):
    """The first batch of the second process cannot be adapted: that may be its configuration."""
    audio, video = stream([2], seed=rank)[0]
    return adapt("abpem", [(audio, video[:, rank:])])


def test_a_first_batch_that_cannot_be_adapted_stops_all():
    first, second = in_two_processes(failing_at_once)
    assert isinstance(first, RuntimeError)
    assert "Process 1 stopped with an error" in str(first)
    assert isinstance(second, ValueError)
