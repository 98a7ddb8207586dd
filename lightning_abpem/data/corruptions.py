"""Corruptions of sensors at severities 1 to 5: images in [0, 1], waveforms in [-1, 1], in batches.

Kinds and parameters are those of ImageNet-C and of Kinetics50-C / VGGSound-C. Lengths in pixels, given there for images
of 224 x 224, are scaled to the image at hand. White noise on audio has its standard deviation; the other noises are
procedural, and loud: their gain is over the speech.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

__all__ = ["AUDIO_CORRUPTIONS", "IMAGE_CORRUPTIONS", "corrupt_audio", "corrupt_images"]

Array = NDArray[np.float64]
Rng = np.random.Generator

_GAIN_DB = (1, 2, 4, 6, 8)


def corrupt_images(images: Array, kind: str, severity: int, seed: int) -> Array:
    """Corrupt images (B, H, W) in [0, 1].

    Raises:
        ValueError: an unknown kind, or a severity outside 1 to 5.
    """
    corruption, parameters = _look_up(IMAGE_CORRUPTIONS, kind, severity)
    return np.clip(corruption(images, parameters, np.random.default_rng([seed, severity])), 0, 1)


def corrupt_audio(waves: Array, kind: str, severity: int, seed: int, rate: int, speech: Array) -> Array:
    """Corrupt waveforms (B, T) in [-1, 1], sampled at `rate` Hz; `speech` (N, T) is what a crowd speaks.

    Raises:
        ValueError: an unknown kind, or a severity outside 1 to 5.
    """
    corruption, parameter = _look_up(AUDIO_CORRUPTIONS, kind, severity)
    return np.clip(corruption(waves, parameter, rate, speech, np.random.default_rng([seed, severity])), -1, 1)


def _look_up(table: dict[str, tuple], kind: str, severity: int) -> tuple[Callable, float]:  # type: ignore[type-arg]
    if kind not in table:
        raise ValueError(f"Expected `kind` to be one of {', '.join(table)}, but got {kind!r}.")
    if severity not in range(1, 6):
        raise ValueError(f"Expected `severity` to be an integer in [1, 5], but got {severity!r}.")
    corruption, parameters = table[kind]
    return corruption, parameters[severity - 1]


# ----------------------------------------------------------------------------------------------------------- images


def _gaussian_noise(x: Array, sd: float, rng: Rng) -> Array:
    return x + sd * rng.standard_normal(x.shape)


def _impulse_noise(x: Array, amount: float, rng: Rng) -> Array:
    hit = rng.random(x.shape) < amount
    return np.where(hit, rng.random(x.shape) < 0.5, x)


def _speckle_noise(x: Array, sd: float, rng: Rng) -> Array:
    return x + x * sd * rng.standard_normal(x.shape)


def _defocus_blur(x: Array, parameters: tuple[float, float], rng: Rng) -> Array:
    radius, alias_sigma = (length * x.shape[-1] / 224 for length in parameters)
    reach, fine = int(np.ceil(radius)) + 1, 9
    offsets = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    disk = ndimage.gaussian_filter(disk, alias_sigma * fine)
    kernel = disk.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean((1, 3))
    return ndimage.convolve(x, (kernel / kernel.sum())[None], mode="nearest")


def _gaussian_blur(x: Array, sigma: float, rng: Rng) -> Array:
    sigma = sigma * x.shape[-1] / 224
    return ndimage.gaussian_filter(x, (0, sigma, sigma), mode="nearest")


def _fog(x: Array, parameters: tuple[float, float], rng: Rng) -> Array:
    amount, decay = parameters
    top = x.max((1, 2), keepdims=True)
    size = 1 << (max(x.shape[1:]) - 1).bit_length()
    fog = _plasma(len(x), size, decay, rng)[:, : x.shape[1], : x.shape[2]]
    return (x + amount * fog) * top / (top + amount)


def _plasma(count: int, size: int, decay: float, rng: Rng) -> Array:
    """Plasma fractals by diamond-square on a torus, each scaled to [0, 1]: (count, size, size), size a power of two."""
    maps = np.zeros((count, size, size))
    step, wibble = size, 100.0
    while step >= 2:
        half = step // 2

        def shake(mean: Array, wibble: float = wibble) -> Array:
            return mean / 4 + wibble * rng.uniform(-1, 1, mean.shape)

        corners = maps[:, ::step, ::step]
        right = np.roll(corners, -1, 2)
        maps[:, half::step, half::step] = shake(corners + right + np.roll(corners + right, -1, 1))
        centres = maps[:, half::step, half::step]
        above, left = np.roll(centres, 1, 1), np.roll(centres, 1, 2)
        maps[:, ::step, half::step] = shake(centres + above + corners + right)
        maps[:, half::step, ::step] = shake(centres + left + corners + np.roll(corners, -1, 1))
        step, wibble = half, wibble / decay
    maps -= maps.min((1, 2), keepdims=True)
    return maps / maps.max((1, 2), keepdims=True)


def _brightness(x: Array, amount: float, rng: Rng) -> Array:
    return x + amount


def _contrast(x: Array, factor: float, rng: Rng) -> Array:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * factor + mean


IMAGE_CORRUPTIONS: dict[str, tuple] = {  # type: ignore[type-arg]
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
}
"""Function and parameters by severity; the last two are the held-out kinds, for choosing hyper-parameters."""

# ------------------------------------------------------------------------------------------------------------ audio


def _white_noise(waves: Array, sd: float, rate: int, speech: Array, rng: Rng) -> Array:
    return waves + sd * rng.standard_normal(waves.shape)


def _louder(noise: Callable[[Array, int, Array, Rng], Array]) -> Callable[..., Array]:
    """The corruption that adds `noise` at a gain, in dB, over each waveform's own level."""

    def level(x: Array) -> Array:
        return np.sqrt((x**2).mean(1, keepdims=True))

    def corrupt(waves: Array, gain_db: float, rate: int, speech: Array, rng: Rng) -> Array:
        added = noise(waves, rate, speech, rng)
        return waves + added * (level(waves) / level(added)) * 10 ** (gain_db / 20)

    return corrupt


def _pink(waves: Array, rate: int, speech: Array, rng: Rng) -> Array:
    """Noise whose power falls with 1 / frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(waves.shape))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(spectrum.shape[1]), 1)), waves.shape[1])


def _wind(waves: Array, rate: int, speech: Array, rng: Rng) -> Array:
    """Low rumble that comes in gusts."""
    rumble = _band(rng.standard_normal(waves.shape), rate, 30, 500)
    seconds = waves.shape[1] / rate
    beats = rng.standard_normal((len(waves), int(np.ceil(8 * seconds)) + 1))  # eight a second, smooth in between
    gusts = signal.resample(beats, waves.shape[1], axis=1)
    return rumble * np.exp(gusts)


def _rain(waves: Array, rate: int, speech: Array, rng: Rng) -> Array:
    """A hiss with drops: short decaying bursts at random moments, about 200 a second."""
    hiss = rng.standard_normal(waves.shape)
    drops = (rng.random(waves.shape) < 200 / rate) * rng.exponential(size=waves.shape)
    decay = np.exp(-np.arange(int(0.004 * rate)) / (0.001 * rate))
    bursts = signal.lfilter(decay, 1, drops * rng.choice((-1, 1), waves.shape), axis=1)
    return _band(hiss / hiss.std() + bursts / bursts.std(), rate, 1000, 0.48 * rate)


def _traffic(waves: Array, rate: int, speech: Array, rng: Rng) -> Array:
    """Engines: harmonics of 40 to 120 Hz over tyre noise."""
    time = np.arange(waves.shape[1]) / rate
    base = rng.uniform(40, 120, (len(waves), 1, 1))
    order = np.arange(1, 5)[:, None]
    phase = rng.uniform(0, 2 * np.pi, (len(waves), 4, 1))
    engine = (np.sin(2 * np.pi * base * order * time + phase) / order).sum(1)
    tyres = _band(rng.standard_normal(waves.shape), rate, 300, 1500)
    return engine / engine.std() + tyres / tyres.std()


def _crowd(waves: Array, rate: int, speech: Array, rng: Rng) -> Array:
    """Many people speaking at once: twelve voices, each shifted at random."""
    crowd = np.zeros_like(waves)
    for _ in range(12):
        speakers, shifts = rng.integers(len(speech), size=len(waves)), rng.integers(waves.shape[1], size=len(waves))
        for row, speaker, shift in zip(crowd, speakers, shifts, strict=True):
            row += np.roll(speech[speaker], shift)
    return crowd


def _band(noise: Array, rate: int, low: float, high: float) -> Array:
    return signal.sosfilt(signal.butter(2, (low, high), "bandpass", fs=rate, output="sos"), noise, axis=1)


AUDIO_CORRUPTIONS: dict[str, tuple] = {  # type: ignore[type-arg]
    "gaussian_noise": (_white_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "crowd": (_louder(_crowd), _GAIN_DB),
    "rain": (_louder(_rain), _GAIN_DB),
    "wind": (_louder(_wind), _GAIN_DB),
    "traffic": (_louder(_traffic), _GAIN_DB),
    "pink_noise": (_louder(_pink), _GAIN_DB),
}
"""Function and parameter by severity: the standard deviation of white noise, or a gain in dB."""
