"""Log-mel filterbanks by Kaldi's rules.

Kaldi and kaldi_native_fbank refuse filters so narrow that no frequency of the spectrum falls into them. torchaudio,
with which the published models were trained, leaves such a bin at its floor. One of the 128 bins at 16 kHz is such a
bin, so the rules are written out here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["filterbank"]

Array = NDArray[np.float64]

LOWEST_HERTZ = 20
PREEMPHASIS = 0.97
FLOOR = np.finfo(np.float32).eps


def filterbank(wave: Array, rate: int, mel_bins: int, frames: int | None = None) -> NDArray[np.float32]:
    """Compute the log-mel energies of one waveform, whose mean is removed first.

    As `torchaudio.compliance.kaldi.fbank` with a Hanning window, no dither and no energy. Windows of 25 ms begin every
    10 ms, each within the waveform. Of each the mean is removed and the treble raised by 0.97. Triangular filters of
    the power spectrum have equal width in mel = 1127 ln(1 + Hz / 700), from 20 Hz to half the rate. The logarithm is
    natural, of 1.2e-7 at least.

    Args:
        wave: (T,), in [-1, 1].
        rate: samples per second.
        mel_bins: F.
        frames: N, for which zeros are added at the end or the rest is cut; None for as many as there are.

    Returns:
        (N, F).

    Raises:
        ValueError: the waveform has more than one channel, is shorter than one window or is not finite.
    """
    length, shift = rate * 25 // 1000, rate * 10 // 1000
    if wave.ndim != 1 or len(wave) < length:
        raise ValueError(
            f"Expected `wave` to be (T,), of at least {length} samples (25 ms at {rate} Hz), but got {wave.shape}."
        )
    if not np.isfinite(wave).all():
        raise ValueError("Expected `wave` to be finite, but got NaN or infinite samples.")
    windows = np.lib.stride_tricks.sliding_window_view(wave - wave.mean(), length)[::shift][:frames]
    windows = windows - windows.mean(1, keepdims=True)
    windows -= PREEMPHASIS * np.concatenate((windows[:, :1], windows[:, :-1]), axis=1)
    padded = 1 << (length - 1).bit_length()
    spectrum = np.fft.rfft(windows * np.hanning(length), padded)
    power = spectrum.real**2 + spectrum.imag**2
    energies = np.log(np.maximum(power @ _mel_filters(rate, padded, mel_bins), FLOOR)).astype(np.float32)
    missing = 0 if frames is None else frames - len(energies)
    return np.pad(energies, ((0, missing), (0, 0)))


@cache
def _mel_filters(rate: int, padded: int, mel_bins: int) -> Array:
    """Return the filters' weights (padded / 2 + 1, F); 0 Hz and half the rate are in no filter."""
    edges = np.linspace(_mel(LOWEST_HERTZ), _mel(rate / 2), mel_bins + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    mel = _mel(np.arange(padded // 2 + 1) * rate / padded)[:, None]
    weights = np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clip(min=0)
    weights[-1] = 0
    return weights


def _mel(hertz: Array | float) -> Array:
    return 1127 * np.log1p(np.asarray(hertz) / 700)
