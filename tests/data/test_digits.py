"""The demo's data: splits that share nothing, pairs that match, streams that follow their seed."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_abpem.data import digits
from lightning_abpem.data.audio_corruptions import AUDIO_KINDS
from lightning_abpem.data.corruptions import Corruption, Sensor
from lightning_abpem.data.digits import DigitsAV, DigitsPairs
from lightning_abpem.data.image_corruptions import IMAGE_KINDS

FOLDER = Path(digits.__file__).parent / "spoken_digits"


def tensors(**options):
    data: Any = DigitsAV(**({"pairs": 60} | options)).test_dataloader().dataset
    return data.tensors


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
    data: Any = DigitsAV().train_dataloader().dataset
    audio, image, digit = data.tensors
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


def test_a_pair_is_corrupted_alike_alone_and_with_all_others():
    fog, wind = Corruption("image", "fog", 4), Corruption("audio", "wind", 2)
    few, many = DigitsPairs(count=5), DigitsPairs(count=5)
    whole = many.audio(wind), many.images(fog)
    for index in (4, 0):
        for part, all_of_them in zip(few.sample(index, [fog, wind]), whole, strict=True):
            assert torch.equal(part, all_of_them[index])
    assert torch.equal(few.sample(1, [])[1], DigitsPairs(count=5).images()[1])


def test_every_kind_leaves_finite_inputs():
    pairs = DigitsPairs(count=2)
    every: dict[Sensor, tuple[str, ...]] = {"image": IMAGE_KINDS, "audio": AUDIO_KINDS}
    for modality, kinds in every.items():
        for kind in kinds:
            clean, corrupted = pairs.sample(0, []), pairs.sample(0, [Corruption(modality, kind, 5)])
            position = ("audio", "image").index(modality)
            assert corrupted[position].isfinite().all()
            assert not torch.equal(corrupted[position], clean[position])
