"""Filterbanks against their definition, written as loops, and against Kaldi's own program where it takes part."""

import csv
import math
from pathlib import Path

import kaldi_native_fbank as knf
import numpy as np
import pytest
import soundfile

from lightning_abpem.data import filterbank as module
from lightning_abpem.data.filterbank import filterbank

SPEECH = Path(module.__file__).parent / "spoken_digits"
FLOOR = math.log(2**-23)


def mel(hertz):
    return 1127 * math.log(1 + hertz / 700)


def by_definition(wave, rate, mel_bins):
    """Frame by frame, filter by filter, with the Fourier sum written out."""
    length, shift = int(rate * 0.025), int(rate * 0.01)
    padded = 1
    while padded < length:
        padded *= 2
    window = [0.5 - 0.5 * math.cos(2 * math.pi * i / (length - 1)) for i in range(length)]
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(padded // 2), np.arange(length)) / padded)
    spacing = (mel(rate / 2) - mel(20)) / (mel_bins + 1)
    wave = wave - sum(wave) / len(wave)
    rows = []
    for start in range(0, len(wave) - length + 1, shift):
        frame = wave[start : start + length]
        frame = frame - sum(frame) / length
        emphasised = np.empty(length)
        for i in range(length):
            emphasised[i] = (frame[i] - 0.97 * frame[max(i - 1, 0)]) * window[i]
        power = np.abs(fourier @ emphasised) ** 2
        energies = [0.0] * mel_bins
        for k in range(padded // 2):
            place = (mel(k * rate / padded) - mel(20)) / spacing  # filter b peaks at b + 1
            for b in range(mel_bins):
                energies[b] += max(0.0, 1 - abs(place - b - 1)) * power[k]
        rows.append([math.log(max(energy, 2**-23)) for energy in energies])
    return np.array(rows)


def by_kaldi(wave, rate, mel_bins):
    options = knf.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither, options.frame_opts.window_type = rate, 0, "hanning"
    options.mel_opts.num_bins = mel_bins
    options.htk_compat, options.use_energy = True, False
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(rate, (wave - wave.mean()).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])


def signals(rate, count):
    rng, time = np.random.default_rng(0), np.arange(count) / rate
    buzz = (time * 120 % 1 - 0.5) * (1 + np.sin(2 * np.pi * 4 * time))  # a larynx and its syllables
    with (SPEECH / "clips.csv").open() as file:
        first = next(csv.DictReader(file))
    speech, _ = soundfile.read(SPEECH / "clips.ogg", int(first["length"]), int(first["start"]))
    return {
        "noise": 0.1 * rng.standard_normal(count),
        "quiet noise with an offset": 0.3 + 1e-3 * rng.standard_normal(count),
        "tones": 0.2 * np.sin(2 * np.pi * 437 * time) + 0.1 * np.sin(2 * np.pi * 3100 * time),
        "buzz": 0.2 * buzz + 1e-3 * rng.standard_normal(count),
        "speech": np.resize(speech, count) + 1e-3 * rng.standard_normal(count),
    }


@pytest.mark.parametrize(("rate", "mel_bins"), [(16000, 128), (8000, 32)])
@pytest.mark.parametrize("signal", list(signals(8000, 1000)))
def test_against_the_definition(rate, mel_bins, signal):
    wave = signals(rate, rate // 20)[signal]
    np.testing.assert_allclose(filterbank(wave, rate, mel_bins), by_definition(wave, rate, mel_bins), atol=1e-5)


@pytest.mark.parametrize(("rate", "mel_bins"), [(16000, 126), (16000, 64), (8000, 32), (22050, 80)])
@pytest.mark.parametrize("signal", list(signals(8000, 1000)))
def test_against_kaldi(rate, mel_bins, signal):
    """Kaldi computes in single precision, which shows where next to nothing is left of a band."""
    wave = signals(rate, rate)[signal]
    np.testing.assert_allclose(filterbank(wave, rate, mel_bins), by_kaldi(wave, rate, mel_bins), atol=2e-3)


def test_a_filter_without_a_frequency_stays_at_the_floor():
    """The fourth of 128 at 16 kHz spans 63.0 to 93.0 Hz, between the spectrum's 62.5 and 93.75."""
    wave = signals(16000, 16000)["noise"]
    with pytest.raises(ValueError, match="num_mel_bins too large"):
        by_kaldi(wave, 16000, 128)
    energies = filterbank(wave, 16000, 128)
    assert np.flatnonzero((energies == np.float32(FLOOR)).all(0)).tolist() == [3]


def test_silence_is_at_the_floor():
    np.testing.assert_array_equal(filterbank(np.zeros(800), 16000, 128), np.full((3, 128), np.float32(FLOOR)))


def test_padded_with_zeros_or_cut():
    wave = signals(16000, 2000)["noise"]
    whole = filterbank(wave, 16000, 128, None)
    assert whole.shape == (11, 128)
    assert whole.dtype == np.float32
    padded = filterbank(wave, 16000, 128, 20)
    np.testing.assert_array_equal(padded[:11], whole)
    np.testing.assert_array_equal(padded[11:], np.zeros((9, 128)))
    np.testing.assert_array_equal(filterbank(wave, 16000, 128, 4), whole[:4])


def test_the_argument_is_left_as_it_is():
    wave = signals(16000, 2000)["noise"]
    before = wave.copy()
    filterbank(wave, 16000, 128)
    np.testing.assert_array_equal(wave, before)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050])
def test_one_window_is_enough_and_less_is_not(rate):
    length = int(rate * 0.025)
    assert filterbank(np.ones(length), rate, 8).shape == by_kaldi(np.ones(length), rate, 8).shape == (1, 8)
    message = rf"at least {length} samples \(25 ms at {rate} Hz\), but got \({length - 1},\)"
    with pytest.raises(ValueError, match=message):
        filterbank(np.ones(length - 1), rate, 8)


def test_one_channel_alone():
    with pytest.raises(ValueError, match=r"Expected `wave` to be \(T,\), .* but got \(2000, 2\)"):
        filterbank(np.ones((2000, 2)), 16000, 128)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers(value):
    wave = np.zeros(2000)
    wave[1000] = value
    with pytest.raises(ValueError, match="Expected `wave` to be finite"):
        filterbank(wave, 16000, 128)
