"""Audio corruptions at severities 1 to 5, of one waveform in [-1, 1]: the six of Kinetics50-C and VGGSound-C.

White noise is given by its standard deviation, the other noises by their gain. With the user's recordings they are as
published: the recording is made 1 to 8 dB louder. Without, the noise is procedural, 1 to 8 dB above the waveform's own
level, and accuracies are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy import signal

from lightning_abpem.data.noises import NOISE_KINDS, procedural

__all__ = ["AUDIO_KINDS", "Recordings", "corrupt_audio"]

AUDIO_KINDS = ("gaussian_noise", *NOISE_KINDS)

_WHITE_SD = (0.08, 0.12, 0.18, 0.26, 0.38)
_GAIN_DB = (1, 2, 4, 6, 8)
_SILENCE = 0.01  # the level, of full scale, that stands for a silent waveform's
_SUFFIXES = (".wav", ".flac", ".ogg")


class Recordings:
    """Noise recordings in a folder: ``{kind}.wav``, or ``.flac``, or ``.ogg``, of any sampling rate and channels.

    The noise is brought to the data's rate, and its channels are averaged. (The published noises are stereo at 48 kHz,
    the data mono at 16 kHz.) Of several files of a kind the first suffix above is taken.

    Args:
        folder: where the recordings are. A kind may be missing as long as it is not asked for.

    Raises:
        NotADirectoryError: `folder` is no folder.
        FileNotFoundError: it has a recording of no kind.
        ValueError: a recording cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(f"Expected `folder` to be a folder of noise recordings, but got {str(folder)!r}.")
        found = {kind: self._find(kind) for kind in NOISE_KINDS}
        self.files = {kind: file for kind, file in found.items() if file is not None}
        if not self.files:
            wanted = ", ".join(f"{kind}.wav" for kind in NOISE_KINDS)
            raise FileNotFoundError(f"Expected recordings in {self.folder} ({wanted}; or .flac, .ogg), but got none.")
        for file in self.files.values():
            _read(file, frames=1)
        self._cache: dict[tuple[str, int], NDArray[np.float64]] = {}

    def __call__(self, kind: str, rate: int) -> NDArray[np.float64]:
        """Return the recording of a kind at `rate` Hz, mono: (T,), read-only.

        Raises:
            FileNotFoundError: the folder has no recording of this kind.
            ValueError: the recording is broken, or `rate` is not a positive integer.
        """
        _check_rate(rate)
        self.check([kind])
        if (kind, rate) not in self._cache:
            wave, own_rate = _read(self.files[kind])
            common = gcd(own_rate, rate)
            noise = signal.resample_poly(wave, rate // common, own_rate // common)
            noise.setflags(write=False)
            self._cache[kind, rate] = noise
        return self._cache[kind, rate]

    def check(self, kinds: Iterable[str]) -> None:
        """Raise unless there is a recording of each of these kinds; Gaussian noise needs none.

        Raises:
            FileNotFoundError: naming those that are missing.
        """
        missing = [kind for kind in dict.fromkeys(kinds) if kind not in {"gaussian_noise", *self.files}]
        if missing:
            raise FileNotFoundError(
                f"Expected {self.folder} to have {', '.join(f'{kind}.wav' for kind in missing)} (or .flac, .ogg), but "
                f"it has only {', '.join(file.name for file in self.files.values())}."
            )

    def _find(self, kind: str) -> Path | None:
        files = (self.folder / f"{kind}{suffix}" for suffix in _SUFFIXES)
        return next((file for file in files if file.is_file()), None)


def corrupt_audio(
    wave: NDArray[np.floating],
    kind: str,
    severity: int,
    rng: np.random.Generator,
    rate: int,
    recordings: Recordings | None = None,
) -> NDArray[np.float64]:
    """Corrupt one waveform (T,) in [-1, 1]; the result has its shape, clipped to [-1, 1].

    Args:
        wave: samples, mono.
        kind: one of `AUDIO_KINDS`.
        severity: 1 to 5.
        rng: draws white and procedural noise; a recording is not random, it is taken from its start and repeated.
        rate: of the wave, in Hz.
        recordings: of the kinds other than white noise; None for procedural noises. Those are 1 to 8 dB louder than the
            wave (RMS over all of it). If it is silent, 0.01 of full scale stands for it.

    Raises:
        ValueError: an unknown kind, a severity outside 1 to 5, a rate that is not a positive integer, or a wave that
            has another shape, no samples, or values that are not finite or outside [-1, 1].
        FileNotFoundError: `recordings` have none of this kind.
    """
    samples = np.asarray(wave, np.float64)
    _check(samples, kind, severity, rate)
    if kind == "gaussian_noise":
        noise = _WHITE_SD[severity - 1] * rng.standard_normal(len(samples))
    else:
        noise = 10 ** (_GAIN_DB[severity - 1] / 20) * _unamplified(samples, kind, rng, rate, recordings)
    return np.clip(samples + noise, -1, 1)


def _unamplified(
    wave: NDArray[np.float64], kind: str, rng: np.random.Generator, rate: int, recordings: Recordings | None
) -> NDArray[np.float64]:
    """Return the noise at 0 dB: a recording as it is, or a procedural one as loud as the wave."""
    if recordings is not None:
        return np.resize(recordings(kind, rate), len(wave))
    level = float(np.sqrt((wave**2).mean())) or _SILENCE
    return level * procedural(kind, len(wave), rate, rng)


def _read(file: Path, frames: int = -1) -> tuple[NDArray[np.float64], int]:
    """Read a recording's first frames, or all: their mean over channels, and the rate in Hz."""
    try:
        wave, rate = soundfile.read(file, frames, dtype="float64", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(f"Expected {file} to be a readable recording, but: {error}") from error
    if not len(wave):
        raise ValueError(f"Expected {file} to be a recording with samples, but it has none.")
    if not np.isfinite(wave).all():
        raise ValueError(f"Expected {file} to have finite samples, but some are NaN or infinite.")
    return wave.mean(1), rate


def _check(wave: NDArray[np.float64], kind: str, severity: int, rate: int) -> None:
    if kind not in AUDIO_KINDS:
        raise ValueError(f"Expected `kind` to be one of {', '.join(AUDIO_KINDS)}, but got {kind!r}.")
    if not isinstance(severity, (int, np.integer)) or not 1 <= severity <= 5:
        raise ValueError(f"Expected `severity` to be an integer in [1, 5], but got {severity!r}.")
    _check_rate(rate)
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"Expected `wave` to be of shape (T,), mono, with T >= 1, but got {wave.shape}.")
    if not np.isfinite(wave).all():
        raise ValueError("Expected `wave` to be finite, but some of its samples are NaN or infinite.")
    if (peak := float(np.abs(wave).max())) > 1:
        raise ValueError(f"Expected `wave` to be in [-1, 1], but it reaches {peak:g}; scale or clip it.")


def _check_rate(rate: int) -> None:
    if not isinstance(rate, (int, np.integer)) or rate < 1:
        raise ValueError(f"Expected `rate` to be a positive integer, in Hz, but got {rate!r}.")
