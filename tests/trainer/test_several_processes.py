"""A Trainer with two real processes, however they are launched: what one process gives with the whole batch."""

import os
import re
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_abpem.engine.forward import Forward
from lightning_abpem.engine.ranks import GlobalBatch, Ranks
from tests.ranks import WORLD
from tests.reference import same_state
from tests.toy import listed
from tests.trainer_program import (
    BATCH_SIZE,
    EMPTY,
    EMPTY_FOR_BOTH,
    EMPTY_NAMES,
    LIMIT,
    SAMPLES,
    UNEVEN,
    Keep,
    Model,
    adapting,
    samples,
    stream,
    trainer,
    weights_of,
)

LAUNCHERS = {"LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
LAUNCHERS |= {"MASTER_PORT", "TORCHELASTIC_RUN_ID"}  # as a test before may have left them

close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
close_float32 = partial(torch.testing.assert_close, rtol=0, atol=1e-6)  # averages and results are rounded to it


def command(*words):
    return [sys.executable, "-m", *map(str, words)]


def start(words, **env):
    """Start a program that knows of no other launch: by LOCAL_RANK, say, Lightning takes its peers for started."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | env
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(process):
    """Exit code and output; the program must end by itself."""
    try:
        return process.communicate(timeout=180)[0], process.returncode
    finally:
        process.kill()


def run(*words):
    output, code = finish(start(command("tests.trainer_program", *words)))
    assert code == 0, output


def left_by(out, name):
    """Return each process's results, by rank."""
    return [torch.load(out / f"{name}-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def in_one_process(function, loaders, folder, **method):
    """Run a Trainer of one device on these batches, by dataloader; return its results."""
    abpem, loaders = adapting(stages=(function,), **method), [DataLoader(own, batch_size=None) for own in loaders]
    runner = trainer(abpem, Keep(abpem, folder, "twin"), devices=1)
    options = {} if function == "predict" else {"verbose": False}
    result = getattr(runner, function)(Model(len(loaders)), loaders if len(loaders) > 1 else loaders[0], **options)
    return torch.load(folder / "twin-0.pt", weights_only=False), result


def joined(parts):
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def turns(streams):
    """By turn, the batches of those processes that still have one, in the order of ranks; and their sizes."""
    batches, sizes = [], []
    for i in range(max(map(len, streams))):
        parts = [own[i] if i < len(own) else None for own in streams]
        batches.append(joined([part for part in parts if part is not None]))
        sizes.append([0 if part is None else len(part[0]) for part in parts])
    return batches, sizes


@cache
def dealt(repeats):
    """Deal samples to processes as Lightning's sampler: every second one, repeated or not until all have as many."""
    everything, count = samples(SAMPLES), SAMPLES + SAMPLES % 2 * repeats
    own = [torch.arange(rank, count, WORLD) % SAMPLES for rank in range(WORLD)]
    return turns([[tuple(x[chosen] for x in everything) for chosen in order.split(BATCH_SIZE)] for order in own])


def compare(own, twin, sizes):
    """Hold what the processes saw against the twin; `sizes` are, by dataloader and turn, those of their batches."""
    outputs, expected = [iter(seen["outputs"]) for seen in own], iter(twin["outputs"])
    for dataloader, loader_sizes in enumerate(sizes):
        for turn in loader_sizes:
            _, logits = next(expected)
            for rank, part in enumerate(logits.split(turn)):
                if len(part):
                    index, logits = next(outputs[rank])
                    assert index == dataloader
                    close(logits, part, msg=partial("process {}: {}".format, rank))
    assert all(next(rest, None) is None for rest in [*outputs, expected])
    for seen in own:
        close(seen["adapted"], twin["adapted"])
        assert seen["updates"] == twin["updates"] == sum(map(len, sizes))
        close_float32(seen["averages"], twin["averages"])
        assert same_state(seen["restored"], weights_of(Model()))
    assert same_state(own[0]["adapted"], own[-1]["adapted"])


def compare_results(own, twin):
    for result in own:
        assert [each.keys() for each in result] == [each.keys() for each in twin]
        for each, expected in zip(result, twin, strict=True):
            assert each == pytest.approx(expected, abs=1e-6)


def compare_sampled(out, folder):
    """Test with memory and validate, of the program's scenario "sampled"."""
    batches, sizes = dealt(repeats=True)
    for function, method in (("test", {"memory_batches": 3}), ("validate", {})):
        twin, result = in_one_process(function, [batches], folder, **method)
        compare(left_by(out, function), twin, [sizes])
        compare_results(left_by(out, f"{function}-result"), result)
        source, _ = in_one_process(function, [batches], folder, **method, steps=0)
        moved = [(a - b).abs().max() for (_, a), (_, b) in zip(source["outputs"], twin["outputs"], strict=True)]
        assert min(moved) > 1e-3


@pytest.mark.slow
def test_launched_by_lightning(tmp_path):
    """17 samples for two processes: the sampler gives the second sample 0 again, so that both have 9."""
    run("sampled", tmp_path)
    compare_sampled(tmp_path, tmp_path)


@pytest.mark.slow
def test_spawned_processes_test_and_predict(tmp_path):
    """In predict the sampler repeats nothing: the first process has a batch more than the second."""
    run("predicted", tmp_path, "--strategy", "ddp_spawn")
    batches, sizes = dealt(repeats=True)
    twin, result = in_one_process("test", [batches], tmp_path)
    compare(left_by(tmp_path, "test"), twin, [sizes])
    compare_results([torch.load(tmp_path / "test-result-0.pt")], result)
    batches, sizes = dealt(repeats=False)
    assert sizes == [[4, 4], [4, 4], [1, 0]]
    twin, _ = in_one_process("predict", [batches], tmp_path)
    predicted = left_by(tmp_path, "predict")
    compare(predicted, twin, [sizes])
    for rank, (logits, indices) in enumerate(left_by(tmp_path, "epoch")):
        chosen = torch.arange(rank, SAMPLES, WORLD)
        assert [list(own) for own in indices[0]] == [own.tolist() for own in chosen.split(BATCH_SIZE)]
        written = [torch.load(tmp_path / f"batch-{i}-{rank}.pt") for i in range(len(logits))]
        for (_, seen), own, (each, _) in zip(predicted[rank]["outputs"], logits, written, strict=True):
            assert torch.equal(own, seen)
            assert torch.equal(each, seen)
        assert [own for _, own in written] == indices[0]


def dataloaders(sizes, limit=None):
    """The twin's batches, and the sizes of the processes', by dataloader and turn."""
    own = [[stream(s, i, rank)[:limit] for i, s in enumerate(each)] for rank, each in enumerate(sizes)]
    return zip(*(turns([streams[i] for streams in own]) for i in range(len(sizes[0]))), strict=True)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Run the program that deals the samples itself; return its results, its output and its exit code."""
    out = tmp_path_factory.mktemp("streams")
    return out, *finish(start(command("tests.trainer_program", "streams", out)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("unsized", None), ("sized", None), ("limited", LIMIT)])
def test_dataloaders_whose_lengths_differ_by_process(streams, name, limit, tmp_path):
    """Iterable data sets of unknown and of known length, some of them shorter than a limit; metrics of the user's."""
    out, output, _ = streams
    assert (out / f"{name}-result-1.pt").exists(), output
    batches, sizes = dataloaders(UNEVEN, limit)
    twin, result = in_one_process("test", batches, tmp_path)
    compare(left_by(out, name), twin, sizes)
    compare_results(left_by(out, f"{name}-result"), result)


@pytest.mark.slow
def test_all_return_to_the_source_at_a_new_dataloader(streams, tmp_path):
    out, output, _ = streams
    assert (out / "reset-result-0.pt").exists(), output
    batches, sizes = dataloaders(UNEVEN)
    twin, _ = in_one_process("test", batches, tmp_path, reset="dataloader")
    compare(left_by(out, "reset"), twin, sizes)


@pytest.mark.slow
def test_a_dataloader_of_which_no_process_has_a_batch(streams, tmp_path):
    out, output, _ = streams
    assert (out / "empty for both-result-0.pt").exists(), output
    batches, sizes = dataloaders(EMPTY_FOR_BOTH)
    assert sizes[1] == []
    twin, _ = in_one_process("test", batches, tmp_path)
    compare(left_by(out, "empty for both"), twin, sizes)


@pytest.mark.slow
def test_a_process_without_a_batch_in_a_dataloader_is_refused(tmp_path):
    """In all processes, however the lengths come to be known; the weights are the source's again."""
    output, code = finish(start(command("tests.trainer_program", "empty", tmp_path)))
    assert code == 0, output
    for sync, names in EMPTY_NAMES.items():
        for name in names:
            without = next(rank for rank in range(WORLD) if () in EMPTY[name][rank])
            for kind in ("Stream", "SizedStream"):
                for error in left_by(tmp_path, f"{name}, {kind}, {sync}-error"):
                    assert re.search(rf"batch of .*dataloader.* none in process {without}\b", error)


@pytest.mark.slow
def test_each_on_its_own_stream(streams, tmp_path):
    """With sync="local" a process adapts as if it were alone; the averages at the end are over the samples of all."""
    out, output, code = streams
    assert code == 0, output
    assert "was called before the ``update`` method" not in output
    everybody, total = left_by(out, "local"), 0
    for rank, (seen, own) in enumerate(zip(everybody, UNEVEN, strict=True)):
        loaders = [stream(each, i, rank) for i, each in enumerate(own)]
        twin, _ = in_one_process("test", loaders, tmp_path)
        for (_, logits), (_, expected) in zip(seen["outputs"], twin["outputs"], strict=True):
            assert torch.equal(logits, expected)
        assert same_state(seen["adapted"], twin["adapted"])
        total += sum(own[0]) * twin["averages"][0]["entropy"]
    average = torch.as_tensor(total / sum(sum(own[0]) for own in UNEVEN))
    for seen, result in zip(everybody, left_by(out, "local-result"), strict=True):
        close_float32(seen["averages"][0]["entropy"], average)
        assert result[0]["abpem/test/entropy/dataloader_idx_0"] == pytest.approx(average.item(), abs=1e-6)
        assert same_state(seen["restored"], weights_of(Model()))


@pytest.mark.slow
def test_a_process_that_fails_ends_the_program(tmp_path):
    """At its third batch, and before its first."""
    folders = {scenario: tmp_path / scenario for scenario in ("failing", "unreadable")}
    for folder in folders.values():
        folder.mkdir()
    running = {name: start(command("tests.trainer_program", name, folder)) for name, folder in folders.items()}
    for scenario, (output, code) in {name: finish(process) for name, process in running.items()}.items():
        assert code != 0
        other, failed = left_by(folders[scenario], "failing")
        assert "Process 1 stopped with an error" in other["error"], output
        assert "a sample that cannot be read" in failed["error"]
        for seen in (other, failed):
            assert same_state(seen["restored"], weights_of(Model()))


class Unreachable(Ranks):
    """The other processes, as they look to one that fails after they are gone."""

    def __init__(self):
        self.done, self.updates, self._in_step, self.broken = False, 0, False, 0

    def global_batch(self, logits, samples, attention):
        return GlobalBatch(logits, samples, attention)

    def sum(self, gradients, params):
        return gradients

    def _exchange(self, *numbers):
        raise RuntimeError("Connection closed by peer")


def test_a_failure_shows_and_weights_return_also_if_the_others_are_gone(monkeypatch, caplog):
    monkeypatch.setattr(Forward, "find_ranks", lambda forward: setattr(forward, "ranks", Unreachable()))
    model = Model(fails_on=0)
    with pytest.raises(ValueError, match="a sample that cannot be read"):
        trainer(adapting(), devices=1).test(model, listed(stream([2] * 5, 0, 0)), verbose=False)
    assert "could not be told that this one fails: Connection closed by peer" in caplog.text
    assert same_state(weights_of(model), weights_of(Model()))
