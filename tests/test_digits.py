"""The demo's data: splits that share nothing, pairs that match, streams that follow their seed."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_abpem.data import digits
from lightning_abpem.data.digits import Corruption, DigitsAV

FOLDER = Path(digits.__file__).parent / "spoken_digits"


def tensors(**options):
    return DigitsAV(**({"pairs": 60} | options)).test_dataloader().dataset.tensors


def test_the_clips_are_small_and_many():
    with (FOLDER / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    per_digit = Counter(row["digit"] for row in rows)
    assert set(per_digit) == set("0123456789")
    settings = {(r["voice"], r["accent"], r["speed"], r["pitch"]) for r in rows}
    assert len(settings) >= 60
    assert set(per_digit.values()) == {len(settings)}
    assert sum(path.stat().st_size for path in FOLDER.glob("clips.*")) < 3_000_000


def test_splits_share_no_scan_and_no_voice():
    scans = {split: {image.tobytes() for image in digits._scans(split)[0]} for split in ("train", "dev", "test")}
    assert not scans["train"] & scans["test"]
    assert not scans["train"] & scans["dev"]
    assert not scans["dev"] & scans["test"]
    voices = {split: {row["voice"] for row in digits._rows(split)} for split in ("train", "dev", "test")}
    assert not voices["train"] & voices["test"]
    assert not voices["train"] & voices["dev"]
    assert not voices["dev"] & voices["test"]
    assert sum(map(len, voices.values())) == 44


def test_shapes_and_normalisation():
    audio, image, digit = DigitsAV().train_dataloader().dataset.tensors
    assert audio.shape[1:] == (64, 32)
    assert image.shape[1:] == (1, 32, 32)
    assert audio.dtype == image.dtype == torch.float32
    assert digit.dtype == torch.int64
    for x in (audio, image):
        assert abs(x.mean()) < 0.1
        assert abs(x.std() - 1) < 0.1
    assert digit.unique().tolist() == list(range(10))


def test_streams_follow_their_seed():
    first, again, other = tensors(seed=1), tensors(seed=1), tensors(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(("modality", "touched"), [("image", 1), ("audio", 0)])
def test_a_corruption_touches_its_modality_alone(modality, touched):
    clean, corrupted = tensors(), tensors(corruption=Corruption(modality, "gaussian_noise", 5))
    assert not torch.equal(clean[touched], corrupted[touched])
    assert torch.equal(clean[1 - touched], corrupted[1 - touched])
    assert torch.equal(clean[2], corrupted[2])


def test_labels_can_be_sorted():
    assert torch.equal(tensors(sorted_by_label=True)[2], tensors()[2].sort().values)


def test_filterbanks_against_a_plain_implementation():
    """Kaldi's filterbank from its definition: pre-emphasis, Hanning window, power spectrum, triangular mel filters."""
    wave = np.random.default_rng(0).standard_normal(digits.SAMPLES) * 0.1
    wave -= wave.mean()
    frames = np.stack([wave[start : start + 200] for start in range(0, digits.SAMPLES - 199, 80)])
    frames = frames - frames.mean(1, keepdims=True)
    emphasised = frames - 0.97 * np.concatenate((frames[:, :1], frames[:, :-1]), axis=1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 199)
    power = np.abs(np.fft.rfft(emphasised * window, 256)) ** 2

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(4000), digits.MEL_BINS + 2)
    bins = mel(np.arange(129) * 8000 / 256)
    rising = (bins[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None]) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.clip(np.minimum(rising, falling), 0, None)
    filters[:, 128] = 0
    expected = np.log(power @ filters.T)
    np.testing.assert_allclose(digits._filterbank(wave), expected, atol=2e-3)
