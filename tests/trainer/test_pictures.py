"""Pictures of a run in TensorBoard, read back from its file."""

import io
import logging

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_abpem.methods import Tent
from lightning_abpem.trainer.pictures import attention_picture
from tests.toy import CLASSES, MODALITIES, loader, make_toy
from tests.trainer.test_callback import trainer
from tests.trainer.test_reporting import adapting, record_of

pytestmark = pytest.mark.usefixtures("undrawn")


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    return events


@pytest.fixture
def logged(tmp_path):
    """A run of four batches with two loggers: its model, TensorBoard's events and the report's record."""
    model, loggers = make_toy(), [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "csv")]
    callback = adapting(tmp_path / "report.html", predicts="before")  # so that the passes counted predict
    trainer(callback, logger=loggers).test(model, loader(4), verbose=False)
    return model, read(loggers[0].log_dir), record_of(tmp_path / "report.html")


def test_histograms_count_the_predicted_classes(logged):
    model, events, _ = logged
    steps = events.Histograms("abpem/test/predicted_class")
    assert [step.step for step in steps] == [0, 1, 2, 3]
    for step, logits in zip(steps, model.seen, strict=True):
        expected = np.bincount(logits.argmax(1), minlength=CLASSES)
        value = step.histogram_value
        found = dict.fromkeys(range(CLASSES), 0.0)
        for limit, count in zip(value.bucket_limit, value.bucket, strict=True):
            if count:
                found[round(limit - 0.5)] = count
        assert list(found.values()) == expected.tolist()
        assert value.num == len(logits)


def test_images_show_the_attention_before_and_after(logged):
    _, events, record = logged
    pairs = {f"abpem/test/attention/{p['query']}_to_{p['key']}": p for p in record["blocks"]["pairs"]}
    assert len(pairs) == len(MODALITIES) ** 2
    assert set(events.Tags()["images"]) == set(pairs)
    for name, pair in pairs.items():
        [image] = events.Images(name)
        assert_shows(Image.open(io.BytesIO(image.encoded_image_string)), pair)


def assert_shows(image, pair):
    """The picture has a pair's scores before and after, a row of both for each sample, on one scale."""
    pixels = np.asarray(image.convert("L"))[4::8, 4::8] / 255
    before, after = np.array(pair["before"]), np.array(pair["after"])
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    samples, rows, columns = before.shape
    assert pixels.shape == (samples * (rows + 1), 2 * (columns + 1))
    for sample in range(samples):
        own = pixels[sample * (rows + 1) :][:rows]
        for scores, left in ((before, 0), (after, columns + 1)):
            expected = (scores[sample] - low) / (high - low)
            np.testing.assert_allclose(own[:, left : left + columns], expected, atol=1 / 200)


def test_a_score_that_a_mask_hides_is_black():
    picture = attention_picture({"before": [[[None, 1.0]]], "after": [[[3.0, 2.0]]]})[4::8, 4::8]
    torch.testing.assert_close(picture, torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.5, 0.0], [0.0] * 6]))


def test_without_a_report_there_are_none(tmp_path):
    logger = TensorBoardLogger(tmp_path, "board")
    trainer(Tent(), logger=logger).test(make_toy(), loader(2), verbose=False)
    tags = read(logger.log_dir).Tags()
    assert tags["scalars"]
    assert not tags["histograms"]
    assert not tags["images"]


def test_a_logger_that_refuses_a_picture_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    logger = TensorBoardLogger(tmp_path, "board")

    def refuse(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(logger.experiment, "add_histogram", refuse)
    with caplog.at_level(logging.WARNING):
        callback = adapting(tmp_path / "report.html")
        trainer(callback, logger=logger).test(make_toy(), loader(2), verbose=False)
    assert callback.updates == 2
    assert "TensorBoardLogger did not take the pictures of the run: OSError('disk full')" in caplog.text
