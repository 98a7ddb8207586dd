"""A stream that is cut and goes on elsewhere predicts, to the last bit, what it would have uncut."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_abpem import ABPEM
from tests.engine.resumed import ADAM, CUT, LENGTH, METHODS, made, predict
from tests.ranks import in_two_processes
from tests.reference import same_state
from tests.toy import MODALITIES, Toy, batches, listed, loader, make_toy
from tests.trainer.test_callback import trainer


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


@pytest.mark.parametrize("cuts", [(2,), (5, 6), (3, 7, 11)])
def test_the_same_batches_are_compared_with_the_source(cuts):
    """Every fourth of the stream, and not of each part of it."""
    stream, compared, state = batches(16), [], None
    for first, last in zip((0, *cuts), (*cuts, 16), strict=True):
        part = ABPEM("fusion.*.attn", MODALITIES, monitor=4)
        if state is not None:
            part.load_state_dict(state)
        with torch.no_grad(), part.attach(model := make_toy()) as adaptation:
            for i in range(first, last):
                model(*stream[i])
                compared += [i] * ("flip_rate" in adaptation.record)
        state = part.state_dict()
    assert compared == [3, 7, 11, 15]


@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.SGD, momentum=0.9)])
def test_a_stream_goes_on_at_the_rate_of_the_callback_that_loads(optimizer):
    """So it does after a reset too, and with several rates the figure says the one that steps."""

    def steps(rate, state=None, reset=None):
        own = ABPEM("fusion.*.attn", MODALITIES, optimizer=optimizer, learning_rate=rate)
        if state is not None:
            own.load_state_dict(state)
        with torch.no_grad(), own.attach(model := make_toy()) as adaptation:
            model(*batches(2)[0])
            before = [p.detach().clone() for p in adaptation.params.values()]
            model(*batches(2)[1])
            moved = [(p - own).norm() for p, own in zip(adaptation.params.values(), before, strict=True)]
            return own.state_dict(), torch.stack(moved).norm().item(), adaptation.record

    state, fast, _ = steps(1e-3)
    _, slow, _ = steps(1e-5, state)
    assert slow < fast / 20
    assert state["weights"]["optimizer"]["param_groups"][0]["lr"] == 1e-3
    several, *_ = steps([1e-5, 1e-3])
    _, moved, record = steps([1e-7, 1e-6], several)
    assert record["learning_rate"].item() == pytest.approx(1e-7)
    assert moved < fast / 200


@pytest.mark.parametrize("memory", [1, 4])
def test_a_bad_batch_right_after_the_cut_is_predicted(memory):
    def part(state=None):
        own = ABPEM("fusion.*.attn", MODALITIES, memory_batches=memory)
        if state is not None:
            own.load_state_dict(state)
        return own

    stream = batches(3)
    audio, video = stream[2]
    first = part()
    predict(first, make_toy(), stream[:2])
    second = part(first.state_dict())
    predict(second, make_toy(), [(audio[:, :5], video), stream[2]])
    assert second.skipped_for == {"does not fit": 1}
    assert second.updates == 3


def test_batches_with_gaps_in_memory():
    """Every other row is a sample: the first batch after the cut is rounded as in the middle of a stream."""
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

    class Breaks(Toy):
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


class Trained(Toy):
    def training_step(self, batch, batch_idx):
        return self(*batch[:2]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


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
    assert taken.state is not None
    second.load_state_dict(taken.state)
    trainer(second).test(again, loader(3, seed=5), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(model.seen[2:], again.seen, strict=True))


def test_a_loaded_state_is_not_reset_by_a_dataloader_without_batches():
    options: dict[str, Any] = {"optimizer": ADAM, "reset": "dataloader"}
    first = ABPEM("fusion.*.attn", MODALITIES, **options)
    trainer(first).test(make_toy(), loader(2), verbose=False)
    seen = []
    for loaders in ([loader(2, seed=5)], [listed([], batch_size=4), loader(2, seed=5)]):
        second, model = ABPEM("fusion.*.attn", MODALITIES, **options), make_toy()
        second.load_state_dict(first.state_dict())
        trainer(second).test(model, loaders, verbose=False)
        seen.append(torch.cat(model.seen))
    assert torch.equal(*seen)


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
