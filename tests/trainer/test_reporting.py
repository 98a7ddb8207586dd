"""The report of a run: what it holds is the run's, and the run is what it would be without."""

import json
import re
import sys
from typing import Any

import pytest
import torch

from lightning_abpem import ABPEM
from lightning_abpem.methods import Tent
from lightning_abpem.report.record import read_record
from tests.engine.attached import fingerprint
from tests.toy import AUDIO, CLASSES, HEADS, MODALITIES, Toy, batches, heads_first, listed, loader, make_toy
from tests.trainer.test_callback import trainer
from tests.trainer.test_several_processes import left_by, run
from tests.trainer_program import UNEVEN

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def page(tmp_path):
    return tmp_path / "report.html"


def adapting(page, **options):
    return ABPEM("fusion.*.attn", MODALITIES, learning_rate=1e-2, report=page, **options)


def record_of(page):
    assert "<svg" in page.read_text() or record_has_no_step(page)
    return read_record(page.with_suffix(".json"))


def record_has_no_step(page):
    return not json.loads(page.with_suffix(".json").read_text())["steps"]["first"]


def naive_scores(model, batch):
    """Head-averaged scores of the fusion, (B, 10, 10), written out."""
    x = model.fusion[0].norm(torch.cat((model.audio(batch[0]), model.video(batch[1])), 1))
    q, k, _ = (heads_first(part) for part in model.fusion[0].attn.qkv(x).chunk(3, -1))
    return (q @ k.mT / (q.shape[-1] ** 0.5)).sum(1).div(HEADS).detach()


def joined_blocks(record, when, sample):
    """The four blocks of a sample as one matrix."""
    blocks = {(p["query"], p["key"]): torch.tensor(p[when][sample]) for p in record["blocks"]["pairs"]}
    return torch.cat([torch.cat([blocks[m, n] for n in MODALITIES], 1) for m in MODALITIES])


def test_a_run_with_a_report_is_the_run_without(page):
    plain, reported = make_toy(), make_toy()
    loaders = [loader(), loader(3, seed=2)]
    results = [
        trainer(adapting(own, monitor="source")).test(model, loaders, verbose=False)
        for model, own in ((plain, None), (reported, page))
    ]
    assert len(plain.seen) == len(reported.seen) == 7
    assert all(map(torch.equal, plain.seen, reported.seen))
    assert results[0] == results[1]
    assert all(map(torch.equal, make_toy().state_dict().values(), reported.state_dict().values()))
    assert fingerprint(reported) == fingerprint(plain) | {"parameters": [id(p) for p in reported.parameters()]}


def test_it_holds_the_figures_of_the_run(page):
    model, callback = make_toy(), adapting(page, monitor="source")
    trainer(callback).test(model, [loader(), loader(3, seed=2)], verbose=False)
    record = record_of(page)
    assert record["run"]["status"] == "finished"
    assert record["counts"] == {"steps": 7, "resets": 0, "updates": 7, "skipped": 0, "left_out": 0}
    assert record["steps"]["samples"] == [4] * 7
    for own in record["dataloaders"]:
        expected = {name: value.item() for name, value in callback.averages[own["index"]].items()}
        del expected["attention_gap"]  # the mean over the pairs
        assert own["figures"] == pytest.approx(expected, rel=1e-5)
    assert [own["samples"] for own in record["dataloaders"]] == [16, 12]
    assert set(record["metrics"]) == {"hits/dataloader_idx_0", "hits/dataloader_idx_1"}
    assert sum(map(sum, record["classes"]["counts"])) == 28
    assert len(record["classes"]["names"]) <= CLASSES
    assert 0 < record["seconds"]["adapting"] < record["seconds"]["total"]
    assert record["options"]["learning_rate"] == "0.01"
    assert record["versions"]["torch"] == torch.__version__
    assert page.read_text().count("dataloader 1") == 1


def test_attention_is_that_of_the_source_and_of_the_adapted_weights(page):
    model, callback = make_toy(), adapting(page)
    stream = batches()
    before = naive_scores(model, stream[0])
    with callback.attach(model):
        for batch in stream:
            model(*batch)
        after = naive_scores(model, stream[0])
    assert not torch.allclose(before, after, atol=1e-3)
    record = record_of(page)
    for sample in range(3):
        torch.testing.assert_close(joined_blocks(record, "before", sample), before[sample], rtol=0, atol=1e-4)
        torch.testing.assert_close(joined_blocks(record, "after", sample), after[sample], rtol=0, atol=1e-4)
    assert [p["queries"] for p in record["blocks"]["pairs"] if p["query"] == "audio"] == [AUDIO, AUDIO]
    torch.testing.assert_close(naive_scores(model, stream[0]), before, rtol=0, atol=0)


class Editing(Toy):
    """Edits its input in place, in every call."""

    def forward(self, audio, video):
        audio.mul_(0.5)
        return super().forward(audio, video)


def test_the_first_batch_is_kept_as_it_came(page):
    torch.manual_seed(0)
    model = Editing().eval()
    stream = batches(3)
    before = naive_scores(model, (stream[0][0] * 0.5, stream[0][1]))
    with adapting(page).attach(model):
        for batch in stream:
            model(*batch)
    torch.testing.assert_close(joined_blocks(record_of(page), "before", 0), before[0], rtol=0, atol=1e-4)


def test_predict_has_one_too(page):
    outputs = trainer(adapting(page)).predict(make_toy(), loader())
    record = record_of(page)
    assert len(outputs) == 4
    assert record["run"]["stage"] == "predict"
    assert record["metrics"] == {}
    assert record["blocks"] is not None
    assert "log a metric" not in page.read_text()


def test_a_method_without_attention(page):
    model = make_toy()
    trainer(Tent(report=page)).test(model, loader(), verbose=False)
    assert record_of(page)["blocks"] is None
    words = page.read_text()
    assert "Attention before" not in words
    assert "Attention gap and divergence: methods that watch" in words
    assert "monitor=&quot;source&quot;" in words


def test_steps_that_are_skipped_and_resets_are_marked(page):
    stream = [(*own, torch.zeros(4, dtype=torch.long)) for own in batches(6)]
    stream[2] = (torch.full_like(stream[2][0], torch.nan), *stream[2][1:])
    callback = adapting(page, reset=3)
    trainer(callback).test(make_toy(), listed(stream), verbose=False)
    record = record_of(page)
    assert record["counts"]["skipped"] == callback.skipped == 1
    assert record["steps"]["figures"]["updated"] == [1, 1, 0, 1, 1, 1]
    assert record["resets"] == [4]
    words = page.read_text()
    assert "step skipped" in words
    assert "the source model came back" in words


def test_samples_that_were_left_out_are_counted(page):
    stream: Any = [(*own, torch.zeros(4, dtype=torch.long)) for own in batches(3)]
    stream[1][0][:2] = torch.nan
    callback = adapting(page)
    trainer(callback).test(make_toy(), torch.utils.data.DataLoader(stream, batch_size=None), verbose=False)
    assert record_of(page)["counts"]["left_out"] == callback.left_out == 2
    assert re.search(r">2<[^>]*>(<[^>]*>)*samples left out of steps<", page.read_text())


def test_what_the_guard_does_is_listed(page, monkeypatch):
    monkeypatch.setattr("lightning_abpem.engine.guard.LIMIT", -1.0)  # so that everything is harm
    loud = adapting(page, monitor="source", guard="reset")
    trainer(loud).test(make_toy(), loader(10), verbose=False)
    record = record_of(page)
    assert len(record["events"]) == len(loud.events) > 0
    assert [event["cause"] for event in record["events"]] == [event.cause for event in loud.events]
    assert "the guard acted" in page.read_text()


class Failing(Toy):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().test_step(batch, batch_idx)
        if batch_idx == 2:
            raise KeyError("a <b>sample</b>")


def test_a_run_that_fails_leaves_what_it_has(page):
    torch.manual_seed(0)
    model = Failing().eval()
    with pytest.raises(KeyError, match="sample"):
        trainer(adapting(page)).test(model, loader(), verbose=False)
    record = record_of(page)
    assert record["run"]["status"] == "failed"
    assert record["counts"]["updates"] == 3
    assert len(record["steps"]["first"]) == 3
    assert "KeyError: &#x27;a &lt;b&gt;sample&lt;/b&gt;&#x27;" in page.read_text()


def test_an_epoch_end_that_fails_is_told(page):
    class Late(Toy):
        def on_test_epoch_end(self):
            raise ValueError("too late")

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="too late"):
        trainer(adapting(page)).test(Late().eval(), loader(), verbose=False)
    assert record_of(page)["run"]["error"] == "ValueError: too late"
    assert record_of(page)["counts"]["updates"] == 4


def test_a_block_of_attach_that_fails(page):
    model = make_toy()
    with pytest.raises(KeyError), adapting(page).attach(model):
        model(*batches(1)[0])
        raise KeyError("mine")
    assert record_of(page)["run"]["status"] == "failed"
    assert record_of(page)["counts"]["steps"] == 1


def test_a_folder_that_is_missing_is_found_before_the_run(tmp_path):
    model = make_toy()
    callback = adapting(tmp_path / "none" / "report.html")
    with pytest.raises(ValueError, match="there is no '.*none'"):
        trainer(callback).test(model, loader(), verbose=False)
    with pytest.raises(ValueError, match="there is no '.*none'"), callback.attach(model):
        pass
    assert model.seen == []
    (tmp_path / "none").mkdir()
    trainer(callback).test(model, loader(), verbose=False)
    assert (tmp_path / "none" / "report.html").is_file()


def test_a_file_that_cannot_be_written_in_the_end_loses_nothing(page, caplog):
    class Blocking(Toy):
        def on_test_epoch_end(self):
            page.with_suffix(".json").mkdir()

    torch.manual_seed(0)
    callback = adapting(page)
    result = trainer(callback).test(Blocking().eval(), loader(), verbose=False)
    assert result[0]["abpem/test/updated"] == 1
    assert callback.updates == 4
    assert "is not written" in caplog.text
    assert not list(page.parent.glob(".*"))


@pytest.mark.parametrize("value", ["report.pdf", 3, "", True])
def test_no_name_of_a_page_is_refused(value):
    with pytest.raises(ValueError, match=r"Expected `report` to be None or the name of an .html file"):
        adapting(value)


def test_matplotlib_is_asked_for_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_abpem\[report\]'"):
        adapting("report.html")
    adapting(None)


def test_each_run_writes_it_anew(page):
    callback = adapting(page)
    runner, model = trainer(callback), make_toy()
    runner.test(model, loader(3), verbose=False)
    assert record_of(page)["counts"]["steps"] == 3
    runner.predict(model, loader(2), return_predictions=False)
    assert record_of(page)["run"]["stage"] == "predict"
    assert record_of(page)["counts"]["steps"] == 2


@pytest.mark.slow
def test_the_first_of_two_processes_writes_the_figures_of_all(tmp_path):
    run("reported", tmp_path)
    record, local = read_record(tmp_path / "report.json"), read_record(tmp_path / "local.json")
    sizes = [[sum(own[i]) for own in UNEVEN] for i in range(2)]
    assert (record["run"]["processes"], record["run"]["sync"]) == (2, "global")
    assert [own["samples"] for own in record["dataloaders"]] == [sum(own) for own in sizes]
    assert sum(map(sum, record["classes"]["counts"])) == sum(map(sum, sizes))
    seen = left_by(tmp_path, "reported")[0]["averages"]
    for own in record["dataloaders"]:
        expected = {name: value.item() for name, value in seen[own["index"]].items()}
        del expected["attention_gap"]  # the mean over the pairs
        assert own["figures"] == pytest.approx(expected, rel=1e-5)
    assert len(record["resets"]) == 1
    assert "accuracy/dataloader_idx_1" in record["metrics"]
    assert record["blocks"] is not None
    assert [own["samples"] for own in local["dataloaders"]] == [own[0] for own in sizes_by_rank(0)]
    assert "first process&#x27;s own stream" in (tmp_path / "local.html").read_text()
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["local.html", "report.html"]


def sizes_by_rank(rank):
    return [(sum(own),) for own in UNEVEN[rank]]


@pytest.mark.slow
def test_two_processes_stop_together_where_a_report_cannot_be_written(tmp_path):
    run("unreported", tmp_path)
    for words in (torch.load(tmp_path / f"unreported-{rank}.pt") for rank in range(2)):
        assert "Expected the folder of the report to exist" in words


def test_candidates_of_tune_write_none(page):
    adapting(page).tune(
        make_toy(), batches(2), rates=(1e-3, 1e-2), batches=2, forward=lambda model, batch: model(*batch)
    )
    assert not list(page.parent.iterdir())


def test_batches_that_could_not_be_adapted_are_listed_by_reason(page):
    stream = [(*own, torch.zeros(4, dtype=torch.long)) for own in batches(4)]
    stream[2] = (torch.full_like(stream[2][0], torch.nan), *stream[2][1:])
    callback = adapting(page)
    trainer(callback).test(make_toy(), listed(stream), verbose=False)
    assert record_of(page)["skipped"] == callback.skipped_for != {}
