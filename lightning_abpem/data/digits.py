"""Digits seen and heard: scans of handwritten digits (scikit-learn's) paired with synthesised spoken ones.

Training, development and test share no scan and no voice. A pair is a log-mel filterbank (64 frames, 32 bins) and an
image (1, 32, 32), both normalised, and its digit.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import kaldi_native_fbank as knf
import numpy as np
import soundfile
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_abpem.data.corruptions import corrupt_audio, corrupt_images

__all__ = ["Corruption", "DigitsAV", "Split"]

Array = NDArray[np.float64]
Split = Literal["train", "dev", "test"]

RATE, FRAMES, MEL_BINS, IMAGE_SIZE = 8000, 64, 32, 32
SAMPLES = RATE * 25 // 1000 + (FRAMES - 1) * RATE * 10 // 1000
QUIET = (0.001, 0.02)  # standard deviation of a microphone's own noise, least and most: no recording is silent
AUDIO_MEAN, AUDIO_STD = -3.9, 3.8  # of the training voices' filterbanks
IMAGE_MEAN, IMAGE_STD = 0.31, 0.36  # of the training scans
_FOLDER = Path(__file__).parent / "spoken_digits"
_SHARES = {"train": (0.0, 0.6), "dev": (0.6, 0.72), "test": (0.72, 1.0)}


@dataclass(frozen=True)
class Corruption:
    """One sensor fault: which modality it hits ("audio" or "image"), its kind and its severity, 1 to 5."""

    modality: Literal["audio", "image"]
    kind: str
    severity: int


class DigitsAV(LightningDataModule):
    """Pairs of the two modalities, drawn with a seed.

    Args:
        batch_size: pairs per batch.
        corruption: what is wrong with the evaluated pairs' sensors; None for clean ones.
        split: which scans and voices `test_dataloader` and `predict_dataloader` draw from.
        pairs: how many pairs a stream has.
        seed: draws the pairs and the corruption's noise.
        sorted_by_label: all zeros first, then all ones, ...: a stream whose labels are not shuffled.
    """

    def __init__(
        self,
        batch_size: int = 8,
        corruption: Corruption | None = None,
        split: Split = "test",
        pairs: int = 640,
        seed: int = 0,
        sorted_by_label: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size, self.corruption, self.split, self.pairs = batch_size, corruption, split, pairs
        self.seed, self.sorted_by_label = seed, sorted_by_label

    def train_dataloader(self) -> DataLoader[Any]:
        pairs = _dataset("train", 6000, self.seed, corruption=None, sorted_by_label=False)
        return DataLoader(pairs, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[Any]:
        pairs = _dataset(self.split, self.pairs, self.seed, self.corruption, self.sorted_by_label)
        return DataLoader(pairs, batch_size=self.batch_size)

    predict_dataloader = test_dataloader


@lru_cache(maxsize=1)  # source and adapted model are tested on the same stream, one after the other
def _dataset(
    split: Split, count: int, seed: int, corruption: Corruption | None, sorted_by_label: bool
) -> TensorDataset:
    rng = np.random.default_rng([seed, list(_SHARES).index(split)])
    images, image_digits = _scans(split)
    waves, wave_digits = _clips(split)
    order = np.concatenate([rng.permutation(len(images)) for _ in range(-(-count // len(images)))])[:count]
    digits = image_digits[order]
    if sorted_by_label:
        order = order[np.argsort(digits, kind="stable")]
        digits = image_digits[order]
    heard = np.array([rng.choice(np.flatnonzero(wave_digits == digit)) for digit in digits])
    x, w = images[order], _place(waves, heard, rng)
    if corruption is not None and corruption.modality == "image":
        x = corrupt_images(x, corruption.kind, corruption.severity, seed)
    elif corruption is not None:
        w = corrupt_audio(w, corruption.kind, corruption.severity, seed, RATE, _crowd_speech())
    audio = (np.stack([_filterbank(wave) for wave in w]) - AUDIO_MEAN) / AUDIO_STD
    image = (x[:, None] - IMAGE_MEAN) / IMAGE_STD
    return TensorDataset(*(torch.from_numpy(a).float() for a in (audio, image)), torch.from_numpy(digits))


@cache
def _scans(split: Split) -> tuple[Array, NDArray[np.int64]]:
    """Scans (N, 32, 32) in [0, 1] and their digits."""
    bunch = load_digits()
    chosen = np.random.default_rng(0).permutation(len(bunch.target))[_share(split, len(bunch.target))]
    factor = IMAGE_SIZE // bunch.images.shape[1]
    images = ndimage.zoom(bunch.images[chosen] / 16, (1, factor, factor), order=3, mode="nearest", grid_mode=True)
    return np.clip(images, 0, 1), bunch.target[chosen]


@cache
def _clips(split: Split) -> tuple[list[Array], NDArray[np.int64]]:
    """Waveforms of the split's voices, of any length, and their digits."""
    wave, _ = soundfile.read(_FOLDER / "clips.ogg")
    rows = _rows(split)
    starts = [(int(row["start"]), int(row["length"])) for row in rows]
    return [wave[start : start + length] for start, length in starts], np.array([int(row["digit"]) for row in rows])


@cache
def _crowd_speech() -> Array:
    """What a crowd speaks: the training voices (N, SAMPLES)."""
    waves, _ = _clips("train")
    return _place(waves, np.arange(len(waves)), np.random.default_rng(0))


def _rows(split: Split) -> list[dict[str, str]]:
    """The descriptions of the split's clips."""
    with (_FOLDER / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    voices = np.random.default_rng(0).permutation(sorted({row["voice"] for row in rows}))
    return [row for row in rows if row["voice"] in voices[_share(split, len(voices))]]


def _share(split: Split, count: int) -> slice:
    start, stop = _SHARES[split]
    return slice(round(start * count), round(stop * count))


def _place(waves: list[Array], chosen: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """The chosen clips (B, SAMPLES), each at a random place in a quiet room, or cut if it is longer."""
    level = np.exp(rng.uniform(np.log(QUIET[0]), np.log(QUIET[1]), (len(chosen), 1)))
    placed = level * rng.standard_normal((len(chosen), SAMPLES))
    for row, index in zip(placed, chosen, strict=True):
        wave = waves[index][:SAMPLES]
        start = rng.integers(SAMPLES - len(wave) + 1)
        row[start : start + len(wave)] += wave
    return placed


def _filterbank(wave: Array) -> NDArray[np.float32]:
    """Log-mel energies (FRAMES, MEL_BINS) of one clip."""
    fbank = knf.OnlineFbank(_filterbank_options())
    fbank.accept_waveform(RATE, (wave - wave.mean()).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(i) for i in range(FRAMES)])


@cache
def _filterbank_options() -> knf.FbankOptions:
    """Kaldi's rules: 25 ms Hanning windows every 10 ms, no dither."""
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = MEL_BINS
    options.htk_compat, options.use_energy = True, False
    return options
