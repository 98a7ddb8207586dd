"""Procedural stand-ins for noise recordings: traffic, a crowd, rain, thunder and wind, at any sampling rate.

Each is a stationary or slowly changing texture with the spectrum and the rhythm of its namesake. They are computed so
that a corruption needs no recording; results on them are not those on the recordings of a published benchmark.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import signal

__all__ = ["NOISE_KINDS", "procedural"]

Array = NDArray[np.float64]
Rng = np.random.Generator

_LEAD = 0.25  # seconds computed before the noise and thrown away: no filter is heard starting up
_VEHICLES = 4
_VOICES = 12
_FORMANTS = ((300, 800), (900, 2200), (2300, 3000))  # Hz, least and most: of adults' vowels
_BANDWIDTHS = (80, 100, 140)  # Hz, of the formants


def procedural(kind: str, samples: int, rate: int, rng: Rng) -> Array:
    """Draw one noise of unit RMS level: (samples,), float64.

    Args:
        kind: one of `NOISE_KINDS`.
        samples: how many, 1 at least.
        rate: samples per second; edges of bands above its half are lowered.
        rng: draws everything that is random.

    Raises:
        ValueError: an unknown kind, or fewer than one sample, or a rate that is not positive.
    """
    if kind not in _NOISES:
        raise ValueError(f"Expected `kind` to be one of {', '.join(_NOISES)}, but got {kind!r}.")
    for name, value in (("samples", samples), ("rate", rate)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"Expected `{name}` to be a positive integer, but got {value!r}.")
    lead = 1 + int(_LEAD * rate)
    noise = _NOISES[kind](lead + samples, rate, rng)[lead:]
    return noise / _level(noise)


def _traffic(samples: int, rate: int, rng: Rng) -> Array:
    """Vehicles that pass: harmonics of an engine over the noise of tyres."""
    return np.sum([_vehicle(samples, rate, rng) for _ in range(_VEHICLES)], axis=0)


def _vehicle(samples: int, rate: int, rng: Rng) -> Array:
    """An engine of 40 to 120 Hz and tyres, both loudest as the vehicle passes."""
    pitch = rng.uniform(45, 108) * np.exp(0.05 * np.clip(_drift(samples, rate, 1, rng), -2, 2))
    seconds = samples / rate
    away = (np.arange(samples) / rate - rng.uniform(-0.2, 1.2) * seconds) / rng.uniform(0.5, 2)
    loudness = rng.uniform(0.5, 1) / (1 + away**2)
    engine = _harmonics(pitch, rate, 1 / np.arange(1, 7), rng)
    tyres = _band(rng.standard_normal(samples), 300, 1500, rate)
    return loudness * (engine / _level(engine) + tyres / _level(tyres))


def _harmonics(pitch: Array, rate: int, amplitudes: Array, rng: Rng) -> Array:
    """A sum of sines at whole multiples of a pitch in Hz, with random phases: a polynomial in the first of them."""
    first = np.exp(2j * np.pi * _cycles(pitch, rate, rng))
    turns = np.exp(2j * np.pi * rng.random(len(amplitudes)))
    return np.polyval(np.append((amplitudes * turns)[::-1], 0), first).imag


def _crowd(samples: int, rate: int, rng: Rng) -> Array:
    """Babble: many voices at once, each at its distance."""
    gains = np.exp(0.4 * rng.standard_normal(_VOICES))
    return np.sum([gain * _voice(samples, rate, rng) for gain in gains], axis=0)


def _voice(samples: int, rate: int, rng: Rng) -> Array:
    """Pulses of a glottis at 90 to 250 Hz through resonances of a mouth, in about four syllables a second."""
    pitch = rng.uniform(100, 225) * np.exp(0.05 * np.clip(_drift(samples, rate, 2, rng), -2, 2))
    pulses = np.exp(30 * (np.cos(2 * np.pi * _cycles(pitch, rate, rng)) - 1))
    pulses[1:] -= pulses[:-1].copy()  # what lips radiate is the flow's derivative
    resonances = [
        _resonance(rng.uniform(low, high), width, rate)
        for (low, high), width in zip(_FORMANTS, _BANDWIDTHS, strict=True)
    ]
    voice = signal.sosfilt(resonances, pulses)
    rhythm = 4 * np.exp(0.2 * np.clip(_drift(samples, rate, 1, rng), -2, 2))
    syllables = (1 - np.cos(2 * np.pi * _cycles(rhythm, rate, rng))) ** 2
    return voice / _level(voice) * syllables * np.exp(0.5 * _drift(samples, rate, 2, rng))


def _rain(samples: int, rate: int, rng: Rng) -> Array:
    """A hiss with drops: decaying bursts at random moments, about 200 a second."""
    drops = (rng.random(samples) < 200 / rate) * rng.exponential(size=samples)
    bursts = _decay(drops, 0.002, rate) * rng.standard_normal(samples)
    hiss = rng.standard_normal(samples)
    return _band(hiss + bursts / _level(bursts), 1000, 0.48 * rate, rate)


def _thunder(samples: int, rate: int, rng: Rng) -> Array:
    """A low rumble that a few claps raise at once and that dies away, over rain."""
    rumble = _band(rng.standard_normal(samples), 20, 200, rate)
    strength = np.zeros(samples)
    for _ in range(1 + rng.poisson(samples / rate / 4)):
        clap = np.zeros(samples)
        clap[rng.integers(samples)] = rng.uniform(1, 3)
        strength += _decay(clap, rng.uniform(0.5, 2), rate)
    rain = _rain(samples, rate, rng)
    return rumble / _level(rumble) * (0.3 + strength) + 0.1 * rain / _level(rain)


def _wind(samples: int, rate: int, rng: Rng) -> Array:
    """A rumble whose loudness, a log-normal one, comes in gusts."""
    return _band(rng.standard_normal(samples), 30, 500, rate) * np.exp(_drift(samples, rate, 4, rng))


def _level(x: Array) -> Array:
    return np.sqrt((x**2).mean())


def _band(noise: Array, low: float, high: float, rate: int) -> Array:
    """Filter a noise to a band in Hz, whose edges are lowered to fit under half the rate."""
    high = min(high, 0.48 * rate)
    low = min(low, high / 2)
    return signal.sosfilt(signal.butter(3, (low, high), "bandpass", fs=rate, output="sos"), noise)


def _resonance(frequency: float, width: float, rate: int) -> Array:
    """A resonance of one frequency and bandwidth, both in Hz, as a second-order section."""
    radius = np.exp(-np.pi * width / rate)
    cosine = np.cos(2 * np.pi * min(frequency, 0.48 * rate) / rate)
    return np.array([1, 0, 0, 1, -2 * radius * cosine, radius**2])


def _decay(impulses: Array, seconds: float, rate: int) -> Array:
    """Impulses that each die away exponentially; the time constant is in seconds."""
    return signal.lfilter([1], [1, -np.exp(-1 / (seconds * rate))], impulses)


def _drift(samples: int, rate: int, per_second: float, rng: Rng) -> Array:
    """Draw standard normal values, `per_second` of them from a random offset, and interpolate linearly."""
    at = np.arange(samples) * (per_second / rate) + rng.random()
    return np.interp(at, np.arange(int(at[-1]) + 2), rng.standard_normal(int(at[-1]) + 2))


def _cycles(frequency: Array, rate: int, rng: Rng) -> Array:
    """Count the periods of a changing frequency in Hz that have passed, from a random phase."""
    return rng.random() + np.cumsum(frequency) / rate


_NOISES: dict[str, Callable[[int, int, Rng], Array]] = {
    "traffic": _traffic,
    "crowd": _crowd,
    "rain": _rain,
    "thunder": _thunder,
    "wind": _wind,
}

NOISE_KINDS = tuple(_NOISES)
