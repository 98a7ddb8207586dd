"""Digits seen and heard: scans of handwritten digits (scikit-learn's) paired with synthesised spoken ones.

Training, development and test share no scan and no voice. A pair is a log-mel filterbank (64 frames, 32 bins) and an
image (1, 32, 32), both normalised, and its digit.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_abpem.data.audio_corruptions import corrupt_audio
from lightning_abpem.data.corruptions import Corruption, sample_rng
from lightning_abpem.data.filterbank import filterbank
from lightning_abpem.data.image_corruptions import corrupt_image

__all__ = ["DigitsAV", "DigitsPairs", "Split"]

Array = NDArray[np.float64]
Split = Literal["train", "dev", "test"]

RATE, FRAMES, MEL_BINS, IMAGE_SIZE = 8000, 64, 32, 32
SAMPLES = RATE * 25 // 1000 + (FRAMES - 1) * RATE * 10 // 1000
QUIET = (0.001, 0.02)  # standard deviation of a microphone's own noise, least and most: no recording is silent
AUDIO_MEAN, AUDIO_STD = -3.9, 3.8  # of the training voices' filterbanks
IMAGE_MEAN, IMAGE_STD = 0.31, 0.36  # of the training scans
_FOLDER = Path(__file__).parent / "spoken_digits"
_SHARES = {"train": (0.0, 0.6), "dev": (0.6, 0.72), "test": (0.72, 1.0)}


class DigitsPairs:
    """Pairs of a scan and a spoken clip of the same digit, clean or corrupted.

    Args:
        split: which scans and voices they are drawn from.
        count: how many pairs.
        seed: draws the pairs; together with a pair's number, also the noise of its corruptions.

    Attributes:
        labels: the pairs' digits (count,).
        classes: 10.
    """

    classes = 10

    def __init__(self, split: Split = "test", count: int = 640, seed: int = 0) -> None:
        self._seed = seed
        rng = np.random.default_rng([seed, list(_SHARES).index(split)])
        images, image_digits = _scans(split)
        waves, wave_digits = _clips(split)
        order = np.concatenate([rng.permutation(len(images)) for _ in range(-(-count // len(images)))])[:count]
        self.labels = image_digits[order]
        heard = np.array([rng.choice(np.flatnonzero(wave_digits == digit)) for digit in self.labels])
        self._scans, self._waves = images[order], _place(waves, heard, rng)
        self._made: dict[tuple[str, Corruption | None], Tensor] = {}

    def sample(self, index: int, corruptions: Sequence[Corruption]) -> tuple[Tensor, Tensor]:
        """Return filterbank (64, 32) and image (1, 32, 32) of one pair, each under at most one corruption."""
        faults = {corruption.modality: corruption for corruption in corruptions}
        return self.audio(faults.get("audio"))[index], self.images(faults.get("image"))[index]

    def audio(self, corruption: Corruption | None = None) -> Tensor:
        """Return all filterbanks (count, 64, 32), normalised."""

        def hear(index: int, wave: Array) -> NDArray[np.float32]:
            if corruption is not None:
                rng = sample_rng(self._seed, corruption, str(index))
                wave = corrupt_audio(wave.clip(-1, 1), corruption.kind, corruption.severity, rng, RATE)
            return filterbank(wave, RATE, MEL_BINS, FRAMES)

        if ("audio", corruption) not in self._made:
            made = (np.stack([hear(i, wave) for i, wave in enumerate(self._waves)]) - AUDIO_MEAN) / AUDIO_STD
            self._made["audio", corruption] = torch.from_numpy(made).float()
        return self._made["audio", corruption]

    def images(self, corruption: Corruption | None = None) -> Tensor:
        """Return all images (count, 1, 32, 32), normalised."""

        def see(index: int, scan: Array) -> Array:
            if corruption is None:
                return scan
            rng = sample_rng(self._seed, corruption, str(index))
            return corrupt_image(scan[..., None], corruption.kind, corruption.severity, rng)[..., 0]

        if ("image", corruption) not in self._made:
            made = (np.stack([see(i, scan) for i, scan in enumerate(self._scans)]) - IMAGE_MEAN) / IMAGE_STD
            self._made["image", corruption] = torch.from_numpy(made[:, None]).float()
        return self._made["image", corruption]


class DigitsAV(LightningDataModule):
    """Batches of pairs ((B, 64, 32) filterbanks, (B, 1, 32, 32) images, (B,) digits).

    Args:
        batch_size: pairs per batch.
        corruption: what is wrong with the evaluated pairs' sensors; None for clean ones.
        split: which scans and voices `test_dataloader` and `predict_dataloader` draw from.
        pairs: how many pairs a stream has.
        seed: draws the pairs and the corruption's noise.
    """

    def __init__(
        self,
        batch_size: int = 8,
        corruption: Corruption | None = None,
        split: Split = "test",
        pairs: int = 640,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.corruption, self.split, self.pairs = batch_size, corruption, split, pairs
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        pairs = _dataset(DigitsPairs("train", 6000, self.seed), None)
        return DataLoader(pairs, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[Any]:
        pairs = _dataset(_evaluated(self.split, self.pairs, self.seed), self.corruption)
        return DataLoader(pairs, batch_size=self.batch_size)

    predict_dataloader = test_dataloader


@lru_cache(maxsize=4)  # the same pairs are met by several models, under several corruptions
def _evaluated(split: Split, pairs: int, seed: int) -> DigitsPairs:
    return DigitsPairs(split, pairs, seed)


def _dataset(pairs: DigitsPairs, corruption: Corruption | None) -> TensorDataset:
    faults = {} if corruption is None else {corruption.modality: corruption}
    audio, image = pairs.audio(faults.get("audio")), pairs.images(faults.get("image"))
    return TensorDataset(audio, image, torch.from_numpy(pairs.labels))


@cache
def _scans(split: Split) -> tuple[Array, NDArray[np.int64]]:
    """Return scans (N, 32, 32) in [0, 1] and their digits."""
    bunch = load_digits()
    chosen = np.random.default_rng(0).permutation(len(bunch.target))[_share(split, len(bunch.target))]
    factor = IMAGE_SIZE // bunch.images.shape[1]
    images = ndimage.zoom(bunch.images[chosen] / 16, (1, factor, factor), order=3, mode="nearest", grid_mode=True)
    return np.clip(images, 0, 1), bunch.target[chosen]


@cache
def _clips(split: Split) -> tuple[list[Array], NDArray[np.int64]]:
    """Return waveforms of the split's voices, of any length, and their digits."""
    wave, _ = soundfile.read(_FOLDER / "clips.ogg")
    rows = _rows(split)
    starts = [(int(row["start"]), int(row["length"])) for row in rows]
    return [wave[start : start + length] for start, length in starts], np.array([int(row["digit"]) for row in rows])


def _rows(split: Split) -> list[dict[str, str]]:
    """Return the descriptions of the split's clips."""
    with (_FOLDER / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    voices = np.random.default_rng(0).permutation(sorted({row["voice"] for row in rows}))
    return [row for row in rows if row["voice"] in voices[_share(split, len(voices))]]


def _share(split: Split, count: int) -> slice:
    start, stop = _SHARES[split]
    return slice(round(start * count), round(stop * count))


def _place(waves: list[Array], chosen: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """Return the chosen clips (B, SAMPLES), each at a random place in faint noise; longer ones are cut."""
    level = np.exp(rng.uniform(np.log(QUIET[0]), np.log(QUIET[1]), (len(chosen), 1)))
    placed = level * rng.standard_normal((len(chosen), SAMPLES))
    for row, index in zip(placed, chosen, strict=True):
        wave = waves[index][:SAMPLES]
        start = rng.integers(SAMPLES - len(wave) + 1)
        row[start : start + len(wave)] += wave
    return placed
